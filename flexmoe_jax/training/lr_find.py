"""A learning rate for a run, by short runs on the same batches, each scored on text that none of them has read.

A range test, which raises the rate within one run (arXiv 1506.01186), misleads with transformers and Adam: it says
where training diverges, often orders of magnitude above the best rate. Short runs, each with the whole schedule, are
small copies of what is asked for. The best rate of a longer run is the same or lower (arXiv 2409.19913).
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flexmoe_jax.config import SIDES, RunConfig
from flexmoe_jax.data.corpus import HELDOUT, survey
from flexmoe_jax.data.pipeline import Batch, Mixture, make_batches
from flexmoe_jax.data.sources import Document, read_documents
from flexmoe_jax.data.store import kind_of
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.decoder import Decoder, head, hidden_states
from flexmoe_jax.model.loss import next_token_loss
from flexmoe_jax.parallel.mesh import mesh_of_all, replicated
from flexmoe_jax.parallel.specs import batch_parts, check_rows, place_batch
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.progress import track
from flexmoe_jax.training.loop import open_tokens
from flexmoe_jax.training.mixtures import batches_of, mixtures_of
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.resume import fields_of
from flexmoe_jax.training.start import Start, prepare
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import Params, combine

ROW_TOKENS = 8192  # positions that are scored at a time


@dataclasses.dataclass(frozen=True)
class Trial:
    """A short run: its peak rate, the steps that were not finite, and its loss in nats per token of scored text.

    `nats` holds `own` and, where public text is mixed in, `public`.
    """

    rate: float
    bad_steps: int
    nats: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The `trials` of `steps` steps each, beside the model as it starts (`before`).

    `scored` says of `own` and `public` which text it is. `chosen` is the rate with the lowest loss on own text, None if
    none of them lowers it.
    """

    steps: int
    scored: dict[str, str]
    before: Trial
    trials: tuple[Trial, ...]
    chosen: float | None


def find_rate(run: RunConfig, rates: Sequence[float], steps: int, max_bytes: int = 50_000) -> Sweep:
    """Trains `run` from its start for `steps` steps at each of `rates`, on the same batches, and scores each.

    Scored are the files of `data` (and `public_data`) that are named for held-out text, `max_bytes` of UTF-8 at most;
    without such files, windows of the training text that these steps do not read. All trials share one compiled step.
    Nothing is written into the run directory. Errors as of a training run, and DataError for a text that is too short
    to leave windows unread.
    """
    mesh = mesh_of_all(run.mesh)
    check_rows(mesh, run.batch_size)
    initial = prepare(run, mesh)
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(mesh):
        folder = pathlib.Path(name)
        stores = {name: open_tokens(run, source, initial, folder / name) for name, source in run.sources.items()}
        mixtures = mixtures_of(run, stores)
        scored, texts = {}, {}
        for (side, key), mixture in zip(SIDES.items(), mixtures, strict=False):
            texts[side], scored[side] = _unread(run, key, mixture, initial, folder, (steps, max_bytes))
        trainer = _Trainer(run, initial, mesh, mixtures, texts, steps)
        with track("learning rates", len(rates) * steps, "steps") as advance:
            before = trainer.trial(0.0, advance)
            trials = tuple(trainer.trial(rate, advance) for rate in rates)
    return Sweep(steps, scored, before, trials, choose(before, trials))


def choose(before: Trial, trials: Sequence[Trial]) -> float | None:
    """The rate with the lowest loss on own text of those that stayed finite and are better than no training."""
    good = [t for t in trials if not t.bad_steps and np.isfinite(t.nats["own"]) and t.nats["own"] < before.nats["own"]]
    return min(good, key=lambda trial: trial.nats["own"]).rate if good else None


class _Trainer:
    """Short runs at any rate with one compiled step: the rate is a number in the optimizer's state."""

    def __init__(
        self,
        run: RunConfig,
        initial: Start,
        mesh: Mesh,
        mixtures: list[Mixture],
        texts: dict[str, list[Batch]],
        steps: int,
    ):
        warmup = round(min(run.optimizer.warmup_steps, run.steps - 1) * steps / run.steps)
        short = dataclasses.replace(run.optimizer, lr=1.0, warmup_steps=warmup, schedule_steps=steps)
        self._run, self._initial, self._mesh = dataclasses.replace(run, steps=steps, optimizer=short), initial, mesh
        self._batches, self._texts, self._steps = batches_of(run, mixtures), texts, steps
        scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
        self._optimizer = optax.chain(make_optimizer(short, steps), scale)
        self._step: Any = None

    def trial(self, rate: float, advance: Any) -> Trial:
        """A short run from the start of the run at the peak `rate`, and its scores."""
        run, initial, mesh = self._run, self._initial, self._mesh
        dtype = jnp.dtype(run.compute_dtype)
        state, frozen = create_state(mesh, initial.params, run.owner, self._optimizer, dtype, run.freeze)
        if self._step is None:
            shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
            self._step = make_train_step(initial.model, run, shardings, self._optimizer)
        inner, scale = state.opt_state
        step_size = jax.device_put(np.float32(rate), scale.hyperparams["step_size"].sharding)
        state = dataclasses.replace(state, opt_state=(inner, scale._replace(hyperparams={"step_size": step_size})))
        for n in range(self._steps if rate else 0):
            state, metrics = self._step(state, frozen, place_batch(mesh, self._batches[n]))
            advance(1, f"rate {rate:.3g}, loss {float(metrics['loss']):.3f}")
        nats = {side: self._nats(state.trainable, frozen, batches) for side, batches in self._texts.items()}
        return Trial(rate, int(state.skipped), nats)

    def _nats(self, trainable: Params, frozen: Params, batches: list[Batch]) -> float:
        """The loss in nats per token that counts."""
        run = self._run
        dispatch = "sparse" if STACKED in {**trainable.get("experts", {}), **frozen.get("experts", {})} else "dense"
        decoder = Decoder(self._initial.model, run.top_k, dispatch, dtype=run.compute_dtype)
        total = sum(float(_loss(decoder, trainable, frozen, place_batch(self._mesh, batch))) for batch in batches)
        return total / sum(float(batch.weights.sum()) for batch in batches)


@functools.partial(jax.jit, static_argnums=0)
def _loss(decoder: Decoder, trainable: Params, frozen: Params, batch: Batch) -> jax.Array:
    """The sum of -log p over the tokens of `batch` that count."""
    params = combine(trainable, frozen)
    x_BTD, _ = hidden_states(decoder, params, batch.tokens, batch.segments)
    _, nats_BT, _ = next_token_loss(x_BTD, head(decoder.config, params), batch.targets, batch.weights)
    return (batch.weights * nats_BT).sum()


def _unread(
    run: RunConfig, key: str, mixture: Mixture, initial: Start, folder: pathlib.Path, limits: tuple[int, int]
) -> tuple[list[Batch], str]:
    """(batches of text of `config.key` that no trial reads, what it is); `limits` are the steps and bytes of text."""
    (steps, max_bytes), rows = limits, max(ROW_TOKENS // run.seq_len, 1)
    rows = -(-rows // batch_parts(mesh_of_all(run.mesh))) * batch_parts(mesh_of_all(run.mesh))
    if documents := list(_first(_heldout(run, key), max_bytes)):
        store = write_store(documents, initial.tokenizer, folder / f"heldout_{key}")
        length = min(run.seq_len, store.num_tokens - 1)
        windows = store.num_windows(length)
        batch = make_batches(store, seq_len=length, batch_size=windows, seed=run.seed)[0]
        return _cut(batch, rows), f"{len(documents)} held-out documents"
    count = -(-max_bytes // (4 * run.seq_len * mixture.rows))  # about four bytes a token
    if any(seen.epochs > 1 for seen in mixture.seen(steps + count).values()):
        raise DataError(
            f"config.{key} has no file named for held-out text, and {steps} steps leave no windows unread to score",
            "put held-out text beside it (heldout.jsonl), or give --steps or --max-bytes a smaller number",
        )
    dataset = mixture.batches(run.seed)
    unread = [dataset[n] for n in range(steps, steps + count)]
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *unread)
    return _cut(batch, rows), f"{count * mixture.rows} windows of the training text that the trials do not read"


def _heldout(run: RunConfig, key: str) -> Iterator[Document]:
    """The documents of files of `config.key` that are named for held-out text."""
    for source in run.sources.values():
        path = pathlib.Path(source.path)
        if source.key != key or kind_of(path) != "documents":
            continue
        if any(named == HELDOUT for _, named in survey(path).files):
            yield from read_documents(path, HELDOUT, fields_of(run, key))


def _first(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """The first documents, of `max_bytes` of UTF-8 together, but at least one if there is one."""
    size = 0
    for document in documents:
        if size and size + len(document.text.encode()) > max_bytes:
            return
        size += len(document.text.encode())
        yield document


def _cut(batch: Batch, rows: int) -> list[Batch]:
    """The rows of `batch` in batches of `rows`; the last one is filled up with rows that do not count."""
    count = len(batch.tokens)
    index = np.arange(-(-count // rows) * rows)
    whole = jax.tree.map(lambda leaf: leaf[index % count], batch)
    whole = dataclasses.replace(whole, weights=whole.weights * (index < count)[:, None].astype(np.float32))
    return [jax.tree.map(lambda leaf, n=n: leaf[n : n + rows], whole) for n in range(0, len(index), rows)]
