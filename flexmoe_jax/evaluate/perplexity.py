"""Bits per byte of held-out documents, and the routed share of every expert on the same tokens."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from flexmoe_jax.data.corpus import HELDOUT
from flexmoe_jax.data.pipeline import Batch, scoring_batches
from flexmoe_jax.data.records import DEFAULT, Fields
from flexmoe_jax.data.sources import Document, read_documents
from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.decoder import Decoder, head, hidden_states
from flexmoe_jax.model.loss import next_token_loss
from flexmoe_jax.model.precision import exact
from flexmoe_jax.parallel.mesh import everywhere
from flexmoe_jax.parallel.specs import batch_parts, place_batch
from flexmoe_jax.tree import Params


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of D documents: `bytes_D` int64, and `token_nats`, a float32 [tokens] array per document, in nats.

    `share_LE` float64 is each layer's mean routed weight per expert (canonical order), normalized over the active
    experts, so that every layer sums to one.
    """

    token_nats: list[np.ndarray]
    bytes_D: np.ndarray
    share_LE: np.ndarray

    @property
    def nats_D(self) -> np.ndarray:
        """Negative log-likelihood of each document in nats, float64 [D]."""
        return np.array([nats.sum(dtype=np.float64) for nats in self.token_nats])

    @property
    def tokens(self) -> int:
        """The number of scored tokens."""
        return sum(map(len, self.token_nats))

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood of all documents in bits, over their UTF-8 bytes."""
        return float(self.nats_D.sum() / math.log(2) / self.bytes_D.sum())


def half_window(seq_len: int) -> int:
    """The default stride in tokens: every token has at least half a window of context, if its document has it."""
    return max(seq_len // 2, 1)


def check_window(seq_len: int, max_seq_len: int) -> None:
    """DataError if windows of `seq_len` tokens are longer than the `max_seq_len` of a model."""
    if seq_len > max_seq_len:
        raise DataError(
            f"windows of {seq_len} tokens are asked for, the model's max_seq_len is {max_seq_len}",
            f"score in windows (--seq-len) of at most {max_seq_len}",
        )


def score(
    run: Decoder,
    params: Params,
    texts: list[str],
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    seq_len: int,
    stride: int,
    batch_size: int = 8,
) -> Score:
    """Scores every token of every text once, with at least `seq_len - stride` tokens of left context if they exist.

    Documents are never packed. The end-of-text token is the context of the first token, and is scored at the end.
    `batch_size` rows are scored at a time, fewer of rows over 1,024 tokens: memory hardly grows with `seq_len` (see
    `scoring_batches`). The devices of `mesh`, which hold `params` with stacked experts, share the rows of a batch;
    every process gets the whole result. DataError if there is no text, for windows longer than the model's
    `max_seq_len`, and for a stride outside 1..`seq_len`.
    """
    check_window(seq_len, run.config.max_seq_len)
    if not texts:
        raise DataError("there is no document to score", "give at least one held-out document")
    token_nats: list[list[np.ndarray]] = [[] for _ in texts]
    share_LE = np.zeros(())
    batches = scoring_batches(
        texts, tokenizer, seq_len=seq_len, stride=stride, batch_size=batch_size, parts=batch_parts(mesh)
    )
    for batch, doc_B, _ in batches:
        with jax.set_mesh(mesh):
            nats_BT, batch_share_LE = _score_batch(run, params, place_batch(mesh, batch))
        for doc, nats_T, weights_T in zip(doc_B, np.asarray(nats_BT), batch.weights, strict=True):
            if doc >= 0:  # a document's rows come in order
                token_nats[doc].append(nats_T[weights_T > 0])
        share_LE = share_LE + np.asarray(batch_share_LE, np.float64)
    bytes_D = np.array([len(text.encode()) for text in texts])
    joined = [np.concatenate(rows) for rows in token_nats]
    return Score(joined, bytes_D, share_LE / sum(map(len, joined)))


def heldout_texts(folder: pathlib.Path, max_bytes: int, split: str = HELDOUT, fields: Fields = DEFAULT) -> list[str]:
    """The first documents of a folder's split: at most `max_bytes` of UTF-8 text, but at least one document.

    DataError if the folder has no document of the split.
    """
    texts = first_texts(read_documents(folder, split, fields), max_bytes)
    if not texts:
        raise DataError(f"{folder} has no document of the split {split!r}", "give a folder with held-out documents")
    return texts


def first_texts(documents: Iterable[Document], max_bytes: int) -> list[str]:
    """The texts of the first documents: at most `max_bytes` of UTF-8, but at least one. DataError for conversations."""
    texts: list[str] = []
    size = 0
    for document in documents:
        if document.messages:
            raise DataError(
                f"{document.where} is a conversation, and only texts are scored",
                "write what is to be scored into a field of its own, and name it with --text-field",
            )
        size += len(document.text.encode())
        if texts and size > max_bytes:
            break
        texts.append(document.text)
    return texts


def describe(experts: tuple[str, ...], score: Score) -> dict:
    """A Score as JSON values; `experts` are the names in canonical order."""
    layers = [dict(zip(experts, map(float, row), strict=True)) for row in score.share_LE]
    return {
        "bits_per_byte": score.bits_per_byte,
        "documents": len(score.nats_D),
        "bytes": int(score.bytes_D.sum()),
        "tokens": score.tokens,
        "share": dict(zip(experts, map(float, score.share_LE.mean(0)), strict=True)),
        "layers": layers,
    }


@functools.partial(jax.jit, static_argnums=0)
@exact
def _score_batch(run: Decoder, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    weights_BT = batch.weights
    x_BTD, router_logits_LNE = hidden_states(run, params, batch.tokens, batch.segments)
    _, nats_BT, _ = next_token_loss(x_BTD, head(run.config, params), batch.targets, weights_BT)
    share_LNE = routed_share(run, router_logits_LNE)
    return everywhere(nats_BT), everywhere((share_LNE * weights_BT.reshape(-1)[:, None]).sum(1))


def routed_share(run: Decoder, router_logits_LNE: jax.Array) -> jax.Array:
    """float32 router logits [L, N, E] -> weights of the active experts [L, N, E], normalized to sum to one."""
    weights_LNE = jax.vmap(lambda logits_NE: run.route(logits_NE).weights_NE)(router_logits_LNE)
    return weights_LNE / weights_LNE.sum(-1, keepdims=True)
