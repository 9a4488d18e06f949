"""Documents are the same however files are packed, and broken files are refused by name and line."""

import gzip
import io
import itertools
import json
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data import sources
from flexmoe_jax.data.sources import blend, content_digest, document_id, read_documents
from flexmoe_jax.errors import DataError

RECORDS = [{"text": f"Document {i}: größer\u2028än {i * 7}.", "source": "s", "license": "MIT"} for i in range(500)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zst(content: bytes, frames=1):
    size = -(-len(content) // frames)
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def parquet(records):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


PACKINGS = {
    "a.jsonl": LINES,
    "b.jsonl": LINES[:-1],  # no line break at the end
    "c.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),  # as Windows editors leave it
    "d.jsonl.gz": gzip.compress(LINES),
    "e.jsonl.gz": gzip.compress(LINES[:999]) + gzip.compress(LINES[999:]),
    "f.jsonl.zst": zst(LINES),
    "g.jsonl.zst": zst(LINES, frames=7),
    "h.parquet": parquet(RECORDS),
}


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_every_packing_gives_the_same_documents(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    plain, packed = write(tmp_path / "plain.jsonl", LINES), write(tmp_path / name, PACKINGS[name])
    assert [document.text for document in read_documents(packed)] == [record["text"] for record in RECORDS]
    assert content_digest(packed) == content_digest(plain)


def test_the_content_digest_depends_on_every_field_and_the_order(tmp_path):
    variants = [RECORDS, RECORDS[::-1], RECORDS[1:], [{**RECORDS[0], "license": "GPL"}, *RECORDS[1:]]]
    digests = {
        content_digest(write(tmp_path / f"{i}.jsonl", "\n".join(map(json.dumps, records)).encode()))
        for i, records in enumerate(variants)
    }
    assert len(digests) == len(variants)


def test_missing_fields_get_defaults_and_given_ones_are_kept(tmp_path):
    given_fields = {
        "text": "b",
        "source": "s",
        "license": "MIT",
        "group": "g",
        "split": "train",
        "id": 5,
        "domain": "d",
    }
    lines = [json.dumps({"text": "a", "license": None}), json.dumps(given_fields), json.dumps({"text": " \n"})]
    first, second = read_documents(write(tmp_path / "a.jsonl", "\n".join(lines).encode()))
    assert first == sources.Document("a", "", "unknown", document_id("a"), "train", document_id("a"), "")
    assert second == sources.Document("b", "s", "MIT", "g", "train", "5", "d")
    assert document_id("a") == "ca978112ca1bbdca"  # the start of the published sha256 of "a"


def test_folders_are_read_in_order_without_hidden_files(tmp_path):
    for name in ("b/one.txt", "a.txt", "b/.hidden.txt", ".git/x.txt", "notes.md", "b/a/two.txt"):
        write(tmp_path / name, name.encode())
    assert [document.text for document in read_documents(tmp_path)] == ["a.txt", "b/a/two.txt", "b/one.txt"]


def texts(path, split):
    return [document.text for document in read_documents(path, split)]


def test_a_domain_folder_is_split_by_file_name(tmp_path):
    write(tmp_path / "train.jsonl", b'{"text": "t", "split": "heldout"}')
    write(tmp_path / "heldout.jsonl", b'{"text": "h"}')
    assert (texts(tmp_path, "train"), texts(tmp_path, "heldout")) == (["t"], ["h"])
    assert [document.split for document in read_documents(tmp_path, "heldout")] == ["heldout"]


def test_a_users_folder_is_split_by_the_field(tmp_path):
    write(tmp_path / "x.jsonl", b'{"text": "1", "split": "heldout"}\n{"text": "2"}\n{"text": "3", "split": "dev"}')
    assert (texts(tmp_path, "train"), texts(tmp_path, "heldout")) == (["2", "3"], ["1"])


def test_training_never_reads_a_file_named_heldout(tmp_path):
    write(tmp_path / "x.jsonl", b'{"text": "1"}')
    write(tmp_path / "heldout.jsonl", b'{"text": "2"}')
    assert (texts(tmp_path, "train"), texts(tmp_path, "heldout")) == (["1"], ["2"])
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(DataError, match=r"no document of the split 'train'"):
        texts(tmp_path, "train")


BROKEN = {
    "not JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl, line 3 is not JSON"),
    "not an object": ("a.jsonl", b'["text"]', r"a\.jsonl, line 1 is a JSON list, not an object"),
    "nested too deep": ("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1 is not JSON"),
    "no text": ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', r"line 2 has no 'text'; its fields are body"),
    "text of another type": ("a.jsonl", b'{"text": 5}', r"line 1 has 'text' of type int"),
    "lone surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}', r"line 1: 'text' has a lone surrogate at character 2"),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', r"(?s)line 2 .*0xe4 at offset 24 .*iconv"),
    "text file not UTF-8": ("a.txt", b"\xef\xbb\xbfab\xff", r"(?s)a\.txt is not UTF-8: byte 0xff at offset 5 .*iconv"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz is truncated or damaged"),
    "not gzip": ("a.jsonl.gz", LINES, r"a\.jsonl\.gz is truncated or damaged"),
    "truncated zstandard": ("a.jsonl.zst", zst(LINES)[:-4], r"a\.jsonl\.zst is truncated or damaged: it ends in"),
    "truncated second frame": ("a.jsonl.zst", zst(LINES, 2)[:-4], r"a\.jsonl\.zst is truncated or damaged: it ends in"),
    "not zstandard": ("a.jsonl.zst", LINES, r"a\.jsonl\.zst is truncated or damaged"),
    "truncated Parquet": ("a.parquet", parquet(RECORDS)[:-100], r"a\.parquet is not a complete Parquet file"),
    "Parquet without text": ("a.parquet", parquet([{"texts": "a"}]), r"(?s)no column 'text'.*did you mean 'texts'"),
    "Parquet row without text": ("a.parquet", parquet([{"text": "a"}, {"text": None}]), r"row 2 has no 'text'"),
    "empty": ("a.jsonl", b"\n \n", r"is empty: no documents in 1 file"),
    "empty Parquet": ("a.parquet", b"", r"a\.parquet is not a complete Parquet file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name_and_place(tmp_path, case):
    name, content, message = BROKEN[case]
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path))


def test_wrong_paths_and_splits_are_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"(?s)holds no file of documents.*\.jsonl\.zst, \.parquet"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="ending"):
        read_documents(write(tmp_path / "a.csv", b"text\na"))
    with pytest.raises(DataError, match=r"(?s)no split 'held-out'.*did you mean 'heldout'"):
        read_documents(tmp_path, "held-out")


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match="one JSON object per line"):
        list(read_documents(write(tmp_path / "a.jsonl", b'[{"text": "a"},' * 500_000)))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_files_are_streamed(tmp_path, ending):
    records = [{"text": random.Random(i).randbytes(10_000).hex()} for i in range(2000)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    content = parquet(records) if ending == "parquet" else lines
    pack = {"jsonl.gz": lambda content: gzip.compress(content, 1), "jsonl.zst": zst}.get(ending, bytes)
    path = write(tmp_path / f"a.{ending}", pack(content))
    next(read_documents(path))  # so that imports are not measured
    tracemalloc.start()
    assert len(list(itertools.islice((len(d.text) for d in read_documents(path)), 500))) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # of 40 MB: a zstandard chunk or a batch of Parquet rows may be in memory


@given(st.lists(st.text(alphabet="ab\n", max_size=9)), st.integers(1, 5))
def test_lines_do_not_depend_on_the_chunks_they_arrive_in(pieces, size):
    content = "".join(pieces).encode()
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert (
        list(sources._lines(chunks, None))
        == io.BytesIO(content).read().removesuffix(b"\n").split(b"\n")[: None if content else 0]
    )


def test_a_blend_has_the_same_amount_of_every_folder_and_is_written_once(tmp_path):
    for name, count in (("a", 50), ("b", 7)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": name * 10}) for _ in range(count)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
    out = tmp_path / "mixed" / "train.jsonl"
    blend([tmp_path / "a", tmp_path / "b"], out)
    texts = [document.text for document in read_documents(out.parent)]
    assert texts == ["a" * 10] * 7 + ["b" * 10] * 7
    before = out.stat().st_mtime_ns
    blend([tmp_path / "b"], out)  # it exists: nothing is done
    assert out.stat().st_mtime_ns == before
