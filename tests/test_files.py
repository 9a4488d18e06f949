"""Files and directories appear whole or not at all, and a failed write is an error that the user can fix."""

import pathlib

import pytest

from flexmoe_jax import files
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import new_directory, write_bytes, write_json


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
