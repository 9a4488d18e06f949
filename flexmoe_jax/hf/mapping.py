"""The table from a checkpoint's tensor names to the leaves of our tree; each name and each leaf occurs exactly once."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.hf.architectures import Architecture
from flexmoe_jax.hf.tensors import Tensor
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import is_matrix, owner_leaves
from flexmoe_jax.tree import TRUNK

_WHOLE = {"model.embed_tokens.weight": "embed", "model.norm.weight": "final_norm", "lm_head.weight": "head"}
_NOT_TRANSPOSED = {"embed"}  # every other matrix of one owner is [out, in] in checkpoints, [in, out] in our tree


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a checkpoint's tensor of this `shape` belongs: leaf `path` of `owners`, in `layer` or (None) whole.

    A tensor belongs to one owner or, with `rows` (router, bias), holds one row or number per owner.
    """

    shape: tuple[int, ...]
    owners: tuple[str, ...]
    path: str
    layer: int | None = None
    rows: bool = False

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint stores the matrix as [out, in]."""
        return len(self.shape) == 2 and not self.rows and self.path not in _NOT_TRANSPOSED

    def split(self, tensor: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """{owner: leaf, or one layer of it} from a checkpoint's tensor; `shape` is that of one owner's result."""
        if self.rows:
            return {owner: tensor[i] for i, owner in enumerate(self.owners)}
        return {self.owners[0]: (tensor.T if self.transposed else tensor).reshape(shape)}

    def join(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The checkpoint's tensor from {owner: leaf, or one layer of it}: the inverse of `split`."""
        if self.rows:
            return np.stack([leaves[owner] for owner in self.owners])
        leaf = leaves[self.owners[0]]
        return leaf.reshape(self.shape[::-1]).T if self.transposed else leaf.reshape(self.shape)


def slots(model: ModelConfig, architecture: Architecture, experts: tuple[str, ...]) -> dict[str, Slot]:
    """{tensor name: Slot} of a whole checkpoint, whose experts have the order of `experts`."""
    table: dict[str, Slot] = {}
    shapes = {path: leaf.shape for path, leaf in owner_leaves(model, TRUNK).items()}
    for name, path in _WHOLE.items():
        if path in shapes:
            table[name] = Slot(shapes[path][::-1] if path == "head" else shapes[path], (TRUNK,), path)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for name, path in architecture.layer_names.items():
            table[f"{prefix}.{name}"] = Slot(_one_layer(path, shapes[path][1:]), (TRUNK,), path, layer)
        for i, owner in enumerate(experts):
            leaves = owner_leaves(model, owner)
            for name, path in architecture.expert_names(i).items():
                table[f"{prefix}.{name}"] = Slot(_one_layer(path, leaves[path].shape[1:]), (owner,), path, layer)
        router = f"{prefix}.{architecture.moe}.gate"
        if architecture.mixture:
            table[f"{router}.weight"] = Slot((len(experts), model.d_model), experts, "router", layer, rows=True)
        if architecture.bias:
            table[f"{router}.bias"] = Slot((len(experts),), experts, "bias", layer, rows=True)
    return table


def check_tensors(found: Mapping[str, Tensor], table: Mapping[str, Slot], where: str) -> None:
    """Raises ArtifactError unless the tensors have exactly the table's names and shapes, and one dtype per leaf."""
    unknown, missing = sorted({*found} - {*table}), sorted({*table} - {*found})
    for names, problem in ((unknown, "is unknown"), (missing, "is missing")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ArtifactError(
                f"{where}: the tensor {names[0]!r} {problem}{more}",
                "give weights and config.json of the same model: every tensor is used exactly once",
            )
    dtypes: dict[tuple[tuple[str, ...], str], tuple[str, str]] = {}
    for name, slot in table.items():
        if found[name].shape != slot.shape:
            raise ArtifactError(
                f"{where}: the tensor {name!r} has shape {found[name].shape}, config.json implies {slot.shape}",
                "give weights and config.json of the same model",
            )
        first, dtype = dtypes.setdefault((slot.owners, slot.path), (name, found[name].dtype))
        if dtype != found[name].dtype:
            raise ArtifactError(
                f"{where}: {first} is {dtype}, {name} is {found[name].dtype}",
                "store a tensor in the same dtype in all layers",
            )


def _one_layer(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The checkpoint's shape for one layer of the leaf `path`: [out, in] for a matrix, flat for anything else."""
    if not is_matrix(path):
        return (math.prod(shape),)
    inputs = shape[:-1] if path.endswith("w_o") else shape[:1]
    return (math.prod(shape) // math.prod(inputs), math.prod(inputs))
