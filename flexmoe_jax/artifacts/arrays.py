"""The arrays of one package as an Orbax checkpoint: one uncompressed file and one small header per tensor.

Written by Orbax's handler itself, which adds neither time nor path: the same arrays give the same bytes.
"""

import logging
import pathlib
from collections.abc import Mapping

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16
import numpy as np

from flexmoe_jax.artifacts.digest import parse_json, read_bytes
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.tree import flatten, unflatten

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2"}
_MAX_HEADER_BYTES = 1 << 16

logging.getLogger("absl").setLevel(logging.WARNING)


def tensor_file(path: str, shape: tuple[int, ...]) -> str:
    """Where the bytes of the tensor `path` lie inside a package."""
    return f"arrays/{path.replace('/', '.')}/{'.'.join('0' * len(shape))}"


def header_file(path: str) -> str:
    """Where the shape and dtype of the tensor `path` lie inside a package, for Orbax."""
    return f"arrays/{path.replace('/', '.')}/.zarray"


def save_arrays(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes {path: array} to the new directory `folder`."""
    from etils import epath

    folder.mkdir()
    handler = _handler()
    handler.save(epath.Path(folder.resolve()), args=_orbax().args.PyTreeSave(unflatten(arrays)))
    handler.close()


def load_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote; whatever Orbax cannot read is an ArtifactError. Check headers and files before."""
    from etils import epath

    handler = _handler()
    try:
        return {path: np.asarray(leaf) for path, leaf in flatten(handler.restore(epath.Path(folder.resolve()))).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} is no checkpoint that Orbax can read: {error}", "fetch it again") from error
    finally:
        handler.close()


def header_problem(package: pathlib.Path, path: str, shape: tuple[int, ...], dtype: str) -> str | None:
    """What is wrong with the header of a tensor, if anything: it decides how much memory Orbax allocates."""
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
        header = parse_json(read_bytes(package / header_file(path), _MAX_HEADER_BYTES), header_file(path))
    except ArtifactError as error:
        return error.what
    return None if header == expected else f"is {header}, must be {expected}"


def _handler():
    return _orbax().PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def _orbax():
    import orbax.checkpoint

    return orbax.checkpoint
