"""The arrays of one package as an Orbax checkpoint: one uncompressed file and one small header per tensor.

Orbax's handler, used directly, writes neither times nor paths: the same arrays give the same bytes.
"""

import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.tree import unflatten

NUMPY_DTYPES = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in NUMPY_DTYPES.items()}
METADATA_FILE = "arrays/_METADATA"
MAX_HEADER_BYTES = 1 << 16
_ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2"}

logging.getLogger("absl").setLevel(logging.WARNING)


def tensor_file(path: str, shape: tuple[int, ...]) -> str:
    """The path, relative to the package, of the file with the bytes of the tensor `path`."""
    return f"arrays/{path.replace('/', '.')}/{'.'.join('0' * len(shape))}"


def header_file(path: str) -> str:
    """The path, relative to the package, of the file in which Orbax keeps shape and dtype of the tensor `path`."""
    return f"arrays/{path.replace('/', '.')}/.zarray"


def save_arrays(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes {path: array} to the new directory `folder`; dtypes of `NUMPY_DTYPES`. OSError if the system refuses."""
    from etils import epath

    folder.mkdir()
    handler = _handler()
    try:
        handler.save(epath.Path(folder.resolve()), args=_orbax().args.PyTreeSave(unflatten(arrays)))
    except ValueError as error:
        raise system_error(error) or error from error
    finally:
        handler.close()


def system_error(error: Exception) -> OSError | None:
    """The error of the operating system that TensorStore states in the text of a ValueError; None if there is none."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def load_array(package: pathlib.Path, path: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The tensor `path` that `save_arrays` wrote, read without Orbax: its file holds exactly its bytes.

    Check headers and sizes beforehand: this allocates an array of `shape`. ArtifactError if the file is too short.
    """
    array = np.empty(shape, NUMPY_DTYPES[dtype])
    with open(package / tensor_file(path, shape), "rb") as file:
        if file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[arg-type]
            what = f"{package / tensor_file(path, shape)} has fewer than the {array.nbytes} bytes of its tensor"
            raise ArtifactError(what, "fetch the package again from its owner")
    return array


def map_array(package: pathlib.Path, path: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The tensor `path` as a read-only memory-mapped file: only the slices that are used are read."""
    return np.memmap(package / tensor_file(path, shape), NUMPY_DTYPES[dtype], "r", shape=shape)


def not_finite(chunk: bytes, dtype: str) -> int:
    """The number of NaN and infinite values among the little-endian numbers in `chunk`."""
    return int((~np.isfinite(np.frombuffer(chunk, NUMPY_DTYPES[dtype]))).sum())


def metadata_problem(package: pathlib.Path) -> str | None:
    """What is wrong with the file in which Orbax keeps the tree; None if nothing is."""
    try:
        parse_json(read_bytes(package / METADATA_FILE, MAX_HEADER_BYTES), METADATA_FILE)
    except ArtifactError as error:
        return error.what
    return None


def header_problem(package: pathlib.Path, path: str, shape: tuple[int, ...], dtype: str) -> str | None:
    """What is wrong with the header of a tensor, which decides how much memory Orbax allocates; None if nothing is."""
    expected = {
        "chunks": list(shape),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _ZARR_DTYPES[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    try:
        header = parse_json(read_bytes(package / header_file(path), MAX_HEADER_BYTES), header_file(path))
    except ArtifactError as error:
        return error.what
    return None if header == expected else f"is {header}, must be {expected}"


def _handler() -> Any:
    return _orbax().PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def _orbax() -> Any:
    import orbax.checkpoint

    return orbax.checkpoint
