"""Export for llama.cpp: from a model directory to one GGUF file, whose mixtures hold the experts' matrices stacked.

Every leaf is read once, layer by layer, and its digest is compared with the manifest's while the file is written. In
memory are the embedding or one matrix of one expert, at any size of the model.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from flexmoe_jax.artifacts.arrays import NUMPY_DTYPES, tensor_file
from flexmoe_jax.artifacts.model_dir import ModelDir
from flexmoe_jax.artifacts.package import check_files, raise_problems
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.hf.architectures import check_no_head_changes
from flexmoe_jax.hf.gguf_tokenizer import add_tokenizer
from flexmoe_jax.model.rope import frequencies
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import factors, is_matrix, owner_leaves, ranks_of
from flexmoe_jax.tree import PUBLIC, TRUNK, check_known

if TYPE_CHECKING:
    import gguf

# {--dtype: (type of a tensor, type of a file)} by llama.cpp's names.
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_TRUNK = {f"blocks/w_{ours}": f"attn_{theirs}" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)}
_TRUNK |= {"blocks/q_norm": "attn_q_norm", "blocks/k_norm": "attn_k_norm"}
_PRE_NORM = {"blocks/attn_norm": "attn_norm", "blocks/ffn_norm": "ffn_norm"}
_POST_NORM = {"blocks/attn_norm": "post_attention_norm", "blocks/ffn_norm": "post_ffw_norm"}
_FFN = {"w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down"}
_ROTATED = {"blocks/w_q", "blocks/w_k", "blocks/b_q", "blocks/b_k"}
_ONE_EXPERT = "export one expert as a dense model: --experts public"


@dataclasses.dataclass(frozen=True)
class GgufExport:
    """What `export_gguf` wrote: `architecture` and `pre_tokenizer` are llama.cpp's names, `size` counts bytes."""

    path: pathlib.Path
    architecture: str
    experts: tuple[str, ...]
    top_k: int
    dtype: str
    pre_tokenizer: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: leaf `path` of each of `owners`, of one `layer` or whole (None), stacked if `stacked`."""

    name: str
    shape: tuple[int, ...]
    kind: "gguf.GGMLQuantizationType"
    path: str
    owners: tuple[str, ...]
    layer: int | None = None
    heads: int | None = None
    """Query or key projection whose rows get the order of llama.cpp's rotary embedding: its number of heads."""


def export_gguf(
    model: ModelDir, out: pathlib.Path | str, *, experts: Iterable[str] | None = None, dtype: str | None = None
) -> GgufExport:
    """Writes the new GGUF file `out`: of several experts a mixture, of one a dense model.

    `dtype` (a key of `DTYPES`) is that of the matrices; None: as stored, float32 if they differ. Norms and the router
    are float32. Raises ArtifactError for damaged packages, an existing file, and what llama.cpp cannot compute (an
    architecture, a tokenizer, a negative expert bias); ConfigError for an unknown dtype, for sizes that a quantization
    cannot hold, and where the package `gguf` is missing. When anything fails, `out` does not appear.
    """
    out = pathlib.Path(out)
    names = model.experts if experts is None else check_known(experts, model.experts)
    top_k = min(model.top_k, len(names))
    architecture, interleaved = _architecture(model.config, len(names) > 1)
    if os.path.lexists(out):
        raise ArtifactError(f"{out} already exists", "give another path, or remove it first")
    leaves = _Leaves(model, names)
    if len(names) > 1:
        leaves.refuse_bias(names)
    dtype = leaves.widest() if dtype is None else dtype
    writer = _writer(architecture)
    _add_sizes(writer, model, names, top_k)
    pre_tokenizer = add_tokenizer(writer, model)
    tensors = list(_tensors(model.config, names, interleaved, _kind(model.config, dtype)))
    _add_file(writer, model, names, dtype)
    write_bytes(out, _content(writer, tensors, leaves, model.config))
    return GgufExport(out, architecture, names, top_k, dtype, pre_tokenizer, out.stat().st_size)


def _architecture(config: ModelConfig, mixture: bool) -> tuple[str, bool]:
    """(llama.cpp's architecture, whether it rotates neighboring dimensions and not halves of a head).

    Those of mixtures divide the weights of the active experts by their sum, as `norm_topk` does, which every model with
    `pre_norm` has. ArtifactError where no architecture computes the model.
    """
    c = config
    if c.pre_norm and not c.qk_norm and c.rope_skip is None:
        return "llama", True
    if c.pre_norm and c.qk_norm_per_head and not c.qkv_bias and c.rope_skip is None:
        return "qwen3moe" if mixture else "qwen3", False
    if not mixture and not c.qkv_bias:
        if c.pre_norm and not c.qk_norm and c.rope_skip == 4:
            return "smollm3", True
        if not c.pre_norm and c.qk_norm and not c.qk_norm_per_head and c.rope_skip is None:
            return "olmo2", False
    parts = ("pre_norm", "qk_norm", "qk_norm_per_head", "qkv_bias", "rope_skip")
    raise ArtifactError(
        f"llama.cpp has no architecture of a {'mixture' if mixture else 'dense model'} with "
        + ", ".join(f"{name} {getattr(c, name)}" for name in parts),
        f"{_ONE_EXPERT}; or export the mixture with `flexmoe export-hf`" if mixture else "use `flexmoe export-hf`",
    )


class _Leaves:
    """The leaves of the packages, each read once in the order of its layers, and hashed as it is read."""

    def __init__(self, model: ModelDir, names: tuple[str, ...]) -> None:
        check_no_head_changes(model, names)
        self.model = model
        self._changed = any(ranks_of(model.manifests[name].tensors) for name in names)
        self._owners = tuple(dict.fromkeys((TRUNK, *([PUBLIC] if self._changed else []), *names)))
        self._hashes: dict[tuple[str, str, str], hashlib._Hash] = {}
        for owner in self._owners:
            raise_problems(model.package(owner), check_files(model.package(owner), model.manifests[owner]))

    def widest(self) -> str:
        """The key of `DTYPES` that holds every matrix as it is stored."""
        if self._changed:  # what is added up is made in float32
            return _STORED["float32"]
        tables = (self.model.manifests[owner].tensors for owner in self._owners)
        named = {t.dtype for table in tables for path, t in table.items() if is_matrix(path) or path == "embed"}
        return _STORED[np.result_type(*(NUMPY_DTYPES[name] for name in named)).name]

    def read(self, owner: str, path: str, layer: int | None, reader: str = "") -> np.ndarray:
        """One layer of the leaf, or all of it (None), in float32; a low-rank change is added to the public expert's.

        What a `reader` reads is hashed apart: the public expert's matrices are read for each that changes them.
        """
        if path not in self.model.manifests[owner].tensors:
            a, b = (self.read(owner, name, layer) for name in factors(path))
            with np.errstate(over="ignore", invalid="ignore"):
                whole = self.read(PUBLIC, path, layer, reader=owner) + a @ b
            if not np.isfinite(whole).all():
                what = f"{path} of {owner!r} has values that are not finite in layer {layer}"
                raise ArtifactError(what, "do not use this package; its owner trains it again")
            return whole
        tensor = self.model.manifests[owner].tensors[path]
        shape, dtype = tensor.shape if layer is None else tensor.shape[1:], NUMPY_DTYPES[tensor.dtype]
        size = math.prod(shape)
        file = self.model.package(owner) / tensor_file(path, tensor.shape)
        array = np.fromfile(file, dtype, size, offset=(layer or 0) * size * dtype.itemsize)
        self._hashes.setdefault((reader, owner, path), hashlib.sha256()).update(array.view(np.uint8).data)
        return array.reshape(shape).astype(np.float32, copy=False)

    def refuse_bias(self, names: tuple[str, ...]) -> None:
        """ArtifactError if min(bias, 0) of an expert is not 0."""
        layers = {name: np.flatnonzero(self.read(name, "bias", None) < 0).tolist() for name in names}
        if any(layers.values()):
            raise ArtifactError(
                "llama.cpp has no expert bias, and this model has one: "
                + "; ".join(f"{n} in layers {', '.join(map(str, found))}" for n, found in layers.items() if found),
                _ONE_EXPERT,
            )

    def check(self) -> None:
        """ArtifactError unless everything that was read has the digest of its manifest."""
        for (_, owner, path), found in self._hashes.items():
            expected = self.model.manifests[owner].tensors[path].sha256
            if found.hexdigest() != expected:
                raise ArtifactError(
                    f"{self.model.package(owner)}: {path} has sha256 {found.hexdigest()}, its manifest says {expected}",
                    "fetch the package again from its owner, and merge again",
                )


def _tensors(
    config: ModelConfig, names: tuple[str, ...], interleaved: bool, kind: "gguf.GGMLQuantizationType"
) -> Iterator[_Tensor]:
    """The tensors in the order of the file, so that every leaf is read in the order of its layers."""
    import gguf

    trunk, expert = owner_leaves(config, TRUNK), owner_leaves(config, names[0])
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    table = {**_TRUNK, **(_PRE_NORM if config.pre_norm else _POST_NORM)}
    f32 = gguf.GGMLQuantizationType.F32
    D, E = config.d_model, len(names)
    yield _Tensor("token_embd.weight", trunk["embed"].shape, kind, "embed", (TRUNK,))
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        yield _Tensor("rope_freqs.weight", (config.head_dim // 2,), f32, "rope", ())
    for layer in range(config.num_layers):
        for path, leaf in trunk.items():
            if not path.startswith("blocks/"):
                continue
            rotated = heads[path[-1]] if interleaved and path in _ROTATED else None
            name = table.get(path, f"attn_{path[-1]}") + (".bias" if path.startswith("blocks/b_") else ".weight")
            shape = _shape(path, leaf.shape[1:])
            yield _Tensor(
                f"blk.{layer}.{name}", shape, kind if is_matrix(path) else f32, path, (TRUNK,), layer, rotated
            )
        if E > 1:
            yield _Tensor(f"blk.{layer}.ffn_gate_inp.weight", (E, D), f32, "router", names, layer)
        for path, name in _FFN.items():
            one = _shape(path, expert[path].shape[1:])
            stacked = (f"{name}_exps", (E, *one)) if E > 1 else (name, one)
            yield _Tensor(f"blk.{layer}.{stacked[0]}.weight", stacked[1], kind, path, names, layer)
    yield _Tensor("output_norm.weight", (D,), f32, "final_norm", (TRUNK,))
    if "head" in trunk:
        yield _Tensor("output.weight", trunk["head"].shape[::-1], kind, "head", (TRUNK,))


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    """The number of rows of one layer's matrix [in.., out..]."""
    return math.prod(shape[:-1]) if path.endswith("w_o") else shape[0]


def _shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] of one layer's matrix, a flat shape of anything else."""
    size = math.prod(shape)
    return (size // _inputs(path, shape), _inputs(path, shape)) if is_matrix(path) else (size,)


def _rows(tensor: _Tensor, leaf: np.ndarray) -> np.ndarray:
    """One owner's part of the tensor, [out, in] or flat, with the rows of rotated heads in llama.cpp's order."""
    if is_matrix(tensor.path) or tensor.path == "head":
        leaf = leaf.reshape(_inputs(tensor.path, leaf.shape), -1).T
    elif tensor.path != "embed":
        leaf = leaf.reshape(-1)
    if tensor.heads is not None:
        halves = leaf.reshape(tensor.heads, 2, leaf.shape[0] // tensor.heads // 2, -1)
        leaf = halves.swapaxes(1, 2).reshape(leaf.shape)
    return np.ascontiguousarray(leaf)


def _parts(tensor: _Tensor, leaves: _Leaves, config: ModelConfig) -> Iterator[np.ndarray]:
    """The tensor's bytes, one owner's part at a time. ArtifactError for a number that the type cannot hold."""
    import gguf

    if tensor.path == "rope":
        plain, _ = frequencies(config.head_dim, config.rope_theta)
        scaled, _ = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield np.asarray(plain / scaled, np.float32)
        return
    for owner in tensor.owners:
        rows = _rows(tensor, leaves.read(owner, tensor.path, tensor.layer))
        if tensor.kind.name == "F16" and np.abs(rows).max() > np.finfo(np.float16).max:
            what = f"{tensor.name} ({owner}) holds {np.abs(rows).max():g}, beyond float16"
            raise ArtifactError(what, "export as --dtype bf16 or f32")
        yield gguf.quantize(rows, tensor.kind)


def _content(
    writer: "gguf.GGUFWriter", tensors: list[_Tensor], leaves: _Leaves, config: ModelConfig
) -> Iterator[bytes]:
    """The bytes of the file in order; at the end, the digests of what was read are checked."""
    import gguf

    for tensor in tensors:
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.kind)
    with tempfile.TemporaryDirectory() as folder:  # the package writes metadata only to files
        head = pathlib.Path(folder, "head")
        writer.write_header_to_file(head)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        metadata = head.read_bytes()
    yield metadata
    yield bytes(-len(metadata) % writer.data_alignment)
    for tensor in tensors:
        size = 0
        for part in _parts(tensor, leaves, config):
            yield part.tobytes()
            size += part.nbytes
        yield bytes(-size % writer.data_alignment)
    leaves.check()


def _writer(architecture: str) -> "gguf.GGUFWriter":
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("writing GGUF files needs the package gguf", "pip install 'flexmoe_jax[hf]'") from error
    return gguf.GGUFWriter(None, architecture)


def _kind(config: ModelConfig, dtype: str) -> "gguf.GGMLQuantizationType":
    """llama.cpp's type of the matrices. ConfigError for an unknown dtype, and rows that do not fill its blocks."""
    import gguf

    if dtype not in DTYPES:
        raise ConfigError(f"the dtype of a GGUF file is {dtype!r}", f"use one of: {', '.join(DTYPES)}")
    kind = gguf.GGMLQuantizationType[DTYPES[dtype][0]]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    sizes = {"d_model": config.d_model, "d_ff": config.d_ff, "heads": config.num_heads * config.head_dim}
    for name, size in sizes.items():
        if size % block:
            raise ConfigError(
                f"{dtype} holds rows in blocks of {block}, and {name} is {size}", "export as --dtype bf16 or f16"
            )
    return kind


def _add_file(writer: "gguf.GGUFWriter", model: ModelDir, names: tuple[str, ...], dtype: str) -> None:
    """What the file is: its name, licenses, experts in the order of its stacked tensors, and our model's digest."""
    import gguf

    licenses = dict.fromkeys(model.manifests[owner].record.licence for owner in (TRUNK, *names))
    writer.add_type("model")
    writer.add_name(model.path.resolve().name)
    if stated := [license for license in licenses if license]:
        writer.add_license(" AND ".join(stated))
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array("flexmoe.experts", list(names))
    writer.add_string("flexmoe.model", model.digest)


def _add_sizes(writer: "gguf.GGUFWriter", model: ModelDir, names: tuple[str, ...], top_k: int) -> None:
    c = model.config
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if len(names) > 1:
        writer.add_expert_count(len(names))
        writer.add_expert_used_count(top_k)
        writer.add_expert_feed_forward_length(c.d_ff)
    _add_rope_scaling(writer, c)


def _add_rope_scaling(writer: "gguf.GGUFWriter", config: ModelConfig) -> None:
    """The keys of `linear` and `yarn`; `llama3` is a tensor, which llama.cpp reads only for its architecture llama."""
    import gguf

    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "llama3":
        if writer.arch != "llama":
            raise ArtifactError(
                f"llama.cpp's architecture {writer.arch!r} has no rotary embedding of kind 'llama3'",
                "use `flexmoe export-hf`",
            )
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        if not scaling.truncate:
            raise ArtifactError(
                "llama.cpp rounds the limits of yarn to whole dimensions, this model (truncate false) does not",
                "use `flexmoe export-hf`",
            )
        assert scaling.original_max_seq_len is not None  # RopeScaling refuses yarn without it
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        _, factor = frequencies(config.head_dim, config.rope_theta, scaling)
        # llama.cpp multiplies this with the paper's factor.
        writer.add_rope_scaling_attn_factors(factor / (0.1 * math.log(scaling.factor) + 1))
