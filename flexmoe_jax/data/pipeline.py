"""Batches: shuffled training windows that are a pure function of (seed, step), and evaluation windows by document.

Legend: B batch, T tokens. Every batch is a dictionary of NumPy arrays with the fields of `Batch`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from flexmoe_jax.data.store import COUNTS, STARTS, TokenStore, batches_of
from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError

READ_THREADS = 2
READ_AHEAD_BATCHES = 8
SCORING_DOCUMENTS = 256  # tokenized at a time
SHORT_ROW = 1024  # tokens: longer scoring rows have a length that is the next power of two, and fewer share a batch

Array = Any  # numpy.ndarray on the host, jax.Array on devices, jax.ShapeDtypeStruct in plans


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A batch as the training and scoring steps read it."""

    tokens: Array
    """int32 [B, T]: the input of the model."""

    targets: Array
    """int32 [B, T]: the next token at every position."""

    segments: Array
    """int32 [B, T]: the number of the document within the row; attention stays within a segment."""

    weights: Array
    """float32 [B, T]: 1 where the prediction counts, else 0."""

    own: Array | None = None
    """float32 [B, T]: 1 in rows of the owner's documents, 0 in rows of public ones; None without `mix_batches`."""

    @classmethod
    def shapes(cls, batch_size: int, seq_len: int, own: bool = False) -> "Batch":
        """A batch of `jax.ShapeDtypeStruct`, to lower or plan a step without data."""
        ids, floats = (jax.ShapeDtypeStruct((batch_size, seq_len), dtype) for dtype in (np.int32, np.float32))
        return cls(ids, ids, ids, floats, floats if own else None)


def make_batches(
    store: TokenStore, *, seq_len: int, batch_size: int, seed: int, repeat: bool = True
) -> grain.MapDataset:
    """Training batches: `dataset[n]` depends only on the store, `seed` and n.

    Each epoch is a permutation of all windows of the store, a different one for every epoch and seed. With `repeat` the
    epochs follow each other without end, a batch may straddle two of them, and no window is left out; without it the
    last incomplete batch is dropped. Documents are packed: a row may hold the end of one and the start of the next.
    Several processes take turns by slicing: `dataset[process_index::process_count]`. Raises DataError when the store
    does not fill one window, or without `repeat` one batch.
    """
    windows = store.num_windows(seq_len)
    if not repeat and windows < batch_size:
        raise DataError(
            f"{windows} windows of {seq_len} tokens do not fill one batch of {batch_size}",
            "give more documents, a smaller batch or a shorter sequence length",
        )
    # `seed` before `shuffle`: grain derives the shuffle's own seed from it, so that neighboring seeds share no epoch.
    dataset = grain.MapDataset.source(_Windows(store, seq_len)).seed(seed).shuffle()
    if repeat:
        dataset = dataset.repeat()
    batches = dataset.batch(batch_size, drop_remainder=True)
    return batches.map(lambda windows: _training_batch(windows, store))


def mix_batches(own: grain.MapDataset, public: grain.MapDataset) -> grain.MapDataset:
    """Batch n holds the rows of `own[n]`, then those of `public[n]`; its field `own` is 1 in the former, else 0.

    Batch n remains a pure function of seed and n.
    """
    return grain.MapDataset.source(_Pairs(own, public))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What training has read of a source: positions, and how many times all of its windows."""

    tokens: int
    epochs: float


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Sources that share `rows` rows of every batch by whole-number weights.

    Of any number of rows from the start on, each source has given its share, less than one row more or fewer; every
    source goes through its own windows in epochs, as in `make_batches`. DataError for a source without a window.
    """

    stores: Mapping[str, TokenStore]
    """The sources' tokens by name."""

    weights: Sequence[int]
    """The weight of each source, at least 1, in the order of `stores`."""

    rows: int
    """Rows of each batch."""

    seq_len: int
    """Tokens per row."""

    def __post_init__(self) -> None:
        _ = self.windows

    @functools.cached_property
    def windows(self) -> dict[str, int]:
        """The number of windows of each source."""
        counts = {}
        for name, store in self.stores.items():
            try:
                counts[name] = store.num_windows(self.seq_len)
            except DataError as error:
                raise DataError(f"the source {name!r}: {error.what}", error.remedy) from error
        return counts

    def rows_before(self, n: int) -> list[int]:
        """The rows that each source has given in batches 0 to n - 1."""
        periods, rest = divmod(n * self.rows, sum(self.weights))
        return (periods * np.asarray(self.weights) + self._given[rest]).tolist()

    def seen(self, n: int) -> dict[str, Seen]:
        """What batches 0 to n - 1 hold of each source."""
        counts = zip(self.windows.items(), self.rows_before(n), strict=True)
        return {name: Seen(rows * self.seq_len, rows / windows) for (name, windows), rows in counts}

    def batches(self, seed: int) -> grain.MapDataset:
        """The batches, without end: `dataset[n]` depends only on the mixture, `seed` and n."""
        if len(self.stores) == 1:
            [store] = self.stores.values()
            return make_batches(store, seq_len=self.seq_len, batch_size=self.rows, seed=seed)
        return grain.MapDataset.source(_Mixed(self, seed))

    @functools.cached_property
    def _given(self) -> np.ndarray:
        """int64 [W + 1, sources]: the rows that each source has given of the first 0 to W = sum(weights) rows.

        Earliest deadline first: row j of a source of weight w becomes free at row floor(j W / w) and is due before row
        ceil((j + 1) W / w). All deadlines are met, since the shares of the sources add up to one.
        """
        total, given = sum(self.weights), np.zeros(len(self.weights), np.int64)
        weights, counts = np.asarray(self.weights), [given.copy()]
        for row in range(total):
            due = np.where(given * total // weights <= row, -(-(given + 1) * total // weights), total + 1)
            given[due.argmin()] += 1
            counts.append(given.copy())
        return np.stack(counts)


def make_iterator(dataset: grain.MapDataset, start_step: int = 0) -> grain.DatasetIterator:
    """Iterates over `dataset` from batch `start_step`, reading ahead in threads.

    `get_state()` and `set_state()` are exact: the state is the number of the next batch, regardless of what was read
    ahead.
    """
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD_BATCHES)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state(iterator.get_state() | {"next_index": start_step})
    return iterator


class _Pairs:
    """The batches of two datasets, joined, as a grain source."""

    def __init__(self, own: grain.MapDataset, public: grain.MapDataset) -> None:
        self.own, self.public = own, public

    def __len__(self) -> int:
        return min(len(self.own), len(self.public))

    def __getitem__(self, n: int) -> Batch:
        pair = self.own[n], self.public[n]
        marked = [dataclasses.replace(b, own=np.full_like(b.weights, own)) for b, own in zip(pair, (1, 0), strict=True)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *marked)


class _Mixed:
    """The batches of a mixture as a grain source: rows of the first source, then of the second, and so on."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.rows = [
            make_batches(store, seq_len=mixture.seq_len, batch_size=1, seed=seed) for store in mixture.stores.values()
        ]

    def __len__(self) -> int:
        return min(map(len, self.rows)) // self.mixture.rows

    def __getitem__(self, n: int) -> Batch:
        ranges = zip(self.rows, self.mixture.rows_before(n), self.mixture.rows_before(n + 1), strict=True)
        rows = [dataset[i] for dataset, first, end in ranges for i in range(first, end)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


class _Windows:
    """The store's windows as a grain source."""

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self.store, self.seq_len, self.count = store, seq_len, store.num_windows(seq_len)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        tokens = self.store.window(int(i), self.seq_len)
        return tokens if self.store.marks is None else np.stack([tokens, self.store.window_marks(int(i), self.seq_len)])


def _training_batch(windows: np.ndarray, store: TokenStore) -> Batch:
    """`windows` [B, T + 1] has one token more per row than the batch; [B, 2, T + 1] of conversations: tokens, marks.

    The end-of-document token is a target of the document that it ends; as an input it starts the next document, as in
    `scoring_batches` and in generation. Every target therefore counts. Where texts begin with a token of their own,
    this token starts the document, and nothing predicts it. Of conversations only the assistant's tokens count.
    """
    windows_BT, marks_BT = (windows, None) if store.marks is None else (windows[:, 0], windows[:, 1])
    tokens_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
    weights_BT = np.ones(tokens_BT.shape, np.float32)
    if marks_BT is not None:
        starts_BT, weights_BT = marks_BT[:, :-1] == STARTS, (marks_BT[:, 1:] == COUNTS).astype(np.float32)
    elif store.bos_id is not None:
        starts_BT, weights_BT = tokens_BT == store.bos_id, (targets_BT != store.bos_id).astype(np.float32)
    else:
        starts_BT = tokens_BT == store.eos_id
    return Batch(tokens_BT, targets_BT, np.cumsum(starts_BT, axis=1, dtype=np.int32), weights_BT)


def scoring_batches(
    texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, stride: int, batch_size: int, parts: int = 1
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Evaluation batches [B, T] in which every token of every document counts exactly once.

    T is `seq_len` up to 1,024 tokens. Longer windows are for long documents only: rows of similar length form batches
    of the least T of 1,024, 2,048, .. that holds them, at most `seq_len`. B is `batch_size` for T up to 1,024, and for
    a longer T as many rows as have together no more tokens, but at least one; rounded up to a multiple of `parts`.

    Every document follows the token that starts one (an end of document, unless texts begin with a token of their
    own), so its first token and its own end are scored too. A document
    longer than `seq_len` takes several rows, `stride` tokens apart: each token is then predicted from at least
    `seq_len - stride` preceding tokens (or from all there are). With every batch come

        doc         int32 [B]  index of the row's document in `texts`; -1 in the rows that fill the last batch
        text_bytes  int64 [B]  UTF-8 bytes of the document in its first row, 0 in its other rows, so that bits per byte
                               are sum(weights * nll) / ln 2 / sum(text_bytes), over all documents or by document

    Raises DataError for a stride outside 1..seq_len.
    """
    if not 1 <= stride <= seq_len:
        raise DataError(
            f"a stride of {stride} with windows of {seq_len} tokens", f"choose a stride from 1 to {seq_len}"
        )
    waiting: dict[int, list[tuple]] = {}
    for row in _scoring_rows(texts, tokenizer, seq_len, stride):  # all rows of a document of several have one length
        rows = waiting.setdefault(len(row[0]), [])
        rows.append(row)
        if len(rows) == _rows_of(len(row[0]), batch_size, parts):
            yield _scoring_batch(waiting.pop(len(row[0])))
    for length, rows in sorted(waiting.items()):
        filler = (*_padded([], [], 0, length, tokenizer.pad_id), -1, 0)
        yield _scoring_batch(rows + [filler] * (_rows_of(length, batch_size, parts) - len(rows)))


def _rows_of(length: int, batch_size: int, parts: int) -> int:
    """The number of rows in a scoring batch of rows of `length` tokens."""
    rows = batch_size if length <= SHORT_ROW else max(batch_size * SHORT_ROW // length, 1)
    return -(-rows // parts) * parts


def _row_length(used: int, seq_len: int) -> int:
    """The length to which a scoring row of `used` tokens is padded."""
    return min(max(1 << (used - 1).bit_length(), SHORT_ROW), seq_len)


def _scoring_batch(rows: list[tuple]) -> tuple[Batch, np.ndarray, np.ndarray]:
    dtypes = (np.int32, np.int32, np.int32, np.float32, np.int32, np.int64)
    *arrays, doc, text_bytes = (np.asarray(c, dtype) for c, dtype in zip(zip(*rows, strict=True), dtypes, strict=True))
    return Batch(*arrays), doc, text_bytes


def _scoring_rows(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, stride: int) -> Iterator[tuple]:
    """(tokens, targets, segments, weights, doc, text_bytes) of every row."""
    doc = 0
    for some in batches_of(texts, SCORING_DOCUMENTS):
        for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
            tokens = np.array([tokenizer.start_id, *ids, tokenizer.eos_id], np.int32)
            count, scored, text_bytes = len(tokens) - 1, 0, len(text.encode())
            while scored < count:
                # The last window is moved back to end with the document: more context at no cost.
                start = max(min(scored + stride, count) - seq_len, 0)
                end = min(start + seq_len, count)
                length = _row_length(end - start, seq_len)
                row = _padded(tokens[start:end], tokens[start + 1 : end + 1], scored - start, length, tokenizer.pad_id)
                yield (*row, doc, text_bytes)
                scored, text_bytes = end, 0
            doc += 1


def _padded(
    tokens: np.ndarray | list[int], targets: np.ndarray | list[int], context: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One row: `tokens`, then padding in a segment of its own; the first `context` positions do not count."""
    used = len(tokens)
    padding = np.full(length - used, pad_id, np.int32)
    position = np.arange(length)
    segments = (position >= used).astype(np.int32)
    weights = ((position >= context) & (position < used)).astype(np.float32)
    return np.concatenate([tokens, padding]), np.concatenate([targets, padding]), segments, weights
