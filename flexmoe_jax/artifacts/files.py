"""Directories that appear whole or not at all, and locks."""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator

from flexmoe_jax.artifacts.digest import sha256_file, sync_directory
from flexmoe_jax.errors import ArtifactError


@contextlib.contextmanager
def new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `target` that becomes `target` by one rename when the block ends well.

    Everything in it is on disk before the rename. When the block raises, nothing is left; what a killed process left
    for the same `target` is removed. An existing `target` is refused, and a failing write is an ArtifactError.
    """
    target = pathlib.Path(target)
    if os.path.lexists(target):
        raise ArtifactError(f"{target} already exists", "give another path, or remove it first")
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in (p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.partial-")):
            with contextlib.suppress(ArtifactError), lock_directory(left):  # a living process holds its own
                shutil.rmtree(left)
        partial.mkdir()
        with lock_directory(partial):
            yield partial
            _sync_tree(partial)
            os.rename(partial, target)
            sync_directory(target.parent)
    except OSError as error:
        raise ArtifactError(f"{target} could not be written: {error}", "check free space and permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_file(
    source: pathlib.Path,
    target: pathlib.Path,
    sha256: str,
    link: bool = False,
    check: Callable[[bytes], None] = lambda chunk: None,
) -> None:
    """Copies (or hard-links) one regular file whose bytes have `sha256`; parent directories are made.

    `check` sees every chunk, and may raise. Memory: one chunk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        os.link(source, target, follow_symlinks=False)
        found = sha256_file(target, check)
    else:
        with open(target, "xb") as writer:
            found = sha256_file(source, check, writer.write)
    if found != sha256:
        raise ArtifactError(f"{source} has sha256 {found}, its manifest says {sha256}", "fetch it again")


def remove_directory(path: pathlib.Path) -> None:
    """Deletes the directory `path` and everything in it, durably; a missing one is fine, a link is refused.

    Only what lies directly in `path.parent`, opened once, is deleted: no link leads elsewhere.
    """
    if path.name in ("", "..") or path.parent == path:
        raise ArtifactError(f"{path} names no directory inside another", "give its own name")
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        shutil.rmtree(path.name, dir_fd=parent)
        os.fsync(parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be deleted: {error}", "look at what it is, and delete it yourself"
        ) from error
    finally:
        os.close(parent)


@contextlib.contextmanager
def lock_directory(path: pathlib.Path, file_name: str | None = None) -> Iterator[None]:
    """Holds the directory `path` exclusively; one that another process holds is refused by name.

    The lock is on the directory itself, or on `file_name` inside it, where the holder's process id is written.
    """
    try:
        if file_name is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(path / file_name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be used: {error.strerror}", "give a directory you may write to") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() if file_name else ""
            who = f"process {holder}" if holder else "another process"
            raise ArtifactError(f"{path} is in use by {who}", "wait until it ends, or stop it") from error
        if file_name is not None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _sync_tree(folder: pathlib.Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(pathlib.Path(parent))
