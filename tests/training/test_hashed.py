"""A start hashes the data once: later ones read only files that changed, and `verify` always reads everything."""

import dataclasses
import pathlib
import shutil

import pytest

from flexmoe_jax.compose.verify import verify
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import DataError
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training import hashed, loop, resume
from flexmoe_jax.training.start import prepare
from tests.tiny import expert_run, flip_bit, write_documents


@pytest.fixture
def opened(world, tmp_path, monkeypatch):
    """(run, function that opens its data as a start does and returns (digests, number of bytes that were hashed))."""
    run = expert_run(tmp_path, "news", world / "public" / "run" / "model")
    initial, count = prepare(run, mesh_of_one()), [0]

    def digest_of_file(path, *args, compute=hashed.sha256_file):
        count[0] += path.stat().st_size
        return compute(path, *args)

    def digest_of_documents(path, *args, compute=resume.content_digest, **kwargs):
        count[0] += sum(file.stat().st_size for file in pathlib.Path(path).iterdir())
        return compute(path, *args, **kwargs)

    monkeypatch.setattr(hashed, "sha256_file", digest_of_file)
    monkeypatch.setattr(resume, "content_digest", digest_of_documents)

    def start(run):
        pathlib.Path(run.out).mkdir(exist_ok=True)
        count[0] = 0
        stores, documents = loop._open_data(run, initial, pathlib.Path(run.out), started=True)
        return (stores["own"].digest, documents["own"]), count[0]

    return run, start


def data_of(kind: str, run, folder: pathlib.Path) -> pathlib.Path:
    """The run's documents as data of this kind."""
    if kind == "documents":
        return write_documents(folder, "news")
    write_store(read_documents(run.data), load_tokenizer("cl100k:512"), folder)
    if kind == "olmo":
        (folder / "index.json").unlink()
    return folder


@pytest.mark.parametrize("kind", ["documents", "store", "olmo"])
def test_a_second_start_hashes_no_byte_and_a_changed_file_is_hashed_again(opened, tmp_path, kind):
    run, start = opened
    folder = data_of(kind, run, tmp_path / "data")
    run = dataclasses.replace(run, data=str(folder))
    first, read = start(run)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "index.json")
    tokens = pathlib.Path(run.out) / "tokens" / "part-00000.npy"
    assert read == size + (tokens.stat().st_size if kind == "documents" else 0)
    assert start(run) == (first, 0)
    file = next(file for file in folder.iterdir() if file.name != "index.json")
    if kind == "documents":
        file.write_text(file.read_text().replace("minister", "ministry", 1))
        again, read = start(run)
        assert read == size
        assert again[1] != first[1]
    elif kind == "olmo":
        flip_bit(file, 1000)
        again, read = start(run)
        assert read == size
        assert again[0] != first[0]
    else:
        flip_bit(file, 1000)
        with pytest.raises(DataError, match="altered"):
            start(run)


def test_a_copied_file_and_a_damaged_memory_are_hashed_again(opened):
    run, start = opened
    first, read = start(run)
    assert start(run) == (first, 0)
    file = next(pathlib.Path(run.data).iterdir())
    shutil.copy2(file, file.with_suffix(".new"))  # the same size and time, another inode
    file.with_suffix(".new").rename(file)
    assert start(run) == (first, file.stat().st_size)
    for damaged in ("[]", "{", '{"documents": 3}'):
        (pathlib.Path(run.out) / "hashed.json").write_text(damaged)
        assert start(run) == (first, read)


def test_verify_reads_all_tokens_of_a_run_and_of_a_store(opened):
    """Also where size, time and inode are those of the start: it remembers nothing."""
    run, start = opened
    start(run)
    out = pathlib.Path(run.out)
    (out / "checkpoints").mkdir()
    part = out / "tokens" / "part-00000.npy"
    assert next(check for check in verify(out) if check.subject == "tokens/part-00000.npy").ok
    assert [check.ok for check in verify(out / "tokens")] == [True]
    flip_bit(part, 1000)
    for path, name in ((out, "tokens/part-00000.npy"), (out / "tokens", "part-00000.npy")):
        (check,) = (check for check in verify(path) if check.subject == name)
        assert not check.ok
        assert "altered" in check.detail
        assert all(check.ok for check in verify(path, quick=True) if check.subject == name)
