"""Safetensors files: strict reading, streamed writing.

The format is the header's length, a JSON header and raw bytes. It has no checksum, and other readers accept duplicate
names; here a header must account for every byte of its file exactly once. Reading and writing hold one tensor in
memory at a time, at any size of the checkpoint. For the same tensors, `write_tensors` writes the bytes of
`save_pretrained` of `transformers`.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np

from flexmoe_jax.artifacts.sealed import sha256_array
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import write_json
from flexmoe_jax.foreign import open_file, short
from flexmoe_jax.hf import foreign
from flexmoe_jax.hf.foreign import FETCH

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# {code in a header: numpy dtype}, in the order in which the reference writer stores tensors.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_READABLE = {**DTYPES, "F64": "float64"}  # some save rotary buffers, which are only compared, in double precision
_MAX_DIMENSIONS, _MAX_NAME = 8, 512


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint; `read` returns it as an array in memory, in C order.

    `stored` is the file in which it lies, or the type that it has in a GGUF file.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    stored: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def widest(dtypes: Iterable[str]) -> str:
    """The dtype of `DTYPES` that holds the values of all of `dtypes` exactly."""
    kinds = {*dtypes}
    return kinds.pop() if len(kinds) == 1 else "float32"


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit; one of them is in memory at a time."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and sha256_array(a.read()) == sha256_array(b.read())


def read_tensors(folder: pathlib.Path | str) -> dict[str, Tensor]:
    """{name: Tensor} of the checkpoint in `folder`: one `model.safetensors`, or the shards that its index names.

    Raises ArtifactError for a folder without safetensors files, or with both layouts and different tensors, for a dtype
    other than float32, bfloat16 and float16, a name that is in two files or not in the file that the index names, and
    a header that does not account for its file.
    """
    folder = pathlib.Path(folder)
    single, index = (os.path.lexists(folder / name) for name in (SINGLE, INDEX))
    if not index:
        if not single:
            raise _no_weights(folder)
        return read_file(folder / SINGLE)
    weight_map = foreign.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ArtifactError(f"{folder / INDEX} has no weight_map from tensors to file names", FETCH)
    if not single or {*weight_map.values()} == {SINGLE}:
        return _read_shards(folder, weight_map)
    whole = read_file(folder / SINGLE)
    try:
        problem = _difference(whole, _read_shards(folder, weight_map))
    except ArtifactError as error:
        problem = error.what
    if problem:
        raise ArtifactError(
            f"{folder} has both {SINGLE} and {INDEX}, and they are not the same weights: {problem}",
            f"keep one of the two: delete {INDEX} (transformers, too, reads {SINGLE}), or delete {SINGLE}",
        )
    return whole


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """{name: Tensor} of one safetensors file; reads the header only. Raises ArtifactError."""
    with open_file(path, ArtifactError) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        limit = foreign.LIMITS["header of safetensors"]
        if not 2 <= length <= min(size - 8, limit):
            raise ArtifactError(f"{path} has {size} bytes and a header of {length}", FETCH)
        header = foreign.parse(file.read(length).rstrip(b" "), path, limit)
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
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes) or len(entry) != 3:
            raise ValueError(entry)
        if len(shape) > _MAX_DIMENSIONS or len(name) > _MAX_NAME:
            raise ValueError(entry)
    except (TypeError, KeyError, ValueError) as error:
        what = f"{path}: the tensor {short(name)} has the header entry {short(entry)}"
        raise ArtifactError(what, FETCH) from error
    if not isinstance(code, str) or code not in _READABLE:
        what = f"{path}: the tensor {name!r} has dtype {code if isinstance(code, str) else short(code)}"
        raise ArtifactError(what, f"give a checkpoint in one of {', '.join(DTYPES)}")
    dtype, count = np.dtype(_READABLE[code]), math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise ArtifactError(f"{path}: the tensor {name!r} of shape {shape} has {end - begin} bytes", FETCH)

    def read() -> np.ndarray:
        return np.fromfile(path, dtype, count, offset=data_begin + begin).reshape(shape)

    return Tensor(dtype.name, shape, read, path.name), begin, end


def _read_shards(folder: pathlib.Path, weight_map: Mapping[str, str]) -> dict[str, Tensor]:
    """{name: Tensor} of the files of an index; each tensor must be in the file that it names, and in no other."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({*weight_map.values()}):
        for name, tensor in read_file(folder / file).items():
            if name in tensors:
                raise ArtifactError(
                    f"{folder}: the tensor {name!r} is in both {tensors[name].stored} and {file}", FETCH
                )
            tensors[name] = tensor
    for name in sorted({*weight_map, *tensors}):
        place = tensors[name].stored if name in tensors else None
        if weight_map.get(name) != place:
            what = f"{folder}: the tensor {short(name)} is in {place}, the index names {weight_map.get(name)}"
            raise ArtifactError(what, FETCH)
    return tensors


def _difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """The first difference between two checkpoints; None if they hold the same tensors, bit for bit."""
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            return f"only one of them has the tensor {name!r}"
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            return f"the tensor {name!r} is {a[name].dtype}{a[name].shape} and {b[name].dtype}{b[name].shape}"
        if not equal(a[name], b[name]):
            return f"they hold different numbers in the tensor {name!r}"
    return None


def _no_weights(folder: pathlib.Path) -> ArtifactError:
    """What is wrong with a folder that has neither of the two layouts, and what to do with what it has."""
    names = sorted(path.name for path in folder.iterdir())
    found = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".safetensors", ".gguf"))]
    remedy = "give a folder of safetensors files"
    if any(n.endswith(".safetensors") for n in found):
        remedy = f"download {INDEX} too: it says which tensor is in which file"
    elif any(n.endswith(".gguf") for n in found):
        remedy = "import the .gguf file with `flexmoe import-gguf`"
    elif found:
        remedy = (
            "pickled weights are never read: a pickle can run code. If you trust its source, convert it with "
            f"transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')"
        )
    return ArtifactError(
        f"{folder} has neither {SINGLE} nor {INDEX} (it has: {short(found) if found else 'no weights'})", remedy
    )


def _offsets(entry: Any) -> tuple[int, ...]:
    """The data offsets of a header's entry as a sort key; () where it has none."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return tuple(n for n in offsets if type(n) is int) if isinstance(offsets, list) else ()


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and pathlib.PurePath(name).name == name
        and name.isprintable()
    )
