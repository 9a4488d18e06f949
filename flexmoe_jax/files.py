"""Atomic writes of files and directories, locks, and digests of files.

The package writes its artifacts with these functions. A file or directory is written under a random hidden name beside
its place (`.NAME.partial-<8 hexadecimal digits>`), synced to the disk, and renamed. A reader sees the old content or
the new, never a part, also after a crash at any moment. Links that others put there are not followed.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flexmoe_jax.errors import ArtifactError, BusyError

CHUNK_BYTES = 1 << 20  # a multiple of every dtype's size
NOT_A_FILE = "a link, a special file, or a directory that is empty, unreadable or too deep"  # see `list_files`
MAX_DEPTH = 16  # of folders in a directory of ours; a package has 3, a checkpoint of Orbax 6
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
log = logging.getLogger(__name__)
_PARTIAL = re.compile(r"\.(.+)\.partial-[0-9a-f]{8}")


def write_bytes(path: pathlib.Path | str, content: bytes | Iterable[bytes]) -> None:
    """Writes the file `path`, durably and atomically; replaces a link or a file in its place without following it.

    `content` may come in parts: then only one part is in memory. ArtifactError if the write fails.
    """
    path = pathlib.Path(path)
    partial = _partial_name(path.name)
    try:
        with _opened(path.parent) as folder:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with open(os.open(partial, flags, 0o666, dir_fd=folder), "wb") as file:
                    file.writelines([content] if isinstance(content, bytes) else content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial, dir_fd=folder)
                raise
            _sync(folder)
    except OSError as error:
        raise ArtifactError(
            f"{_final(path)} cannot be written: {error.strerror or error}",
            "give a file in a directory that exists, and check free space and permissions",
        ) from error


def json_bytes(value: Any) -> bytes:
    """Readable JSON in UTF-8: sorted keys, two spaces, a newline at the end. Equal values give equal bytes.

    ValueError for NaN and infinity.
    """
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: pathlib.Path | str, value: Any) -> None:
    """Writes `json_bytes(value)`, durably and atomically. Errors as of `json_bytes` and `write_bytes`."""
    write_bytes(path, json_bytes(value))


def partial_of(name: str) -> str | None:
    """The final name of a partial file or directory `name`; None for other names."""
    match = _PARTIAL.fullmatch(name)
    return match and match[1]


def final_name(name: str) -> str:
    """The final name of `name`, which may be partial, or the partial of a partial that is not locked yet."""
    inner = partial_of(name)
    return name if inner is None else final_name(inner)


def remove_partial_files(folder: pathlib.Path) -> None:
    """Deletes partial files of interrupted writes in `folder`. Hold a lock: another process may be writing."""
    with _opened(folder) as descriptor:
        for entry in os.scandir(folder):
            if partial_of(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=descriptor)


def check_outside(path: pathlib.Path, folders: Iterable[pathlib.Path]) -> None:
    """ArtifactError if the new file or directory `path` would be inside one of `folders`, or is one of them."""
    for folder in folders:
        if path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{path} is inside {folder}", "give a path outside of it")


@contextlib.contextmanager
def new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `target` that becomes `target` by one rename when the block succeeds.

    Its content is synced to the disk before the rename. If the block raises, nothing is left. Partial directories that
    killed processes left for the same `target` are removed. ArtifactError if `target` exists or a write fails.
    """
    target = pathlib.Path(target)
    if os.path.lexists(target):
        raise ArtifactError(f"{target} already exists", "give another path, or remove it first")
    partial = target.with_name(_partial_name(target.name))
    unlocked = target.with_name(_partial_name(partial.name))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial_directories(target)
        unlocked.mkdir()
        with lock_directory(unlocked):
            os.rename(unlocked, partial)  # locked before it has this name: other processes delete unlocked ones
            yield partial
            _sync_tree(partial)
            os.rename(partial, target)
            sync_directory(target.parent)
    except OSError as error:
        what = f"{_final(target)} could not be written: {error.strerror or error}"
        raise ArtifactError(what, "check free space and permissions, or give a path on another disk") from error
    finally:
        for path in (unlocked, partial):
            shutil.rmtree(path, ignore_errors=True)


def copy_file(
    source: pathlib.Path,
    target: pathlib.Path,
    sha256: str,
    link: bool = False,
    check: Callable[[bytes], None] = lambda chunk: None,
) -> None:
    """Copies (or hard-links) one regular file whose bytes have `sha256`; creates parent directories.

    `check` is called with every chunk, and may raise. Only one chunk is in memory. ArtifactError for another sha256.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:  # another file system, or one without hard links
            _say_once(f"files are copied: they cannot be linked ({error.strerror})")
            link = False
    if link:
        found = sha256_file(target, check)
    else:
        with open(target, "xb") as writer:
            found = sha256_file(source, check, writer.write)
    if found != sha256:
        raise ArtifactError(f"{source} has sha256 {found}, its manifest says {sha256}", "fetch it again")


def remove_directory(path: pathlib.Path) -> None:
    """Deletes the directory `path` and everything in it, however deep, durably; does nothing if it is missing.

    `path.parent` is opened once and links are not followed. ArtifactError for a link, or if it cannot be deleted.
    """
    if path.name in ("", "..") or path.parent == path:
        raise ArtifactError(f"{path} names no directory inside another", "give its own name")
    try:
        with _opened(path.parent) as parent:
            with _opened(path.name, parent) as folder:
                _empty(folder)
            os.rmdir(path.name, dir_fd=parent)
            _sync(parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ArtifactError(f"{path} cannot be deleted: {error}", "look at it, and delete it yourself") from error


@contextlib.contextmanager
def lock_directory(path: pathlib.Path, file_name: str | None = None, wait: bool = False) -> Iterator[bool]:
    """Holds the directory `path` exclusively; ArtifactError if it cannot be used.

    While another process holds it: BusyError, or with `wait` nothing happens until it is free.

    The lock is on the directory itself, or on the file `file_name` inside it, which holds the process id of the holder.
    Yields whether it is held: on a file system without locks, as Lustre may be, it is not, and a line of the log asks
    the user to take care. A file that is not this directory's own, because it has other hard links, is refused.
    """
    try:
        if file_name is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(path / file_name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be used: {error.strerror}", "give a directory you may write to") from error
    try:
        status = os.fstat(descriptor)
        if file_name is not None and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1):
            what = f"{path / file_name} is a special file or has other hard links"
            raise ArtifactError(what, "delete it, if you trust this directory")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() if file_name else ""
            who = f"process {holder}" if holder else "another process"
            raise BusyError(f"{path} is in use by {who}", "wait until it ends, or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if partial_of(path.name) is None:  # partial directories have names that no other process takes
                _say_once(
                    f"{path} is on a file system without locks: use it with one process at a time "
                    "(on Lustre, the mount option flock adds locks)"
                )
            yield False
            return
        if file_name is not None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield True
    finally:
        os.close(descriptor)


def sync_directory(path: pathlib.Path) -> None:
    """Makes renames and deletions inside the directory `path` durable."""
    with _opened(path) as descriptor:
        _sync(descriptor)


def list_files(folder: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """({relative path: size in bytes} of the regular files under `folder`, relative paths of other entries).

    Other entries are links, devices, sockets, and directories that are empty, unreadable, or over `MAX_DEPTH` deep:
    none of them belongs in a directory of ours. Links are not followed. ArtifactError if `folder` cannot be read.
    """
    files: dict[str, int] = {}
    others: list[str] = []
    pending = [folder]
    while pending:
        parent = pending.pop()
        relative = parent.relative_to(folder)
        try:
            entries = [(entry, entry.stat(follow_symlinks=False)) for entry in os.scandir(parent)]
        except OSError as error:
            if parent == folder:
                raise ArtifactError(f"{folder} cannot be read: {error.strerror}", "give a directory") from error
            entries = []
        if parent != folder and (not entries or len(relative.parts) > MAX_DEPTH):
            others.append(relative.as_posix())
            continue
        for entry, status in entries:
            if stat.S_ISDIR(status.st_mode):
                pending.append(parent / entry.name)
            elif stat.S_ISREG(status.st_mode):
                files[(relative / entry.name).as_posix()] = status.st_size
            else:
                others.append((relative / entry.name).as_posix())
    return dict(sorted(files.items())), sorted(others)


def sha256_file(path: pathlib.Path, *consumers: Callable[[bytes], Any]) -> str:
    """sha256 (hex) of a regular file, read in chunks that each of `consumers` gets too. Links are not followed."""
    hasher = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
            for consume in consumers:
                consume(chunk)
    return hasher.hexdigest()


def digest_files(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """{relative path: {"size", "sha256"}} of the regular files under `folder`."""
    return {name: {"size": size, "sha256": sha256_file(folder / name)} for name, size in list_files(folder)[0].items()}


def default_cache() -> pathlib.Path:
    """The folder of downloads, built mixes and compiled programs: $FLEXMOE_CACHE, else ~/.cache/flexmoe.

    Without a writable home directory, as in some containers, it is a private folder in the system's temporary
    directory. ArtifactError if that folder belongs to another user: programs are run from it.
    """
    if given := os.environ.get("FLEXMOE_CACHE"):
        return pathlib.Path(given)
    with contextlib.suppress(RuntimeError):  # no $HOME, and the system does not know the user
        home = pathlib.Path.home()
        if os.access(home, os.W_OK) or (home / ".cache" / "flexmoe").is_dir():
            return home / ".cache" / "flexmoe"
    folder = pathlib.Path(tempfile.gettempdir(), f"flexmoe-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ArtifactError(f"{folder} is not a folder of this user only", "set FLEXMOE_CACHE to another folder")
    return folder


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)


def _final(path: pathlib.Path) -> pathlib.Path:
    """The path that a file inside partial directories is going to have, for messages."""
    return pathlib.Path(*(partial_of(part) or part for part in path.parts))


def _partial_name(name: str) -> str:
    return f".{name}.partial-{secrets.token_hex(4)}"


def _remove_partial_directories(target: pathlib.Path) -> None:
    """Deletes partial directories of `target` that killed processes left, but no links, and none in use."""
    for entry in os.scandir(target.parent):
        if partial_of(entry.name) == target.name and entry.is_dir(follow_symlinks=False):
            path = pathlib.Path(entry.path)
            with contextlib.suppress(ArtifactError), lock_directory(path) as locked:  # a running process holds its lock
                if locked:
                    remove_directory(path)


def _empty(folder: int) -> None:
    """Deletes everything in the open directory `folder`. Nested directories first move up into it: no depth is left."""
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=folder)
                continue
            with _opened(entry.name, folder) as nested:
                for inner in list(os.scandir(nested)):
                    if inner.is_dir(follow_symlinks=False):
                        os.rename(inner.name, secrets.token_hex(16), src_dir_fd=nested, dst_dir_fd=folder)
                    else:
                        os.unlink(inner.name, dir_fd=nested)
            os.rmdir(entry.name, dir_fd=folder)


@contextlib.contextmanager
def _opened(folder: pathlib.Path | str, parent: int | None = None) -> Iterator[int]:
    """A descriptor of the directory `folder`, which in an open directory `parent` may not be a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if parent is None else os.O_NOFOLLOW)
    descriptor = os.open(folder, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of directories
            raise


def _sync_tree(folder: pathlib.Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(pathlib.Path(parent))
