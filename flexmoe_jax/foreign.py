"""Files that others made: links are followed, sizes are bounded, and JSON is counted before it is parsed.

Our own artifacts are sealed and read strictly (artifacts/sealed.py). A file of somebody else is read once and copied:
the Hugging Face cache keeps it as links, a tokenizer has megabytes, and a clone may hold a pointer in its place.
"""

import errno
import os
import pathlib
import stat
from typing import BinaryIO

from flexmoe_jax.errors import FlexMoEError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FETCH = "fetch it again from its source"
# Values of JSON in one file: one for so many of the longest file's bytes. Each takes some 64 bytes of memory, and a
# hostile file can hold one in two bytes.
_BYTES_PER_VALUE = 16


def open_file(path: pathlib.Path, error: type[FlexMoEError]) -> BinaryIO:
    """A regular file, or what a link names, opened for reading.

    Raises `error` for anything else, for a file without content on the disk, and for a pointer of Git LFS.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as reason:
        what = f"{path} cannot be read: {reason.strerror}"
        if reason.errno == errno.ENOENT:
            link = f" is a link to {short(os.readlink(path))}, which" if path.is_symlink() else ""
            what = f"{path}{link} does not exist"
        raise error(what, f"{_FETCH}, or repair its permissions") from reason
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file", _FETCH)
        if is_sparse(status):
            raise error(f"{path} has {status.st_size} bytes, but almost no blocks on the disk", _FETCH)
        refuse_pointer(file.read(64), path, error)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: pathlib.Path, limit: int, error: type[FlexMoEError]) -> bytes:
    """The content of a file of at most `limit` bytes. Raises `error` for a longer one, and as `open_file` does."""
    with open_file(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            what = f"{path} has {size} bytes, and a {path.name} has at most {limit}"
            raise error(what, "give the file as it was published")
        return file.read(size)


def check_count(raw: bytes, where: object, limit: int, error: type[FlexMoEError]) -> None:
    """Raises `error` for JSON with too many values for a file of at most `limit` bytes: before it is parsed."""
    count, most = sum(raw.count(mark) for mark in (b",", b":", b"[", b"{")), limit // _BYTES_PER_VALUE
    if count > most:
        raise error(f"{where} holds some {count} values, more than {most}", "give the file as it was published")


def refuse_pointer(head: bytes, path: pathlib.Path, error: type[FlexMoEError]) -> None:
    """Raises `error` if `head`, the first bytes of `path`, are those of a pointer of Git LFS, not of the file."""
    if head.startswith(_LFS_POINTER):
        raise error(f"{path} is a Git LFS pointer, not the file", "run `git lfs pull` in its repository")


def is_sparse(status: os.stat_result) -> bool:
    """Whether a file of over 64 MiB has far fewer blocks than bytes: cheap to send, hours to read."""
    return status.st_size > 64 << 20 and status.st_blocks * 512 * 16 < status.st_size


def short(value: object) -> str:
    """`repr(value)`, in messages about values that a stranger wrote: at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
