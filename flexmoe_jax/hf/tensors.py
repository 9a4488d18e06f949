"""Safetensors files: strict reading, streamed writing.

The format is the header's length, a JSON header and raw bytes. It has no checksum, and other readers accept duplicate
names; here a header must account for every byte of its file exactly once. Reading and writing hold one tensor in
memory at a time, at any size of the checkpoint. For the same tensors, `write_tensors` writes the bytes of
`save_pretrained` of `transformers`.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np

from flexmoe_jax.artifacts.sealed import MAX_TEXT_BYTES, parse_json, read_bytes
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# {code in a header: numpy dtype}, in the order in which the reference writer stores tensors.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
FETCH = "fetch the checkpoint again from its source"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint; `read` returns it as an array in memory, in C order."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def read_tensors(folder: pathlib.Path | str) -> dict[str, Tensor]:
    """{name: Tensor} of the checkpoint in `folder`: one `model.safetensors`, or the shards that its index names.

    Raises ArtifactError for a folder without safetensors files, a dtype other than float32, bfloat16 and float16, a
    name that is in two files or not in the file that the index names, and a header that does not account for its file.
    """
    folder = pathlib.Path(folder)
    if (folder / INDEX).is_file():
        weight_map = parse_json(read_bytes(folder / INDEX), folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
            raise ArtifactError(f"{folder / INDEX} has no weight_map from tensors to file names", FETCH)
    elif (folder / SINGLE).is_file():
        weight_map = None
    else:
        found = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf"))
        raise ArtifactError(
            f"{folder} has neither {SINGLE} nor {INDEX} (it has: {', '.join(found) or 'no weights'})",
            "give a folder of safetensors files; for .gguf use `flexmoe import-gguf`; pickled weights are never read",
        )
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, Tensor] = {}
    place: dict[str, str] = {}
    for file in files:
        for name, tensor in read_file(folder / file).items():
            if name in tensors:
                raise ArtifactError(f"{folder}: the tensor {name!r} is in both {place[name]} and {file}", FETCH)
            tensors[name], place[name] = tensor, file
    for name in sorted({*(weight_map or place), *place}):
        expected = SINGLE if weight_map is None else weight_map.get(name)
        if expected != place.get(name):
            raise ArtifactError(
                f"{folder}: the tensor {name!r} is in {place.get(name)}, the index names {expected}", FETCH
            )
    return tensors


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """{name: Tensor} of one safetensors file; reads the header only. Raises ArtifactError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_TEXT_BYTES):
                raise ArtifactError(f"{path} has {size} bytes and a header of {length}", FETCH)
            header = parse_json(file.read(length).rstrip(b" "), path, MAX_TEXT_BYTES)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", FETCH) from error
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        tensor, begin, end = _tensor(path, name, entry, 8 + length)
        if begin != position:
            raise ArtifactError(f"{path}: the tensor {name!r} starts at byte {begin}, not at {position}", FETCH)
        tensors[name], position = tensor, end
    if 8 + length + position != size:
        raise ArtifactError(f"{path} has {size} bytes, its header accounts for {8 + length + position}", FETCH)
    return tensors


def write_tensors(folder: pathlib.Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[str]:
    """Writes {name: Tensor} as one file, or as an index and shards of at most `max_shard_bytes`; returns file names.

    A tensor larger than `max_shard_bytes` gets its own shard. Tensors are read one at a time.
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
    write_json(folder / INDEX, index)
    return [*names, INDEX]


def write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one new safetensors file, tensor by tensor."""
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
                raise AssertionError(f"{name}: {array.dtype} {array.shape} was declared as {tensors[name]}")
            file.write(array.reshape(-1).view(np.uint8).data)


def _tensor(path: pathlib.Path, name: str, entry: Any, data_begin: int) -> tuple[Tensor, int, int]:
    """(tensor, first byte, end) of one entry of a header; bytes count from `data_begin`, where the data starts."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = (*shape, begin, end)
        if not all(type(n) is int and n >= 0 for n in sizes) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(entry)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: the tensor {name!r} has the header entry {entry!r}", FETCH) from error
    if code not in DTYPES:
        raise ArtifactError(
            f"{path}: the tensor {name!r} has dtype {code}", f"give a checkpoint in one of {', '.join(DTYPES)}"
        )
    dtype, count = np.dtype(DTYPES[code]), math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise ArtifactError(f"{path}: the tensor {name!r} of shape {shape} has {end - begin} bytes", FETCH)

    def read() -> np.ndarray:
        return np.fromfile(path, dtype, count, offset=data_begin + begin).reshape(shape)

    return Tensor(dtype.name, shape, read), begin, end


def _offsets(entry: Any) -> tuple[int, ...]:
    """The data offsets of a header's entry as a sort key; () where it has none."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return tuple(n for n in offsets if type(n) is int) if isinstance(offsets, list) else ()


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and pathlib.PurePath(name).name == name
