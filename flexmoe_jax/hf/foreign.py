"""Files that others made: links are followed, sizes are bounded, and JSON is counted before it is parsed.

Our own artifacts are sealed and read strictly (artifacts/sealed.py). A checkpoint of somebody else is read once and
copied: the Hugging Face cache keeps it as links, its tokenizer has megabytes, and a clone may hold pointers instead.
"""

import os
import pathlib
import re
import stat
from typing import Any, BinaryIO

from flexmoe_jax.artifacts.sealed import parse_json
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import is_sparse, refuse_pointer

# The longest of each kind in bytes: several times the longest that is published.
LIMITS = {
    "config.json": 4 << 20,  # exports of ours keep every owner's record in it
    "generation_config.json": 1 << 20,
    "adapter_config.json": 1 << 20,
    "model.safetensors.index.json": 32 << 20,
    "header of safetensors": 32 << 20,
    "header of GGUF": 128 << 20,
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 8 << 20,
}
MAX_VALUES = 4 << 20  # of one JSON file: each takes some 64 bytes of memory, and a file can state one in two bytes
FETCH = "fetch the checkpoint again from its source"
_HUB_ID = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/?")


def existing(path: pathlib.Path | str) -> pathlib.Path:
    """`path`, if it exists on this machine; ArtifactError says what to do with an id of the hub, or an address."""
    text = str(path)
    if os.path.lexists(text):
        return pathlib.Path(path)
    hub_id = _HUB_ID.fullmatch(text)
    if "://" in text and not hub_id:
        what = f"{text} is an address, and only paths on this machine are read and written"
        raise ArtifactError(what, "copy it to a local disk first, or mount it as a folder")
    remedy = f"give a path on this machine; relative paths start at {os.getcwd()}"
    if hub_id:
        remedy += f"; a model of the Hugging Face hub is downloaded first: hf download {hub_id[1]} --local-dir DIR"
    raise ArtifactError(f"{text} does not exist", remedy)


def open_file(path: pathlib.Path) -> BinaryIO:
    """A regular file, or what a link names, opened for reading.

    ArtifactError for anything else, for a file without content on the disk, and for a pointer of Git LFS.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        if path.is_symlink() and not path.exists():
            what = f"{path} is a link to {os.readlink(path)}, which does not exist"
        else:
            what = f"{path} cannot be read: {error.strerror}"
        raise ArtifactError(what, FETCH) from error
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is not a regular file", FETCH)
        if is_sparse(status):
            raise ArtifactError(f"{path} has {status.st_size} bytes, but almost no blocks on the disk", FETCH)
        refuse_pointer(file.read(64), path, ArtifactError)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of the file `path`, as long as LIMITS allows for its name. ArtifactError as of `open_file`."""
    limit = LIMITS[path.name]
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            what = f"{path} has {size} bytes, and a {path.name} has at most {limit}"
            raise ArtifactError(what, "give the checkpoint as it was published")
        return file.read(size)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the file `path`; ArtifactError as of `read_bytes` and `parse`."""
    return parse(read_bytes(path), path)


def parse(raw: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `raw`; ArtifactError for too many values and for what `parse_json` refuses."""
    if (count := sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))) > MAX_VALUES:
        raise ArtifactError(f"{where} holds some {count} values, more than {MAX_VALUES}", FETCH)
    try:
        return parse_json(raw, where, len(raw))
    except ArtifactError as error:
        raise ArtifactError(error.what, FETCH) from error


def short(value: object) -> str:
    """`repr(value)`, in messages about values that a stranger wrote: at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
