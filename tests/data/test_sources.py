"""Documents are the same however files are packed, and broken files are refused by name and line."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data import corpus, records, sources
from flexmoe_jax.data.records import Fields
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
    monkeypatch.setattr(records, "CHUNK_BYTES", chunk)
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


def test_the_content_digest_covers_the_text_whatever_its_id(tmp_path):
    digests = set()
    for text in ("one", "two"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "id": "1", "group": "1"}))
        digests.add(content_digest(tmp_path))
    assert len(digests) == 2


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
    write(tmp_path / "train.jsonl", b'{"text": "t"}')
    write(tmp_path / "heldout.jsonl", b'{"text": "h"}')
    assert (texts(tmp_path, "train"), texts(tmp_path, "heldout")) == (["t"], ["h"])
    assert [document.split for document in read_documents(tmp_path, "heldout")] == ["heldout"]


def test_a_users_folder_is_split_by_the_field(tmp_path):
    write(tmp_path / "x.jsonl", b'{"text": "1", "split": "heldout"}\n{"text": "2"}\n{"text": "3", "split": "dev"}')
    assert (texts(tmp_path, "train"), texts(tmp_path, "heldout")) == (["2"], ["1", "3"])


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
    with pytest.raises(DataError, match=r"(?s)holds no file of documents.*\.jsonl and .*\.parquet"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="ending"):
        read_documents(write(tmp_path / "a.csv", b"text\na"))
    with pytest.raises(DataError, match=r"(?s)no split 'held-out'.*did you mean 'heldout'"):
        read_documents(tmp_path, "held-out")


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match="one JSON object per line"):
        list(read_documents(write(tmp_path / "a.jsonl", b'[{"text": "a"},' * 500_000)))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_files_are_streamed(tmp_path, ending):
    rows = [{"text": random.Random(i).randbytes(10_000).hex()} for i in range(2000)]
    lines = "".join(json.dumps(record) + "\n" for record in rows).encode()
    content = parquet(rows) if ending == "parquet" else lines
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
        list(records._lines(chunks, None))
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


NAMES = {
    "data/train-00000-of-00001.parquet": "train",
    "data/validation-00000-of-00001.parquet": "heldout",
    "en/c4-validation.00000-of-00008.json.gz": "heldout",
    "dev.jsonl": "heldout",
    "held-out/a.jsonl": "heldout",
    "TEST/a.NDJSON": "heldout",
    "test/a/b/2023.jsonl": "heldout",
    "test/training/2023.jsonl": "train",
    "2023/notes.jsonl": None,
    "latest-contest-attestations.jsonl": None,
    "developers/evaluators.jsonl": None,
}


@pytest.mark.parametrize(("name", "split"), NAMES.items())
def test_the_split_of_a_file_is_that_of_the_nearest_word_in_its_name(name, split):
    assert corpus.split_of(name) == split
    assert corpus.is_documents(name)


def test_test_data_of_any_layout_never_trains(tmp_path):
    for name in NAMES:
        for at in (tmp_path / "all", tmp_path / name.replace("/", "_")):
            content = json.dumps({"text": name}).encode()
            path = write(at / name, parquet([{"text": name}]) if name.endswith(".parquet") else content)
            if name.endswith(".gz"):
                path.write_bytes(gzip.compress(content))
    held_out = {name for name, split in NAMES.items() if split == "heldout"}
    assert set(texts(tmp_path / "all", "train")) == {*NAMES} - held_out
    assert set(texts(tmp_path / "all", "heldout")) == held_out
    for name in held_out:
        with pytest.raises(DataError, match="no document of the split 'train', only files named for heldout"):
            texts(tmp_path / name.replace("/", "_"), "train")


@pytest.mark.parametrize("name", ["train-test-split.jsonl", "train+valid.jsonl", "a/test_training/x.jsonl"])
def test_a_name_of_both_splits_is_refused(tmp_path, name):
    write(tmp_path / name, b'{"text": "a"}')
    with pytest.raises(DataError, match=r"has words of both splits(.|\n)*rename it"):
        read_documents(tmp_path)


def test_a_field_that_contradicts_the_name_or_is_no_split_is_refused(tmp_path):
    one = write(tmp_path / "train.jsonl", b'{"text": "a"}\n{"text": "b", "split": "Test"}')
    with pytest.raises(DataError, match=r'line 2: its field "split" is \'Test\', the file is named for train'):
        list(read_documents(one))
    other = write(tmp_path / "x" / "a.jsonl", b'{"text": "a", "split": "fold 3"}')
    with pytest.raises(DataError, match=r'its field "split" is \'fold 3\'(.|\n)*give one of: train'):
        list(read_documents(other))


def test_every_file_that_is_passed_over_is_named_once(tmp_path, caplog):
    for name in ("a.jsonl", "b/c.JSONL.GZ", "LICENSE.txt", "mix.json", "b/x.csv", "b/no_ending", ".hidden.jsonl"):
        content = json.dumps({"text": name}).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith("GZ") else content)
    elsewhere = write(tmp_path.parent / f"{tmp_path.name}-linked" / "d.jsonl", b'{"text": "linked"}').parent
    (tmp_path / "linked").symlink_to(elsewhere)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    caplog.set_level("INFO", logger="flexmoe_jax")
    for _ in range(2):
        assert texts(tmp_path, "train") == ["a.jsonl", "b/c.JSONL.GZ", "linked"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 3 documents for train from 3 file(s): a.jsonl 1, b/c.JSONL.GZ 1, linked/d.jsonl 1",
        f"{tmp_path}: passed over: 4 file(s) (1 x .txt, 1 x no ending, 1 x .csv, 1 x .json): "
        "LICENSE.txt, b/no_ending, b/x.csv, mix.json",
    ]


@pytest.mark.parametrize("ending", ["json.gz", "ndjson", "jsonl.zstd", "jsonl.bz2", "ndjson.xz", "JSONL"])
def test_every_ending_of_json_lines_gives_the_same_documents(tmp_path, ending):
    pack = {"gz": gzip.compress, "zstd": zst, "bz2": bz2.compress, "xz": lzma.compress}.get(
        ending.split(".")[-1], bytes
    )
    plain, packed = write(tmp_path / "plain.jsonl", LINES), write(tmp_path / f"a.{ending}", pack(LINES))
    assert content_digest(packed) == content_digest(plain)
    if pack is not bytes:
        packed.write_bytes(pack(LINES)[:-9])
        with pytest.raises(DataError, match="is truncated or damaged"):
            list(read_documents(packed))


def test_other_fields_may_hold_text_and_id(tmp_path):
    rows = [{"content": "a", "doi": "10.1/x"}, {"content": "b", "doi": "10.1/y"}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    for path in (write(tmp_path / "a.jsonl", lines), write(tmp_path / "a.parquet", parquet(rows))):
        found = list(read_documents(path, fields=Fields("content", "doi")))
        assert [(d.text, d.id) for d in found] == [("a", "10.1/x"), ("b", "10.1/y")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    with pytest.raises(DataError, match=r"is a Git LFS pointer(.|\n)*git lfs pull"):
        list(read_documents(write(tmp_path / name, pointer)))


def test_a_long_text_file_is_read_in_parts_of_one_group(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "TEXT_BYTES", 1000)
    text = "".join(f"Zeile {i} größer\n" for i in range(300)) + "ß" * 2000
    found = list(read_documents(write(tmp_path / "a.txt", text.encode())))
    assert "".join(d.text for d in found) == text
    assert len({d.group for d in found}) == 1
    assert len(found) > 5
    assert max(len(d.text.encode()) for d in found) <= 1000
    short = list(read_documents(write(tmp_path / "b.txt", b"short")))
    assert [(d.text, d.group) for d in short] == [("short", document_id("short"))]


def test_a_long_text_file_is_not_held_in_memory(tmp_path):
    path = write(tmp_path / "a.txt", b"A line of forty characters, more or less\n" * 1_000_000)
    tracemalloc.start()
    total = sum(len(document.text) for document in read_documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == path.stat().st_size
    assert peak < 8 * records.TEXT_BYTES < total  # the bytes, their decoded form and the next read


def test_parquet_bytes_that_are_not_utf8_are_refused_with_their_row(tmp_path):
    bad = pyarrow.array([b"ab", b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    with pytest.raises(DataError, match=r"a.parquet, row 2 is not UTF-8"):
        list(read_documents(path))


def test_utf16_is_named(tmp_path):
    with pytest.raises(DataError, match=r"is UTF-16(.|\n)*iconv -f UTF-16"):
        list(read_documents(write(tmp_path / "a.jsonl", '{"text": "a"}'.encode("utf-16"))))
