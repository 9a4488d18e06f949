"""A store returns exactly the documents' tokens at any offset, and detects anything altered or not matching."""

import functools
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data import writer
from flexmoe_jax.data.store import TokenStore, kind_of
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import ArtifactError, DataError
from tests.faults.hostile import limits
from tests.tokenizers import sentencepiece

TEXTS = ["The first document.\n", "Le deuxième, 日本語", "", "third <|endoftext|> not an end", "x = 1\n" * 50]


@functools.cache
def tokenizer():
    return load_tokenizer("cl100k:1024")


def expected_tokens(texts):
    return [i for text in texts for i in (*tokenizer().encode(text), tokenizer().eos_id)]


@pytest.fixture
def path(tmp_path):
    write_store(TEXTS, tokenizer(), tmp_path / "store")
    return tmp_path / "store"


def test_files_are_raw_little_endian_tokens_with_an_end_after_each_document(path):
    raw = np.fromfile(path / "part-00000.npy", "<u2")
    assert raw.tolist() == expected_tokens(TEXTS)
    assert (raw == tokenizer().eos_id).sum() == len(TEXTS)
    assert sorted(p.name for p in path.iterdir()) == ["index.json", "part-00000.npy"]


def test_an_opened_store_states_its_documents_bytes_and_tokenizer(path):
    store = TokenStore.open(path, tokenizer())
    assert store.num_tokens == len(expected_tokens(TEXTS))
    assert (store.documents, store.text_bytes) == (len(TEXTS), sum(len(t.encode()) for t in TEXTS))
    assert (store.eos_id, store.vocab_size, store.tokenizer_digest) == (1022, 1024, tokenizer().digest)


def test_a_window_with_an_id_beyond_the_vocabulary_is_refused():
    store = TokenStore((np.array([1, 2, 9, 3], "<u2"),), np.array([0, 4]), eos_id=1, vocab_size=10)
    assert store.window(0, 3).tolist() == [1, 2, 9, 3]
    with pytest.raises(DataError, match="hold the id 9, the tokenizer has 9 ids"):
        TokenStore(store.parts, store.starts, eos_id=1, vocab_size=9).window(0, 3)


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    big = load_tokenizer("dolma2")
    store = write_store(TEXTS, big, tmp_path / "store")
    raw = np.fromfile(tmp_path / "store" / "part-00000.npy", "<u4")
    assert raw.tolist() == [i for t in TEXTS for i in (*big.encode(t), big.eos_id)]
    assert store.window(0, 8).tolist() == raw[:9].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=30), min_size=1, max_size=6), st.integers(1, 12))
def test_any_window_over_any_files_is_the_slice_of_their_concatenation(tmp_path_factory, files, length):
    folder = tmp_path_factory.mktemp("olmo")
    for tokens in files:
        tokens.append(7)  # an end of document in every file, as OLMo writes
    for number, tokens in enumerate(files):
        np.array(tokens, "<u2").tofile(folder / f"part-{number:05d}.npy")
    whole = np.concatenate(files)
    store = TokenStore.from_olmo(folder, "uint16", 7)
    assert store.num_tokens == len(whole)
    if len(whole) <= length:
        with pytest.raises(DataError, match=f"{len(whole)} tokens are too few for one window of {length}"):
            store.num_windows(length)
        return
    assert store.num_windows(length) == (len(whole) - 1) // length
    for i in reversed(range(store.num_windows(length))):
        window = store.window(i, length)
        assert window.dtype == np.int32
        np.testing.assert_array_equal(window, whole[i * length : (i + 1) * length + 1])
    with pytest.raises(IndexError):
        store.window(store.num_windows(length), length)


def test_many_files_and_batches_hold_the_same_tokens_as_one(tmp_path, monkeypatch):
    texts = TEXTS * 20
    monkeypatch.setattr(writer, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(writer, "TOKENS_PER_FILE", 100)
    store = write_store(iter(texts), tokenizer(), tmp_path / "store", total=len(texts))
    assert len(store.parts) > 5
    assert np.concatenate(store.parts).tolist() == expected_tokens(texts)
    assert TokenStore.open(tmp_path / "store").documents == len(texts)


def test_olmo_files_may_be_listed_in_the_callers_order(tmp_path):
    for name, tokens in {"a": [1, 2, 9], "b": [3, 9]}.items():
        np.array(tokens, "<u4").tofile(tmp_path / name)
    store = TokenStore.from_olmo([tmp_path / "b", tmp_path / "a"], "uint32", 9)
    assert store.window(0, 4).tolist() == [3, 9, 1, 2, 9]


@pytest.mark.parametrize(("dtype", "eos_id"), [("uint16", 70_000), ("uint32", 5), ("int64", 70_000)])
def test_a_wrong_dtype_or_end_id_of_olmo_files_is_refused(tmp_path, dtype, eos_id):
    np.array([1, 2, 70_000, 3, 70_000], "<u4").tofile(tmp_path / "part-0.npy")
    with pytest.raises(DataError, match="remedy"):
        TokenStore.from_olmo(tmp_path, dtype, eos_id)


def test_numpy_headers_are_refused(tmp_path):
    np.save(tmp_path / "part-0.npy", np.array([1, 2, 3], "<u2"))
    with pytest.raises(DataError, match="NumPy header"):
        TokenStore.from_olmo(tmp_path, "uint16", 2)


@pytest.mark.parametrize("documents", [[], ["fine", "broken \ud800"]])
def test_a_failed_write_leaves_nothing(tmp_path, documents):
    with pytest.raises(DataError):
        write_store(documents, tokenizer(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BATCH_DOCUMENTS", 1)

    def documents():
        yield "one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(documents(), tokenizer(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / ".store.partial-00000000"
    left.mkdir()
    (left / "part-00000.npy").write_bytes(b"half")
    write_store(TEXTS, tokenizer(), tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_token_files_may_be_links_to_files_elsewhere(path, tmp_path):
    (path / "part-00000.npy").rename(tmp_path / "elsewhere")
    (path / "part-00000.npy").symlink_to(tmp_path / "elsewhere")
    assert TokenStore.open(path).num_tokens == len(expected_tokens(TEXTS))


def test_an_existing_store_is_never_overwritten(path):
    before = (path / "part-00000.npy").read_bytes()
    with pytest.raises(ArtifactError, match="already exists"):
        write_store(["other"], tokenizer(), path)
    assert (path / "part-00000.npy").read_bytes() == before


def test_another_tokenizer_is_refused_with_both_digests(path):
    other = load_tokenizer("cl100k:1025")
    with pytest.raises(DataError, match=f"{tokenizer().digest}.*{other.digest}"):
        TokenStore.open(path, other)


def test_every_flipped_bit_and_every_changed_size_is_detected(path):
    file = path / "part-00000.npy"
    good = file.read_bytes()
    for at in range(0, len(good), 17):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DataError, match="altered"):
            TokenStore.open(path)
    for bad in (good[:-1], good[:-2], good + b"\0\0", b""):
        file.write_bytes(bad)
        with pytest.raises(DataError):
            TokenStore.open(path, digest_of=None)
    file.unlink()
    with pytest.raises(DataError, match="not a file"):
        TokenStore.open(path)


def _set(**changes):
    return lambda index: json.dumps(index | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: "{",
        lambda index: "[]",
        lambda index: json.dumps({k: v for k, v in index.items() if k != "eos_id"}),
        _set(format="flexmoe-tokens-9"),
        _set(dtype="object"),
        _set(files=[]),
    ],
)
def test_a_damaged_index_is_refused(path, damage):
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(damage(index))
    with pytest.raises(DataError, match="remedy"):
        TokenStore.open(path)


def test_an_index_cannot_point_outside_its_folder(path):
    index = json.loads((path / "index.json").read_text())
    os.rename(path / "part-00000.npy", path.parent / "elsewhere.npy")
    index["files"][0]["name"] = "../elsewhere.npy"  # intact, but not the store's
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"elsewhere\.npy"):
        TokenStore.open(path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"index\.json"):
        TokenStore.open(tmp_path)
    with pytest.raises(DataError, match=r"no \.npy file"):
        TokenStore.from_olmo(tmp_path, "uint16", 0)


def test_same_documents_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_store(TEXTS, tokenizer(), tmp_path / name)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_store_of_plain_texts_has_no_trace_of_marks_or_of_a_first_token(path):
    index = json.loads((path / "index.json").read_text())
    fields = {"format", "dtype", "eos_id", "vocab_size", "tokenizer_digest", "documents", "text_bytes", "files"}
    assert set(index) == fields
    assert index["format"] == "flexmoe-tokens-1"
    assert {key for file in index["files"] for key in file} == {"name", "tokens", "sha256"}


def test_a_store_without_the_first_token_is_refused_and_tokenizing_again_works(tmp_path):
    words = load_tokenizer(sentencepiece(tmp_path / "t"))
    write_store(["the cat"], words, tmp_path / "store")
    index = json.loads((tmp_path / "store" / "index.json").read_text())
    assert (index["format"], index["bos_id"]) == ("flexmoe-tokens-2", 1)
    del index["bos_id"]
    (tmp_path / "store" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"bos_id None, the tokenizer has 1.*\n.*tokenize the documents again"):
        TokenStore.open(tmp_path / "store", words)
    assert write_store(["the cat"], words, tmp_path / "again").bos_id == 1


def test_raw_tokens_without_the_first_token_are_refused(tmp_path):
    np.array([5, 6, 2, 7, 2], "<u2").tofile(tmp_path / "part-0.npy")
    with pytest.raises(DataError, match="none is the id 1, with which this tokenizer begins every text"):
        TokenStore.from_olmo(tmp_path, "uint16", 2, bos_id=1)
    np.array([1, 5, 6, 2, 1, 7, 2], "<u2").tofile(tmp_path / "part-0.npy")
    assert TokenStore.from_olmo(tmp_path, "uint16", 2, bos_id=1).bos_id == 1


def test_documents_beside_an_index_or_arrays_of_others(tmp_path):
    """An index.json of another program is passed over; arrays beside documents are named, and neither is guessed at."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}', encoding="utf-8")
    assert kind_of(tmp_path) == "documents"
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(1 << 42)
    with limits():
        assert kind_of(tmp_path) == "documents"
    np.save(tmp_path / "embeddings.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"both token files \(\*\.npy\) and documents \(a\.jsonl, \.\.\.\)") as refusal:
        kind_of(tmp_path)
    assert "move one kind" in refusal.value.remedy
