"""A learning rate for a run, by short runs on the same batches, each scored on text that none of them has read.

A range test, which raises the rate within one run (arXiv 1506.01186), misleads with transformers and Adam: it says
where training diverges, often orders of magnitude above the best rate. Short runs, each with the whole schedule, are
small copies of what is asked for. The best rate of a longer run is the same or lower (arXiv 2409.19913).
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from flexmoe_jax.config import SIDES, RunConfig
from flexmoe_jax.data.pipeline import Batch, Mixture
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.decoder import Decoder, head, hidden_states
from flexmoe_jax.model.loss import next_token_loss
from flexmoe_jax.parallel.mesh import mesh_of_all, replicated
from flexmoe_jax.parallel.specs import batch_parts, check_rows, place_batch
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.progress import track
from flexmoe_jax.training.hashed import HashedFiles
from flexmoe_jax.training.loop import open_tokens
from flexmoe_jax.training.mixtures import batches_of, mixtures_of
from flexmoe_jax.training.optimizer import group_table, make_optimizer
from flexmoe_jax.training.rows import with_discriminants
from flexmoe_jax.training.start import Start, prepare
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import decoder_of, make_train_step
from flexmoe_jax.training.validation import Validation
from flexmoe_jax.tree import Params, combine

ROW_TOKENS = 8192  # positions that are scored at a time
Scorer = Callable[[Params, Params], dict[str, float]]  # (trainable, frozen) -> a loss for each of `own` and `public`


@dataclasses.dataclass(frozen=True)
class Trial:
    """A short run: its peak rate, the steps that were not finite, and its loss on unread text.

    `losses` holds `own` and, where public text is mixed in and scored, `public`.
    """

    rate: float
    bad_steps: int
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The `trials` of `steps` steps each, beside the model as it starts (`before`).

    `scored` says of `own` and `public` which text it is, `unit` what the losses are. `chosen` is the rate with the
    lowest loss on own text, None if none of them lowers it.
    """

    steps: int
    unit: str
    scored: dict[str, str]
    before: Trial
    trials: tuple[Trial, ...]
    chosen: float | None


def find_rate(run: RunConfig, rates: Sequence[float], steps: int) -> Sweep:
    """Trains `run` from its start for `steps` steps at each of `rates`, on the same batches, and scores each.

    Scored are the held-out texts of the run's validation, in bits per byte; where the owner has none, windows of the
    training text that these steps do not read, `eval_bytes` of them, in nats per token. All trials share one compiled
    step. Nothing is written into the run directory. Errors as of a training run, and DataError for a text that is too
    short to leave windows unread.
    """
    run = dataclasses.replace(run, eval_every=1, publish="last", patience=None)
    mesh = mesh_of_all(run.mesh)
    check_rows(mesh, run.batch_size)
    initial = prepare(run, mesh)
    group_table(run, initial.params)  # refuses one that decides nothing before data is read
    validation = Validation(run, initial, mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        hashed = HashedFiles(pathlib.Path(folder, "hashed.json"))
        stores = {
            name: open_tokens(run, source, initial, pathlib.Path(folder, name), hashed)
            for name, source in run.sources.items()
        }
        mixtures = mixtures_of(run, stores)
        initial = with_discriminants(run, initial, mixtures, mesh, pathlib.Path(folder, "rows.npz"), started=False)
        if validation.texts:
            unit, scorer = "bits per byte", lambda *parts: validation.measure(combine(*parts))
            scored = {side: f"{len(texts)} held-out documents" for side, texts in validation.texts.items()}
        else:
            texts = {side: _unread(run, mixture, steps, mesh) for side, mixture in zip(SIDES, mixtures, strict=False)}
            unit, scorer = "nats per token", functools.partial(_nats, initial, run, texts, mesh)
            what = "windows of the training text that no trial reads"
            scored = {side: f"{sum(map(_rows, batches))} {what}" for side, batches in texts.items()}
        trainer = _Trainer(run, initial, mesh, mixtures, scorer, steps)
        with track("learning rates", len(rates) * steps, "steps") as advance:
            before = trainer.trial(0.0, advance)
            trials = tuple(trainer.trial(rate, advance) for rate in rates)
    return Sweep(steps, unit, scored, before, trials, choose(before, trials))


def choose(before: Trial, trials: Sequence[Trial]) -> float | None:
    """The rate with the lowest loss on own text of those that stayed finite and are better than no training."""
    finite = [trial for trial in trials if not trial.bad_steps and np.isfinite(trial.losses["own"])]
    good = [trial for trial in finite if trial.losses["own"] < before.losses["own"]]
    return min(good, key=lambda trial: trial.losses["own"]).rate if good else None


class _Trainer:
    """Short runs at any rate with one compiled step: the rate is a number in the optimizer's state."""

    def __init__(self, run: RunConfig, initial: Start, mesh: Mesh, mixtures: list[Mixture], scorer: Scorer, steps: int):
        warmup = round(min(run.optimizer.warmup_steps, run.steps - 1) * steps / run.steps)
        short = dataclasses.replace(run.optimizer, lr=1.0, warmup_steps=warmup, schedule_steps=steps)
        self._run, self._initial, self._mesh = dataclasses.replace(run, steps=steps, optimizer=short), initial, mesh
        self._batches, self._scorer, self._steps = batches_of(run, mixtures), scorer, steps
        scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
        self._optimizer = optax.chain(make_optimizer(short, steps, initial.params["experts"]), scale)
        self._step: Any = None

    def trial(self, rate: float, advance: Any) -> Trial:
        """A short run from the start of the run at the peak `rate`, and its losses; at 0 only the losses."""
        run, initial, mesh = self._run, self._initial, self._mesh
        state, frozen = create_state(mesh, initial.params, run, self._optimizer)
        if self._step is None:
            shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
            self._step = make_train_step(initial.model, run, shardings, self._optimizer)
        inner, scale = state.opt_state
        step_size = jax.device_put(np.float32(rate), scale.hyperparams["step_size"].sharding)
        state = dataclasses.replace(state, opt_state=(inner, scale._replace(hyperparams={"step_size": step_size})))
        for n in range(self._steps if rate else 0):
            state, metrics = self._step(state, frozen, place_batch(mesh, self._batches[n]))
            advance(1, f"rate {rate:.3g}, loss {float(metrics['loss']):.3f}")
        return Trial(rate, int(state.skipped), self._scorer(state.trainable, frozen))


def _unread(run: RunConfig, mixture: Mixture, steps: int, mesh: Mesh) -> list[Batch]:
    """Windows that batches 0 to `steps` - 1 of the mixture do not hold: `run.eval_bytes`, at four bytes a token."""
    count = -(-run.eval_bytes // (4 * run.seq_len * mixture.rows))
    if any(seen.epochs > 1 for seen in mixture.seen(steps + count).values()):
        raise DataError(
            f"there is no held-out text, and {steps} steps leave too few windows of {', '.join(mixture.stores)} "
            f"unread: {count * mixture.rows} are scored",
            "give config.validation or config.holdout, or --steps or config.eval_bytes a smaller number",
        )
    dataset, parts = mixture.batches(run.seed), batch_parts(mesh)
    batches = [dataset[n] for n in range(steps, steps + count)]
    rows = -(-max(ROW_TOKENS // run.seq_len, 1) // parts) * parts
    return _cut(jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches), rows)


def _cut(batch: Batch, rows: int) -> list[Batch]:
    """The rows of `batch` in batches of `rows`; the last one is filled up with rows that do not count."""
    count = len(batch.tokens)
    index = np.arange(-(-count // rows) * rows)
    whole = jax.tree.map(lambda leaf: leaf[index % count], batch)
    whole = dataclasses.replace(whole, weights=whole.weights * (index < count)[:, None].astype(np.float32))
    return [jax.tree.map(lambda leaf, n=n: leaf[n : n + rows], whole) for n in range(0, len(index), rows)]


def _rows(batch: Batch) -> int:
    """The rows that count."""
    return int(np.asarray(batch.weights).any(1).sum())


def _nats(
    initial: Start, run: RunConfig, texts: dict[str, list[Batch]], mesh: Mesh, *parts: Params
) -> dict[str, float]:
    """The loss of each text in nats per token that counts; `parts` are the trainable and the frozen leaves."""
    decoder = decoder_of(initial.model, run, any(STACKED in part.get("experts", {}) for part in parts))
    losses = {}
    for side, batches in texts.items():
        total = sum(float(_loss(decoder, *parts, place_batch(mesh, batch))) for batch in batches)
        losses[side] = total / sum(float(batch.weights.sum()) for batch in batches)
    return losses


@functools.partial(jax.jit, static_argnums=0)
def _loss(decoder: Decoder, trainable: Params, frozen: Params, batch: Batch) -> jax.Array:
    """The sum of -log p over the tokens of `batch` that count."""
    params = combine(trainable, frozen)
    x_BTD, _ = hidden_states(decoder, params, batch.tokens, batch.segments)
    _, nats_BT, _ = next_token_loss(x_BTD, head(decoder.config, params), batch.targets, batch.weights)
    return (batch.weights * nats_BT).sum()
