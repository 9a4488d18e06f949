"""A start hashes the data once: later ones read only files that changed, and `verify` always reads everything."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest

from flexmoe_jax.compose.verify import verify
from flexmoe_jax.data import store
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

    def digest_of_file(path, *args, compute=store.sha256_file):
        count[0] += path.stat().st_size
        return compute(path, *args)

    def digest_of_documents(path, *args, compute=resume.content_digest, **kwargs):
        count[0] += sum(file.stat().st_size for file in pathlib.Path(path).iterdir())
        return compute(path, *args, **kwargs)

    monkeypatch.setattr(store, "sha256_file", digest_of_file)
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


def spread(kind: str, folder: pathlib.Path, count: int) -> None:
    """Copies the data's file until there are `count`; the names of documents are not UTF-8."""
    (file,) = (file for file in folder.iterdir() if file.name != "index.json")
    for number in range(1, count):
        if kind == "documents":
            (folder / os.fsdecode(b"\xff%d.jsonl" % number)).write_text('{"text": "minister"}\n', encoding="utf-8")
        else:
            shutil.copy(file, folder / f"part-{number:05d}.npy")
    if kind == "store":
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        index["files"] = [index["files"][0] | {"name": f"part-{number:05d}.npy"} for number in range(count)]
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("kind", ["documents", "store", "olmo"])
def test_many_files_of_any_name_are_remembered_in_a_line_per_source(opened, tmp_path, kind):
    """2 MiB of JSON are read back: a row for each file would end the memory of a run with many."""
    run, start = opened
    folder = data_of(kind, run, tmp_path / os.fsdecode(b"data\xff"))
    spread(kind, folder, 30)
    run = dataclasses.replace(run, data=str(folder))
    first, read = start(run)
    assert read > 0
    assert start(run) == (first, 0)
    assert (pathlib.Path(run.out) / "hashed.json").stat().st_size < 1000


@pytest.mark.parametrize("kind", ["documents", "store", "olmo"])
def test_a_process_with_another_copy_of_the_data_is_refused(opened, tmp_path, monkeypatch, kind):
    """Process 0 has the data; process 1 has another size, or a store of another index whose sizes are the same."""
    run, start = opened
    folder = data_of(kind, run, tmp_path / "data")
    run = dataclasses.replace(run, data=str(folder))
    said: list[bytes] = []
    monkeypatch.setattr(hashed, "gather", lambda value: [said.append(value) or value])
    first, _ = start(run)
    for module in (hashed, loop):
        monkeypatch.setattr(module, "is_lead", lambda: False)
    lead = iter(said * 2)
    monkeypatch.setattr(hashed, "gather", lambda value: [next(lead), value])
    assert start(run) == (first, 0)  # the same copy
    if kind == "store":
        index = (folder / "index.json").read_text(encoding="utf-8")
        (sha256,) = (file["sha256"] for file in json.loads(index)["files"])
        (folder / "index.json").write_text(index.replace(sha256, "0" * 64), encoding="utf-8")
    else:
        with next(folder.iterdir()).open("ab") as file:
            file.write(b"\n\n")
    with pytest.raises(DataError, match=r"process 1 has \d+ file.*, process 0 \d+ file") as refusal:
        start(run)
    assert "the same on every host" in refusal.value.remedy


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
