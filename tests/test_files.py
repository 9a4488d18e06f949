"""Files and directories appear whole or not at all, and a failed write is an error that the user can fix."""

import errno
import os
import pathlib
import subprocess

import pytest

from flexmoe_jax import files
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import list_files, new_directory, remove_directory, write_bytes, write_json
from tests.artifacts.model_attacks import DEPTHS, deep


def test_content_in_parts_is_written_as_their_concatenation(tmp_path):
    write_bytes(tmp_path / "a", (part for part in (b"one ", b"", b"two")))
    assert (tmp_path / "a").read_bytes() == b"one two"


def test_a_write_that_fails_halfway_leaves_the_old_content_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def parts():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"(?s)a cannot be written: No space left.*remedy"):
        write_bytes(tmp_path / "a", parts())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_writing_into_a_missing_directory_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ArtifactError, match=r"(?s)nowhere/a cannot be written: No such file.*a directory that exists"):
        write_bytes(tmp_path / "nowhere" / "a", b"")


def test_json_is_sorted_utf8_without_nan(tmp_path):
    write_json(tmp_path / "a", {"b": "é日", "a": 1.5})
    assert (tmp_path / "a").read_bytes() == '{\n  "a": 1.5,\n  "b": "é日"\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"a": float("nan")})


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a loss of power a renamed file that was not synced may be empty."""
    done = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), fsync(fd)))
    rename = os.rename
    replace = os.replace
    monkeypatch.setattr(os, "rename", lambda a, b, **how: (done.append(f"{b}"), rename(a, b, **how)))
    monkeypatch.setattr(os, "replace", lambda a, b, **how: (done.append(f"{b}"), replace(a, b, **how)))
    write_bytes(tmp_path / "a", b"content")
    assert done.index((tmp_path / "a").stat().st_ino) < done.index("a") < done.index(tmp_path.stat().st_ino)
    done.clear()
    with new_directory(tmp_path / "b") as partial:
        (partial / "c").mkdir()
        (partial / "c" / "file").write_text("content")
    renamed = done.index(str(tmp_path / "b"))
    for path in (tmp_path / "b", tmp_path / "b" / "c", tmp_path / "b" / "c" / "file"):
        assert done.index(path.stat().st_ino) < renamed
    assert done.index(tmp_path.stat().st_ino, renamed) > renamed


def test_a_link_or_file_under_the_name_of_a_partial_file_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "victim").write_text("mine")
    partial = tmp_path / ".a.partial-00000000"
    for plant in (lambda: partial.symlink_to(tmp_path / "victim"), lambda: os.link(tmp_path / "victim", partial)):
        plant()
        with pytest.raises(ArtifactError, match="a cannot be written"):
            write_bytes(tmp_path / "a", b"content")
        assert (tmp_path / "victim").read_text() == "mine"
        partial.unlink(missing_ok=True)
    partial.symlink_to(tmp_path / "nowhere")  # O_EXCL alone follows no link, but other systems' O_CREAT does
    with pytest.raises(ArtifactError, match="a cannot be written"):
        write_bytes(tmp_path / "a", b"content")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("depth", DEPTHS)
def test_any_depth_is_listed_as_foreign_and_deleted(tmp_path, depth):
    folder = tmp_path / "deep"
    deep("deep", *DEPTHS[depth])(tmp_path)
    (folder / "file").write_text("x")
    try:
        found, others = list_files(folder)
        assert found == {"file": 1}
        assert len(others) == 1
        remove_directory(folder)
        assert [*tmp_path.iterdir()] == []
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)  # pytest cannot delete it


def test_deletion_follows_no_link(tmp_path):
    (tmp_path / "victim" / "inner").mkdir(parents=True)
    (tmp_path / "victim" / "file").write_text("mine")
    for place in ("gone/a", "gone/b/c"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "gone" / "link").symlink_to(tmp_path / "victim")
    remove_directory(tmp_path / "gone")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(ArtifactError, match="link cannot be deleted"):
        remove_directory(tmp_path / "link")
    remove_directory(tmp_path / "missing" / "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "inner", "link", "victim"]


def test_a_directory_that_another_process_has_made_but_not_yet_locked_is_not_removed(tmp_path, monkeypatch):
    target, lock = tmp_path / "target", files.lock_directory

    def lock_after_a_sweep(path: pathlib.Path):
        monkeypatch.setattr(files, "lock_directory", lock)
        with new_directory(target):  # another process makes the same directory at this moment
            pass
        target.rmdir()
        return lock(path)

    monkeypatch.setattr(files, "lock_directory", lock_after_a_sweep)
    with new_directory(target) as partial:
        (partial / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "file"]


# -- file systems that lack something ----------------------------------------------------------------------------------


def refusing(number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def no_locks(monkeypatch):
    files._say_once.cache_clear()
    monkeypatch.setattr(files.fcntl, "flock", refusing(errno.ENOSYS))  # Lustre, mounted without -o flock


def test_without_locks_a_directory_is_used_with_a_warning(no_locks, tmp_path, caplog):
    for _ in range(2):
        with files.lock_directory(tmp_path, ".lock") as locked:
            assert not locked
    [said] = caplog.messages
    assert said.startswith(f"{tmp_path} is on a file system without locks: use it with one process at a time")


def test_without_locks_new_directories_are_made_and_partial_ones_of_others_stay(no_locks, tmp_path, caplog):
    """Nothing tells whether their process still runs."""
    other = tmp_path / ".target.partial-00000000"
    other.mkdir()
    with new_directory(tmp_path / "target") as partial:
        (partial / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".target.partial-00000000", "file", "target"]
    assert caplog.messages == []


def test_another_error_of_the_lock_is_not_taken_for_a_file_system_without_locks(monkeypatch, tmp_path):
    monkeypatch.setattr(files.fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), files.lock_directory(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_where_files_cannot_be_linked_they_are_copied_and_checked(number, tmp_path, monkeypatch, caplog):
    files._say_once.cache_clear()
    monkeypatch.setattr(os, "link", refusing(number))  # exFAT, many FUSE mounts, another disk
    (tmp_path / "a").write_bytes(b"content")
    sha256 = files.sha256_file(tmp_path / "a")
    files.copy_file(tmp_path / "a", tmp_path / "b", sha256, link=True)
    assert (tmp_path / "b").read_bytes() == b"content"
    assert "files are copied: they cannot be linked" in caplog.text
    with pytest.raises(ArtifactError, match="its manifest says"):
        files.copy_file(tmp_path / "a", tmp_path / "c", "0" * 64, link=True)


def test_directories_that_cannot_be_synced_are_written_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def sync(descriptor: int) -> None:  # gcsfuse, some SMB servers
        refusing(errno.EINVAL)() if files.stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with new_directory(tmp_path / "a" / "b") as partial:
        write_bytes(partial / "file", b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"


def test_a_failed_write_inside_another_new_directory_names_the_final_place(tmp_path):
    with (
        pytest.raises(ArtifactError, match=f"{tmp_path / 'model' / 'news'} could not be written: No space left"),
        new_directory(tmp_path / "model") as model,
        new_directory(model / "news"),
    ):
        refusing(errno.ENOSPC)()
    assert not list(tmp_path.iterdir())
