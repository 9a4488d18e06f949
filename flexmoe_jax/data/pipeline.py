"""Batches: shuffled training windows that are a pure function of (seed, step), and evaluation windows by document.

Legend: B batch, T tokens. Every batch is a dictionary of NumPy arrays:

    tokens_BT   int32    what the model reads
    targets_BT  int32    what it predicts: the next token
    segments_BT int32    number of the document within the row; attention stays within a segment
    weights_BT  float32  1 where the prediction counts, else 0
"""

from collections.abc import Iterable, Iterator

import grain
import numpy as np

from flexmoe_jax.data.store import TokenStore, batches_of
from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError

READ_THREADS = 2
READ_AHEAD_BATCHES = 8
SCORING_DOCUMENTS = 256  # tokenised at a time


def make_batches(
    store: TokenStore, *, seq_len: int, batch_size: int, seed: int, repeat: bool = True
) -> grain.MapDataset:
    """Training batches: `dataset[n]` depends on the store, `seed` and n alone.

    Each epoch is a permutation of all windows of the store, another one per epoch and seed. With `repeat` the
    epochs follow one another without end, a batch may straddle two, and no window is ever left out; without, the last
    incomplete batch is dropped. Documents are packed: a row may hold the end of one and the beginning of the next.
    Several processes take turns by slicing: `dataset[process_index::process_count]`.
    """
    windows = store.num_windows(seq_len)
    if not repeat and windows < batch_size:
        raise DataError(
            f"{windows} windows of {seq_len} tokens do not fill one batch of {batch_size}",
            "give more documents, a smaller batch or a shorter sequence length",
        )
    # `seed` before `shuffle`: grain derives the shuffle's own seed from it, so that neighbouring seeds share no epoch.
    dataset = grain.MapDataset.source(_Windows(store, seq_len)).seed(seed).shuffle()
    if repeat:
        dataset = dataset.repeat()
    batches = dataset.batch(batch_size, drop_remainder=True)
    return batches.map(lambda windows_BT: _training_batch(windows_BT, store.eos_id))


def mix_batches(own: grain.MapDataset, public: grain.MapDataset) -> grain.MapDataset:
    """Batch n is the rows of `own[n]`, then those of `public[n]`, with `own` float32 [B, T] telling them apart (1, 0).

    Still a pure function of seed and n.
    """
    return grain.MapDataset.source(_Pairs(own, public))


def make_iterator(dataset: grain.MapDataset, start_step: int = 0) -> grain.DatasetIterator:
    """Iterates over `dataset` from batch `start_step`, reading ahead in threads.

    `get_state()` / `set_state()` are exact: the state is the number of the next batch, whatever was read ahead.
    """
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD_BATCHES)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state(iterator.get_state() | {"next_index": start_step})
    return iterator


class _Pairs:
    """The batches of two datasets, joined, as a grain source."""

    def __init__(self, own, public):
        self.own, self.public = own, public

    def __len__(self):
        return min(len(self.own), len(self.public))

    def __getitem__(self, n):
        pair = self.own[n], self.public[n]
        own = [np.full_like(batch["weights"], value) for batch, value in zip(pair, (1, 0), strict=True)]
        return {name: np.concatenate([batch[name] for batch in pair]) for name in pair[0]} | {
            "own": np.concatenate(own)
        }


class _Windows:
    """The store's windows as a grain source."""

    def __init__(self, store, seq_len):
        self.store, self.seq_len, self.count = store, seq_len, store.num_windows(seq_len)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.store.window(int(i), self.seq_len)


def _training_batch(windows_BT, eos_id):
    """`windows_BT` is one token longer than the batch. The end-of-document token is predicted by the document it ends;
    read, it opens the next one, as in `scoring_batches` and in generation. So every target counts."""
    tokens_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
    return {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "segments": np.cumsum(tokens_BT == eos_id, axis=1, dtype=np.int32),
        "weights": np.ones(tokens_BT.shape, np.float32),
    }


def scoring_batches(
    texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, stride: int, batch_size: int
) -> Iterator[dict]:
    """Evaluation batches `[batch_size, seq_len]` in which every token of every document counts exactly once.

    A document is read after one end-of-document token, so its first token and its own end are scored too. A document
    longer than `seq_len` takes several rows, `stride` tokens apart: each token is then predicted from at least
    `seq_len - stride` tokens before it (or all there are). Besides the training arrays a batch holds

        doc         int32 [B]  which of `texts` the row belongs to; -1 for the rows that fill the last batch
        text_bytes  int64 [B]  the document's UTF-8 bytes in its first row, 0 in the others, so that bits per byte are
                               sum(weights * nll) / ln 2 / sum(text_bytes), over everything or by document
    """
    if not 1 <= stride <= seq_len:
        raise DataError(
            f"a stride of {stride} with windows of {seq_len} tokens", f"choose a stride from 1 to {seq_len}"
        )
    for rows in batches_of(_scoring_rows(texts, tokenizer, seq_len, stride), batch_size):
        filler = (*_padded([], [], 0, seq_len, tokenizer.pad_id), -1, 0)
        rows += [filler] * (batch_size - len(rows))
        names = ("tokens", "targets", "segments", "weights", "doc", "text_bytes")
        dtypes = (np.int32, np.int32, np.int32, np.float32, np.int32, np.int64)
        yield {
            name: np.asarray(column, dtype)
            for name, dtype, column in zip(names, dtypes, zip(*rows, strict=True), strict=True)
        }


def _scoring_rows(texts, tokenizer, seq_len, stride):
    doc = 0
    for some in batches_of(texts, SCORING_DOCUMENTS):
        for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
            tokens = np.array([tokenizer.eos_id, *ids, tokenizer.eos_id], np.int32)
            count, scored, text_bytes = len(tokens) - 1, 0, len(text.encode())
            while scored < count:
                # The last window is moved back to end with the document: more context at no cost.
                begin = max(min(scored + stride, count) - seq_len, 0)
                end = min(begin + seq_len, count)
                row = _padded(tokens[begin:end], tokens[begin + 1 : end + 1], scored - begin, seq_len, tokenizer.pad_id)
                yield (*row, doc, text_bytes)
                scored, text_bytes = end, 0
            doc += 1


def _padded(tokens, targets, context, seq_len, pad_id):
    """One row: `tokens`, then padding in a segment of its own; the first `context` positions do not count."""
    used = len(tokens)
    padding = np.full(seq_len - used, pad_id, np.int32)
    position = np.arange(seq_len)
    segments = (position >= used).astype(np.int32)
    weights = ((position >= context) & (position < used)).astype(np.float32)
    return np.concatenate([tokens, padding]), np.concatenate([targets, padding]), segments, weights
