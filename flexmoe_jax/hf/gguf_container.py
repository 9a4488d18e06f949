"""The container of GGUF files: keys with values, and tensors. The package `gguf` undoes quantization.

Every count and length is compared with the bytes that are left before anything of that size is made. Numbers of arrays
stay in the memory-mapped file.
"""

import dataclasses
import math
import mmap
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.foreign import open_file, short
from flexmoe_jax.hf import foreign
from flexmoe_jax.hf.tensors import Tensor

DOWNLOAD = "download it again"
_VERSIONS = (2, 3)
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
_MAX_DIMENSIONS, _MAX_NAME = 4, 512
_MAX_TEXTS = 2 << 20  # tokens, merges and names: twice those of the largest vocabularies
_EXACT = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class _Damaged(ValueError):
    """What is wrong with the file, without its name."""


@dataclasses.dataclass
class _Reader:
    """A position in the bytes of a file, up to `end`, and how many strings may still come."""

    data: mmap.mmap
    end: int
    at: int = 0
    texts: int = _MAX_TEXTS

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.end - self.at:
            raise _Damaged(f"{count} bytes at byte {self.at} go beyond its header of at most {self.end}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        """The next number, of this NumPy type, as a Python number."""
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def text(self) -> str:
        """The next string; UnicodeDecodeError if it is not UTF-8."""
        if not self.texts:
            raise _Damaged(f"it holds over {_MAX_TEXTS} strings")
        self.texts -= 1
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def name(self) -> str:
        """The next string, which names a key or tensor."""
        name = self.text()
        if len(name) > _MAX_NAME or not name.isprintable():
            raise _Damaged(f"it has the name {short(name)}")
        return name

    def value(self) -> Any:
        """The next value with its type: a number, a string, a list of strings, or an array of numbers [n]."""
        kind = self.number("<u4")
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _Damaged(f"a value has the type {kind}")
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind != _TEXT or count > self.texts:
            raise _Damaged(f"a list has {count} values of the type {kind}")
        return [self.text() for _ in range(count)]


def read_container(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the keys with their values, {name: Tensor}) of one GGUF file; quantized tensors become float32 when read.

    `Tensor.stored` is the type that a tensor has in the file. Raises ArtifactError for a damaged file, ConfigError
    where the package `gguf` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("reading GGUF files needs the package gguf", "pip install 'flexmoe_jax[hf]'") from error
    with open_file(path, ArtifactError) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise ArtifactError(f"{path} is not a GGUF file", DOWNLOAD)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(data, min(size, foreign.LIMITS["header of GGUF"]), 4)
    try:
        return _read(reader, size)
    except (_Damaged, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", DOWNLOAD) from error


def _read(reader: _Reader, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if (version := reader.number("<u4")) not in _VERSIONS:
        raise _Damaged(f"it has the version {version}, this reads {_VERSIONS}")
    tensors, count = reader.number("<u8"), reader.number("<u8")
    fields: dict[str, Any] = {}
    for _ in range(count):  # ends at the end of the file at the latest
        if (name := reader.name()) in fields:
            raise _Damaged(f"the key {name!r} is given twice")
        fields[name] = reader.value()
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name, dimensions = reader.name(), reader.number("<u4")
        if name in found or dimensions > _MAX_DIMENSIONS:
            raise _Damaged(f"the tensor {name!r} is given twice, or has {dimensions} dimensions")
        shape = tuple(reader.number("<u8") for _ in range(dimensions))[::-1]
        found[name] = (reader.number("<u4"), shape, reader.number("<u8"))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _Damaged(f"its alignment is {short(alignment)}")
    begin = -(-reader.at // alignment) * alignment
    return fields, {name: _tensor(reader.data, name, *entry, begin, size) for name, entry in found.items()}


def _tensor(
    data: mmap.mmap, name: str, kind: int, shape: tuple[int, ...], offset: int, begin: int, size: int
) -> Tensor:
    """One tensor, whose bytes start `offset` bytes after `begin`; of `size` bytes of the file."""
    import gguf

    try:
        of_kind = gguf.GGMLQuantizationType(kind)
        numbers, stored = gguf.GGML_QUANT_SIZES[of_kind]  # of one block
    except (ValueError, KeyError) as error:
        raise _Damaged(f"the tensor {name!r} has the unknown type {kind}") from error
    count = math.prod(shape)
    nbytes = count // numbers * stored
    if (shape[-1] if shape else 1) % numbers or begin + offset + nbytes > size:
        raise _Damaged(f"the tensor {name!r} of shape {shape} and type {of_kind.name} goes beyond the file")
    exact = _EXACT.get(of_kind.name)

    def read() -> np.ndarray:
        raw = np.frombuffer(data, np.uint8, nbytes, begin + offset)
        if exact is not None:
            return np.array(raw.view(exact).reshape(shape))
        try:
            return gguf.dequantize(raw.reshape(*shape[:-1], -1), of_kind).reshape(shape)
        except NotImplementedError as error:
            what = f"the tensor {name!r} is quantized as {of_kind.name}, which the package gguf does not undo"
            raise ArtifactError(what, "give the model in another quantization, or not quantized") from error

    return Tensor("float32" if exact is None else exact.name, shape, read, of_kind.name)
