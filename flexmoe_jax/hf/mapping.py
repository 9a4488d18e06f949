"""The table from a checkpoint's tensor names to the leaves of our tree; each name and each leaf occurs exactly once."""

import dataclasses
import math
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.foreign import short
from flexmoe_jax.hf.architectures import Architecture
from flexmoe_jax.hf.tensors import DTYPES, Tensor, equal, widest
from flexmoe_jax.model import rope
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import is_matrix, owner_leaves
from flexmoe_jax.tree import TRUNK

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WHOLE = {_EMBED: "embed", "model.norm.weight": "final_norm", _HEAD: "head"}
_FREQUENCIES = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_SAVE_AGAIN = "save it again with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
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


def check_count(found: Mapping[str, Tensor], model: ModelConfig, experts: int, where: str) -> None:
    """Raises ArtifactError where a configuration implies far more tensors than there are, before any is listed."""
    if 3 * model.num_layers * experts > len(found):  # every expert has three matrices in every layer
        raise ArtifactError(
            f"{where}: {len(found)} tensors, and config.json implies {model.num_layers} layers of {experts} experts",
            "give weights and config.json of the same model",
        )


def drop_surplus(found: Mapping[str, Tensor], model: ModelConfig, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors without those that `transformers` does not use either, a note on each kind of these).

    They are rotary frequencies, and the head of a model whose head is its embedding. Raises ArtifactError where they
    differ from what the model has in their place: it would then not compute what it was trained to.
    """
    tensors, notes = dict(found), []
    buffers = [name for name in found if _FREQUENCIES.fullmatch(name)]
    for name in buffers:
        if not _are_frequencies(tensors.pop(name), model):
            raise ArtifactError(
                f"{where}: {name} is not the rotary frequencies of rope_theta {model.rope_theta:g} in config.json",
                f"correct rope_theta in config.json; where it is right, {_SAVE_AGAIN}, which leaves the tensor out",
            )
    if buffers:
        notes.append(f"rotary frequencies passed over, equal to those of config.json: {short(buffers)}")
    if model.tie_embeddings and _HEAD in tensors:
        head = tensors.pop(_HEAD)
        if (embed := tensors.setdefault(_EMBED, head)) is head:
            notes.append(f"{_HEAD} is the embedding, too")
        elif equal(embed, head):
            notes.append(f"{_HEAD} passed over, equal to the embedding")
        else:
            raise ArtifactError(
                f"{where}: {_HEAD} differs from {_EMBED}, and tie_word_embeddings in config.json is true",
                "set tie_word_embeddings to false if the model was trained with this head; transformers uses it, too",
            )
    return tensors, notes


def widened(found: Mapping[str, Tensor], table: Mapping[str, Slot]) -> list[str]:
    """A note on each leaf whose layers have different dtypes: it gets the one that holds them all exactly."""
    dtypes: dict[str, set[str]] = {}
    for name, slot in table.items():
        if name in found:
            dtypes.setdefault(f"{slot.owners[0]}/{slot.path}", set()).add(found[name].dtype)
    return [
        f"{leaf} is {' and '.join(sorted(kinds))} in different layers, and becomes {widest(kinds)}"
        for leaf, kinds in dtypes.items()
        if len(kinds) > 1
    ]


def check_tensors(found: Mapping[str, Tensor], table: Mapping[str, Slot], where: str) -> None:
    """Raises ArtifactError unless the tensors have exactly the table's names and shapes, and dtypes that we keep."""
    unknown, missing = sorted({*found} - {*table}), sorted({*table} - {*found})
    for names, problem in ((unknown, "is unknown"), (missing, "is missing")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ArtifactError(
                f"{where}: the tensor {names[0]!r} {problem}{more}",
                "give weights and config.json of the same model: every tensor is used exactly once",
            )
    for name, slot in table.items():
        if found[name].shape != slot.shape:
            raise ArtifactError(
                f"{where}: the tensor {name!r} has shape {found[name].shape}, config.json implies {slot.shape}",
                "give weights and config.json of the same model",
            )
        if found[name].dtype not in DTYPES.values():
            known = f"give a checkpoint in one of {', '.join(DTYPES.values())}"
            raise ArtifactError(f"{where}: the tensor {name!r} has dtype {found[name].dtype}", known)


def _are_frequencies(tensor: Tensor, model: ModelConfig) -> bool:
    """Whether a tensor holds the model's rotary frequencies, scaled or not, up to the rounding of its dtype."""
    if tensor.shape != (model.head_dim // 2,):
        return False
    stored = tensor.read().astype(np.float64)
    kind = ml_dtypes.finfo("float32" if tensor.dtype == "float64" else tensor.dtype)
    # Both sides round once to the stored dtype, after a power that float32 computes to some 1e-6.
    rtol, atol = max(2 * float(kind.eps), 1e-5), float(kind.smallest_subnormal)
    options = (rope.frequencies(model.head_dim, model.rope_theta, how)[0] for how in (None, model.rope_scaling))
    return any(np.allclose(stored, np.asarray(ours, np.float64), rtol, atol) for ours in options)


def _one_layer(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The checkpoint's shape for one layer of the leaf `path`: [out, in] for a matrix, flat for anything else."""
    if not is_matrix(path):
        return (math.prod(shape),)
    inputs = shape[:-1] if path.endswith("w_o") else shape[:1]
    return (math.prod(shape) // math.prod(inputs), math.prod(inputs))
