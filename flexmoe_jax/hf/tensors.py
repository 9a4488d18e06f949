"""Safetensors files, read strictly and written as a stream.

The format is a length, a JSON header and raw bytes. It has no checksum, and readers accept doubled names; here a header
must account for every byte of its file exactly once. Reading takes one tensor into memory, and so does writing: a
checkpoint of any size passes through the memory of its largest tensor. Files have the bytes that `save_pretrained` of
`transformers` writes for the same tensors.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16
import numpy as np

from flexmoe_jax.artifacts.sealed import parse_json, read_bytes
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import write_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# In the order of the format's writer: wider types first.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 64 << 20
FETCH = "fetch the checkpoint again from its source"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint; `read` makes it an array in memory, little-endian, C order."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def read_checkpoint(folder: pathlib.Path | str) -> dict[str, Tensor]:
    """{name: Tensor} of the checkpoint in `folder`: one `model.safetensors`, or the shards that its index names.

    Raises ArtifactError for anything else than safetensors in float32, bfloat16 or float16, for a name that is in two
    files or not where the index says, and for a file whose header does not account for its bytes.
    """
    folder = pathlib.Path(folder)
    if (folder / INDEX).is_file():
        weight_map = parse_json(read_bytes(folder / INDEX), folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_plain(name) for name in weight_map.values()):
            raise ArtifactError(f"{folder / INDEX} has no weight_map of file names", FETCH)
    elif (folder / SINGLE).is_file():
        weight_map = None
    else:
        found = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf"))
        raise ArtifactError(
            f"{folder} has neither {SINGLE} nor {INDEX} (it has: {', '.join(found) or 'no weights'})",
            "give a folder of safetensors files; pickled weights are not read, .gguf is for `flexmoe import-gguf`",
        )
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, Tensor] = {}
    place: dict[str, str] = {}
    for file in files:
        for name, tensor in read_file(folder / file).items():
            if name in tensors:
                raise ArtifactError(f"the tensor {name!r} is in {place[name]} and again in {file}", FETCH)
            tensors[name], place[name] = tensor, file
    for name in sorted({*(weight_map or place), *place}):
        expected = SINGLE if weight_map is None else weight_map.get(name)
        if expected != place.get(name):
            raise ArtifactError(
                f"{folder}: the tensor {name!r} is in {place.get(name)}, the index says {expected}", FETCH
            )
    return tensors


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """{name: Tensor} of one safetensors file; only the header is read."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ArtifactError(f"{path} has {size} bytes and a header of {length}", FETCH)
            header = parse_json(file.read(length).rstrip(b" "), path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", FETCH) from error
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        tensor, begin, end = _tensor(path, name, entry, 8 + length)
        if begin != position:
            raise ArtifactError(f"{path}: the tensor {name!r} begins at byte {begin}, expected {position}", FETCH)
        tensors[name], position = tensor, end
    if 8 + length + position != size:
        raise ArtifactError(f"{path} has {size} bytes, its header accounts for {8 + length + position}", FETCH)
    return tensors


def write_checkpoint(folder: pathlib.Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[str]:
    """Writes {name: Tensor} as one file, or as shards of at most `max_shard_bytes` with their index; their names.

    A tensor larger than `max_shard_bytes` has a shard of its own. Tensors are made one at a time.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name in sorted(tensors):
        used = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and used + tensors[name].nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensors[name]
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return [SINGLE]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
            "total_size": sum(t.nbytes for t in tensors.values()),
        },
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    write_bytes(folder / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return [*names, INDEX]


def write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file, tensor by tensor."""
    order = sorted(tensors, key=lambda name: (list(DTYPES.values()).index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        end = position + tensors[name].nbytes
        entry = {"dtype": _CODES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name], position = {**entry, "data_offsets": [position, end]}, end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            array = np.asarray(tensors[name].read(), order="C")
            if array.shape != tensors[name].shape or array.dtype.name != tensors[name].dtype:
                raise AssertionError(f"{name}: {array.dtype} {array.shape} was planned as {tensors[name]}")
            file.write(array.reshape(-1).view(np.uint8).data)


def _tensor(path, name, entry, data_begin) -> tuple[Tensor, int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = (*shape, begin, end)
        if not all(type(n) is int and n >= 0 for n in sizes) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(entry)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: the tensor {name!r} is described by {entry!r}", FETCH) from error
    if code not in DTYPES:
        raise ArtifactError(
            f"{path}: the tensor {name!r} has dtype {code}", f"give a checkpoint in one of: {', '.join(DTYPES)}"
        )
    dtype, count = np.dtype(DTYPES[code]), math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise ArtifactError(f"{path}: the tensor {name!r} of shape {shape} has {end - begin} bytes", FETCH)

    def read() -> np.ndarray:
        return np.fromfile(path, dtype, count, offset=data_begin + begin).reshape(shape)

    return Tensor(dtype.name, shape, read), begin, end


def _offsets(entry) -> tuple[int, ...]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return tuple(n for n in offsets if type(n) is int) if isinstance(offsets, list) else ()


def _is_plain(name) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and pathlib.PurePath(name).name == name
