"""Training batches are a pure function of (seed, step); evaluation scores every token of every document once."""

import collections
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data.pipeline import (
    Batch,
    Mixture,
    Seen,
    make_batches,
    make_iterator,
    mix_batches,
    scoring_batches,
)
from flexmoe_jax.data.store import TokenStore
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import DataError
from tests.tokenizers import sentencepiece

EOS, LENGTH, WINDOWS = 5, 8, 45
DTYPES = {"tokens": np.int32, "targets": np.int32, "segments": np.int32, "weights": np.float32}


@functools.cache
def tokenizer():
    return load_tokenizer("cl100k:512")


@functools.cache
def store():
    """45 windows of 8 tokens, each known by its first token; document ends sprinkled over the rest."""
    tokens = np.random.default_rng(0).integers(0, 12, WINDOWS * LENGTH + 1)
    tokens[::LENGTH] = 100 + np.arange(WINDOWS + 1)
    part = tokens.astype("<u2")
    return TokenStore((part[:100], part[100:]), np.array([0, 100, len(part)]), EOS)


def batches(seed=3, batch_size=4, repeat=True):
    return make_batches(store(), seq_len=LENGTH, batch_size=batch_size, seed=seed, repeat=repeat)


def windows_of(batch):
    return (batch.tokens[:, 0] - 100).tolist()


def assert_same(a, b):
    for name in DTYPES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_batch_has_the_promised_shapes_and_types():
    batch = batches()[0]
    assert {name: getattr(batch, name).dtype for name in DTYPES} == DTYPES
    mixed = mix_batches(batches(), batches(batch_size=2))[0]
    for typed, shapes in ((batch, Batch.shapes(4, LENGTH)), (mixed, Batch.shapes(6, LENGTH, own=True))):
        assert vars(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), typed)) == vars(shapes)


def test_a_batch_is_a_tree_of_its_arrays():
    batch = mix_batches(batches(), batches(seed=4))[0]
    doubled = jax.jit(lambda batch: jax.tree.map(lambda leaf: 2 * leaf, batch))(batch)
    assert isinstance(doubled, Batch)
    for name in (*DTYPES, "own"):
        np.testing.assert_array_equal(getattr(doubled, name), 2 * getattr(batch, name))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(batches()[0])]
    assert paths == [".tokens", ".targets", ".segments", ".weights"]  # no leaf for `own`


def test_a_mixed_batch_holds_own_rows_then_public_rows_and_marks_them():
    own, public = batches(), batches(seed=4, batch_size=2)
    for n in (0, 17):
        mixed = mix_batches(own, public)[n]
        assert windows_of(mixed) == windows_of(own[n]) + windows_of(public[n])
        np.testing.assert_array_equal(mixed.own, np.repeat(np.float32([1, 0]), [4, 2])[:, None].repeat(LENGTH, 1))


# -- mixtures ----------------------------------------------------------------------------------------------------------


def marked_store(first: int, windows: int) -> TokenStore:
    """A store whose windows are known by their first tokens: `first`, `first` + 1, .."""
    tokens = np.full(windows * LENGTH + 1, 7, "<u2")
    tokens[::LENGTH] = first + np.arange(windows + 1)
    return TokenStore((tokens,), np.array([0, len(tokens)]), EOS)


def mixture(weights=(5, 3, 1), rows=4):
    stores = {f"s{i}": marked_store(1000 * (i + 1), 10 + i) for i in range(len(weights))}
    return Mixture(stores, weights, rows, LENGTH)


def sources_of(batch) -> list[int]:
    """The number of the source of each row."""
    return (batch.tokens[:, 0] // 1000 - 1).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 500))
def test_every_source_has_given_its_share_within_a_row_after_any_number_of_batches(weights, rows, n):
    mixed = mixture(weights, rows)
    before, after = np.array(mixed.rows_before(n)), np.array(mixed.rows_before(n + 1))
    shares = np.array(weights) / sum(weights)
    assert before.sum() == n * rows
    assert (after >= before).all()
    assert (np.abs(before - n * rows * shares) < 1).all()


def test_a_mixed_batch_holds_the_rows_that_are_counted_and_goes_through_every_source_in_epochs():
    mixed, given = mixture(), collections.defaultdict(list)
    dataset = mixed.batches(seed=3)
    for n in range(60):
        batch, (before, after) = dataset[n], (mixed.rows_before(n), mixed.rows_before(n + 1))
        assert batch.tokens.shape == (4, LENGTH)
        assert np.bincount(sources_of(batch), minlength=3).tolist() == np.subtract(after, before).tolist()
        for source, first in zip(sources_of(batch), batch.tokens[:, 0].tolist(), strict=True):
            given[source].append(first % 1000)
    assert [len(given[source]) for source in range(3)] == mixed.rows_before(60)
    for source, windows in enumerate((10, 11, 12)):
        epochs = [given[source][i : i + windows] for i in range(0, len(given[source]) - windows + 1, windows)]
        assert epochs
        assert all(sorted(epoch) == list(range(windows)) for epoch in epochs)
    seen = mixed.seen(60)
    assert seen["s0"] == Seen(mixed.rows_before(60)[0] * LENGTH, mixed.rows_before(60)[0] / 10)
    assert sum(source.tokens for source in seen.values()) == 60 * 4 * LENGTH


def test_a_mixture_of_one_source_is_its_batches():
    alone = Mixture({"own": store()}, (1,), 4, LENGTH).batches(seed=3)
    for n in (0, 11, 30):
        assert_same(alone[n], batches()[n])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 40))
def test_a_mixture_continues_bit_identically_from_any_batch(start):
    dataset, iterator = mixture().batches(seed=3), make_iterator(mixture().batches(seed=3))
    next(iterator)
    iterator.set_state(make_iterator(mixture().batches(seed=3), start_step=start).get_state())
    for n in range(start, start + 3):
        assert_same(next(iterator), dataset[n])


def test_a_source_without_a_window_is_refused_by_name():
    with pytest.raises(DataError, match="the source 'tiny': 1 tokens are too few for one window of 8"):
        Mixture({"own": store(), "tiny": marked_store(0, 0)}, (1, 1), 4, LENGTH)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_each_epoch_is_a_different_permutation_of_all_windows(seed):
    dataset = batches(seed, batch_size=9)  # 5 batches an epoch
    epochs = [[w for n in range(5 * e, 5 * e + 5) for w in windows_of(dataset[n])] for e in range(3)]
    assert all(sorted(epoch) == list(range(WINDOWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_no_window_is_left_out_when_batches_straddle_epochs():
    dataset = batches(batch_size=4)  # 45 windows: 11 batches and a quarter
    seen = collections.Counter(w for n in range(WINDOWS) for w in windows_of(dataset[n]))  # exactly 4 epochs
    assert seen == dict.fromkeys(range(WINDOWS), 4)


def test_neighboring_seeds_share_no_epoch():
    def epochs(seed):
        dataset = batches(seed, batch_size=9)
        return {tuple(w for n in range(5 * e, 5 * e + 5) for w in windows_of(dataset[n])) for e in range(4)}

    assert not epochs(0) & epochs(1)


def test_random_access_equals_iteration_and_a_second_build():
    iterator, again = make_iterator(batches()), batches()
    for n in range(30):
        batch = next(iterator)
        assert_same(batch, batches()[n])
        assert_same(batch, again[n])


def test_without_repeat_there_is_one_epoch_of_complete_batches():
    dataset = batches(repeat=False)
    rows = [windows_of(batch) for batch in make_iterator(dataset)]
    assert len(rows) == len(dataset) == 11
    assert len({w for row in rows for w in row}) == 44


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(0, 10))
def test_a_restored_iterator_continues_bit_identically(start, steps):
    first = make_iterator(batches(), start_step=start)
    for _ in range(steps):
        next(first)
    state = first.get_state()
    rest = [next(first) for _ in range(3)]
    second = make_iterator(batches())
    next(second)  # its own position is overwritten
    second.set_state(state)
    for n, batch in enumerate(rest):
        assert_same(batch, next(second))
        assert_same(batch, batches()[start + steps + n])


def test_processes_take_turns_by_slicing():
    whole, parts = batches(), [batches()[rank::2] for rank in range(2)]
    for n in range(20):
        assert_same(whole[n], parts[n % 2][n // 2])


def test_targets_segments_and_weights_equal_those_of_a_loop():
    for n in range(12):
        batch = batches(batch_size=4)[n]
        for row, window in enumerate(windows_of(batch)):
            tokens = store().window(window, LENGTH)
            segment, segments = 0, []
            for token in tokens[:-1]:
                segment += token == EOS
                segments.append(segment)
            np.testing.assert_array_equal(batch.tokens[row], tokens[:-1])
            np.testing.assert_array_equal(batch.targets[row], tokens[1:])
            np.testing.assert_array_equal(batch.segments[row], segments)
            assert (batch.weights[row] == 1).all()
    assert any((batches()[n].segments > 1).any() for n in range(12))  # the case is in the data


@pytest.mark.parametrize("begins", [False, True])
def test_training_and_scoring_read_the_same_tokens_and_targets_of_a_document(tmp_path, begins):
    """Packed for training, a document is the segment from the token that starts it (its own, or the preceding end) on.

    These are the tokens and targets with which it is scored in a row of its own.
    """
    words = load_tokenizer(sentencepiece(tmp_path / "t")) if begins else tokenizer()
    texts = ["one two three", "four", "five six"]
    packed = write_store(iter(texts), words, tmp_path / "store")
    batch = make_batches(packed, seq_len=packed.num_tokens - 1, batch_size=1, seed=0)[0]
    scored, _, _ = next(scoring_batches(texts, words, 32, 8, len(texts)))
    first = 0 if begins else 1  # no end token precedes the first document in the store
    for document in range(first, 3):
        inside = (batch.segments[0] == document + begins) & (batch.weights[0] == 1)
        counted = scored.weights[document] == 1
        for name in ("tokens", "targets"):
            ours, theirs = getattr(batch, name)[0][inside], getattr(scored, name)[document][counted]
            np.testing.assert_array_equal(ours, theirs)
        assert scored.tokens[document][0] == words.start_id


def test_nothing_predicts_the_token_that_begins_texts(tmp_path):
    words = load_tokenizer(sentencepiece(tmp_path / "t"))
    packed = write_store(["the cat", "sat", "on the mat"], words, tmp_path / "store")
    assert (packed.bos_id, packed.eos_id) == (1, 2)
    batch = make_batches(packed, seq_len=packed.num_tokens - 1, batch_size=1, seed=0)[0]
    np.testing.assert_array_equal(batch.weights == 0, batch.targets == 1)
    assert (batch.targets == 1).sum() == 2
    assert (batch.targets == 2).sum() == 3


def test_too_few_windows_are_refused():
    with pytest.raises(DataError, match="361 tokens are too few for one window of 400"):
        make_batches(store(), seq_len=400, batch_size=1, seed=0)
    with pytest.raises(DataError, match="45 windows of 8 tokens do not fill one batch of 46"):
        batches(batch_size=46, repeat=False)


DOCUMENTS = st.lists(st.text("ab é日\n", max_size=30), max_size=8)


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(1, 12), st.data())
def test_every_token_of_every_document_is_scored_once_with_its_context(texts, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    batch_size = data.draw(st.integers(1, 5))
    scored = collections.defaultdict(list)
    text_bytes = collections.Counter()
    for batch, doc_B, bytes_B in scoring_batches(iter(texts), tokenizer(), seq_len, stride, batch_size):
        assert {name: getattr(batch, name).dtype for name in DTYPES} == DTYPES
        assert {getattr(batch, name).shape for name in DTYPES} == {(batch_size, seq_len)}
        assert (doc_B.dtype, doc_B.shape) == (np.int32, (batch_size,))
        for row, doc in enumerate(doc_B.tolist()):
            if doc >= 0 and len(tokenizer().encode(texts[doc])) + 1 >= seq_len:
                assert not batch.segments[row].any()  # a long document's rows are full: no context is wasted
            text_bytes[doc] += int(bytes_B[row])
            for t in np.flatnonzero(batch.weights[row]):
                mine = batch.segments[row, : t + 1] == batch.segments[row, t]
                scored[doc].append((batch.targets[row, t], batch.tokens[row, : t + 1][mine].tolist()))
    assert not scored[-1]
    for doc, text in enumerate(texts):
        tokens = [tokenizer().eos_id, *tokenizer().encode(text), tokenizer().eos_id]
        assert [target for target, _ in scored[doc]] == tokens[1:]  # each once, in order, with its own end
        for place, (_, context) in enumerate(scored[doc]):
            assert context == tokens[place + 1 - len(context) : place + 1]  # the preceding tokens
            # All there is, else everything but the stride (the predicting token itself is part of the context).
            assert len(context) >= min(place + 1, seq_len - stride + 1)
        assert text_bytes[doc] == len(text.encode())
    assert text_bytes[-1] == 0
    assert set(scored) - {-1} == set(range(len(texts)))


def test_a_long_window_costs_only_long_documents():
    """Rows have the length that their document needs, and a batch has a bounded number of tokens."""
    lengths = [3, 900, 1500, 1024, 10_000, 2100, 5, 1023, 3000]  # of the documents, in tokens: a letter is one
    texts = ["".join("abcdefgh"[i % 8] + " " for i in range(n // 2)) + "x" * (n % 2) for n in lengths]
    found = collections.defaultdict(list)
    shapes = collections.Counter()
    for batch, doc_B, _ in scoring_batches(texts, tokenizer(), 4096, 2048, batch_size=4):
        shapes[batch.tokens.shape] += 1
        for row, doc in enumerate(doc_B.tolist()):
            found[doc].append((batch.tokens.shape[1], batch.targets[row][batch.weights[row] > 0]))
    assert {T: B for B, T in shapes} == {1024: 4, 2048: 2, 4096: 1}  # 4,096 tokens in every batch
    for doc, text in enumerate(texts):
        ids = tokenizer().encode(text)
        assert np.concatenate([targets for _, targets in found[doc]]).tolist() == [*ids, tokenizer().eos_id]
        assert {T for T, _ in found[doc]} == {next(T for T in (1024, 2048, 4096) if min(len(ids) + 1, 4096) <= T)}


def test_batches_divide_among_the_parts_of_a_mesh():
    batches = list(scoring_batches(["a", "b " * 1500], tokenizer(), 8192, 4096, batch_size=1, parts=3))
    assert [batch.tokens.shape for batch, _, _ in batches] == [(3, 1024), (3, 2048)]


def test_a_stride_longer_than_the_window_is_refused():
    for stride in (0, 9):
        with pytest.raises(DataError, match=f"stride of {stride}"):
            next(scoring_batches(["a"], tokenizer(), 8, stride, 1))
