"""The loop around the step: data, checkpoints, metrics, and the model or package at the end."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
from collections.abc import Collection, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexmoe_jax.artifacts.checkpoints import Restored, RunCheckpoints
from flexmoe_jax.artifacts.model_dir import create_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.artifacts.sealed import digest
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Mixture, make_iterator
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.store import TokenStore, kind_of, sha256_of
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError
from flexmoe_jax.parallel.chips import peak_flops
from flexmoe_jax.parallel.mesh import mesh_of_all, replicated
from flexmoe_jax.parallel.processes import barrier, is_lead, to_host
from flexmoe_jax.parallel.specs import check_rows, place_batch
from flexmoe_jax.parallel.stacked import STACKED, unstack_weights
from flexmoe_jax.progress import Advance, track
from flexmoe_jax.source_config import Source
from flexmoe_jax.training.freezing import freezing_mask, freezing_table
from flexmoe_jax.training.hashed import HashedFiles
from flexmoe_jax.training.metrics import Meter, MetricsFile, Recorder, Sink, Window, check_skipped
from flexmoe_jax.training.mixtures import batches_of, log_sources, mixtures_of
from flexmoe_jax.training.optimizer import group_table, log_optimizer, make_optimizer
from flexmoe_jax.training.profile import Profile, parse_steps
from flexmoe_jax.training.resume import (
    check_identity,
    documents_of,
    drop_stale_tokens,
    fields_of,
    holdout_of,
    identity_of,
    made_of,
    tokens_of,
    with_schedule,
)
from flexmoe_jax.training.rows import with_discriminants
from flexmoe_jax.training.saves import Saves
from flexmoe_jax.training.signals import EX_INTERRUPTED, EX_TEMPFAIL, StopSignals
from flexmoe_jax.training.start import Start, prepare
from flexmoe_jax.training.state import TrainState, as_stacked, by_name, create_state, flops_per_token, shapes_by_name
from flexmoe_jax.training.step import make_train_step, microbatches
from flexmoe_jax.training.trackers import open_trackers
from flexmoe_jax.training.validation import Validation, distance, held_out
from flexmoe_jax.tree import Params, canonical_order, combine, partition, split

log = logging.getLogger(__name__)
_COUNTERS = ("step", "bad_steps", "skipped")


class Stopped(FlexMoEError):
    """A signal stopped the run; its state is saved."""

    def __init__(self, stop: StopSignals, what: str):
        super().__init__(f"stopped by {stop.name} {what}", "run the same command again to resume")
        self.exit_code = EX_INTERRUPTED if stop.received == signal.SIGINT else EX_TEMPFAIL


def train(run: RunConfig, allow: Collection[str] = (), profile: str | None = None) -> pathlib.Path:
    """Runs or resumes `run`; returns the path of the public model directory or of the owner's package that it wrote.

    `allow` names keys of `run.json` (`config.steps`, `data.own.documents`) that may differ from the start of the run:
    it resumes with the new values, but with the tokens made at its start. `profile` ("10:13") selects the steps whose
    XLA trace every process writes into `profile/<process>/`. The run directory `run.out` holds `run.json` (identity),
    `hashed.json` (digests of its data), `tokens/` (unless the data is a token store), `checkpoints/`, `metrics.jsonl`,
    and at the end `model/` or `package/`. Progress is logged.

    Raises `Stopped` after saving on SIGTERM, SIGHUP, SIGUSR1 and the first Ctrl-C (in the main thread), ArtifactError
    if `run.out` belongs to another run, and FlexMoEError for input that cannot be used, when the loss stays non-finite,
    or when too many steps were skipped.
    """
    out, traced = pathlib.Path(run.out), parse_steps(profile, run.steps)
    product = out / ("model" if run.is_public else "package")
    mesh = mesh_of_all(run.mesh)
    check_rows(mesh, run.batch_size)
    initial = prepare(run, mesh)
    groups = group_table(run, initial.params)  # refuses one that decides nothing before data is read
    for source in run.sources.values():
        if not pathlib.Path(source.path).exists():
            remedy = "give a folder of documents or a token store; of several sources, WEIGHT PATH; WEIGHT PATH"
            raise DataError(f"config.{source.key} {source.path!r} does not exist", remedy)
    validation = Validation(run, initial, mesh)
    with RunCheckpoints(out, keep=run.keep_checkpoints) as checkpoints:
        started = checkpoints.started or product.exists()
        run = with_schedule(run, out / "run.json", started)
        stores, documents = _open_data(run, initial, out, started)
        mixtures = mixtures_of(run, stores)
        identity = identity_of(run, initial, stores, documents)
        check_identity(out / "run.json", identity, allow, started)
        if product.exists():
            log.info(f"{product} exists: nothing to do")
            return product
        for pattern, trainable, leaves, count in freezing_table(initial.params, run.owner, run.freeze):
            log.info(f"{'trained' if trainable else 'frozen ':8} {pattern:34} {leaves:3} leaves {count:14,} parameters")
        log_optimizer(run, groups)
        log_sources(run, mixtures)
        initial = with_discriminants(run, initial, mixtures, mesh, out / "rows.npz", started)
        job = _Job(run, initial, mesh, mixtures, checkpoints, validation, identity)
        with jax.set_mesh(mesh):
            state = _fit(job, traced)
            check_skipped(run, int(state.skipped), int(state.step))
            steps, published = _published(job, state)
        trained = _to_host(published, initial)
        if is_lead():
            _write_product(product, job, trained, steps, int(state.skipped))
        barrier("product")
    return product


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run with what it works on."""

    run: RunConfig
    initial: Start
    mesh: Mesh
    mixtures: list[Mixture]
    checkpoints: RunCheckpoints
    validation: Validation
    identity: dict

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts in canonical order."""
        return canonical_order(self.initial.params["experts"])


def _fit(job: _Job, traced: range) -> TrainState:
    run, initial, mesh, checkpoints, validation = job.run, job.initial, job.mesh, job.checkpoints, job.validation
    optimizer = make_optimizer(run.optimizer, run.steps, job.experts)
    state, frozen = create_state(mesh, initial.params, run, optimizer)
    iterator = make_iterator(batches_of(run, job.mixtures))
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
    state, window = _restore(job, state, iterator)
    first = int(state.step)
    step, count = make_train_step(initial.model, run, shardings, optimizer), microbatches(run)
    how = "as config.accumulation says" if run.accumulation else "chosen: config.accumulation is not set"
    log.info(f"a step has {count} microbatch(es) of {run.batch_size // count} sequences ({how})")
    if traced and first >= traced.stop:
        log.info(f"steps {traced[0]} to {traced[-1]} are done: there is nothing to profile")
    saves = Saves(run, mesh)
    profile = Profile(traced, checkpoints.path / "profile" / str(jax.process_index()))
    shown = track(f"train {run.owner}", run.steps, "steps", start=first) if is_lead() else _nothing()
    with saves, profile, shown as advance, _sinks(job, first) as sinks:
        recorder = Recorder(run, job.experts, sinks, advance, _meter(run, initial, mesh))
        recorder.window = window
        for n in range(first, 0 if validation.exhausted else run.steps):
            with profile.step(n, recorder.paused):
                batch = next(iterator)
                state, metrics = step(state, frozen, place_batch(mesh, batch))
                if recorder.logs(n):
                    metrics |= _watched(job, n, state, frozen)
                recorder.add(n, metrics)
            found = False
            if validation.due(n + 1):
                with recorder.paused():
                    found = _validate(job, n, state, frozen, recorder) and run.publish == "best"
            last = n + 1 == run.steps or validation.exhausted
            if last:
                recorder.finish()
            stopping, due = saves.due(n)
            if stopping and not last:
                log.info(f"{saves.stop.name}: saving after step {n + 1}; Ctrl-C ends at once")
            if stopping or due or found or (last and run.save_every is not None):
                with recorder.paused():
                    _save(job, state, iterator, recorder.window)
                    saves.saved()
            if stopping and not last:
                checkpoints.wait()
                raise Stopped(saves.stop, f"after step {n + 1} of {run.steps}; the state is saved in {run.out}")
            if last:
                break
    checkpoints.wait()
    return state


@contextlib.contextmanager
def _sinks(job: _Job, first: int) -> Iterator[list[Sink]]:
    """What takes the lines of metrics: nothing but in process 0."""
    if not is_lead():
        yield []
        return
    file = MetricsFile(job.checkpoints.path / "metrics.jsonl", first)
    with file, open_trackers(job.run, job.identity, first) as trackers:
        yield [file, *trackers]


def _watched(job: _Job, n: int, state: TrainState, frozen: Params) -> dict:
    """What a line of metrics has besides the metrics of steps: tokens and epochs of each source, the distance."""
    run = job.run
    seen: dict[str, dict] = {}
    for mixture in job.mixtures:
        seen |= {name: dataclasses.asdict(source) for name, source in mixture.seen(n + 1).items()}
    if run.is_public or not run.coordinate:
        return {"seen": seen}
    return {"seen": seen, "distance": distance(state.trainable, frozen, run.owner)}


def _validate(job: _Job, n: int, state: TrainState, frozen: Params, recorder: Recorder) -> bool:
    """Scores the held-out texts after step `n`; whether the own text never had a better score."""
    found = job.validation.measure(combine(state.trainable, frozen))
    better = job.validation.progress.add(n + 1, found["own"])
    finite = {name: bits if math.isfinite(bits) else None for name, bits in found.items()}
    recorder.write({"step": n, "validation": finite})
    words = ", ".join(f"{name} {bits:.4f}" for name, bits in found.items())
    log.info(f"after step {n + 1}: held-out bits per byte: {words}{' (own: the best so far)' if better else ''}")
    if job.validation.exhausted:
        best, waited = job.validation.progress, job.run.patience
        log.info(f"no better score in {waited} validations: training ends; the best is that after step {best.step}")
    return better


def _meter(run: RunConfig, initial: Start, mesh: Mesh) -> Meter:
    flops, devices = flops_per_token(initial.model, run, initial.params), mesh.size
    peak, kind = peak_flops(devices), jax.devices()[0].device_kind
    known = "its peak is not known" if peak is None else f"{peak / devices:.4g} bfloat16 FLOP/s at most each"
    log.info(f"{flops:.4g} FLOPs per token of a step on {devices} x {kind}, {known}")
    return Meter(run.batch_size * run.seq_len, flops, peak)


@contextlib.contextmanager
def _nothing() -> Iterator[Advance]:
    yield lambda n=1, note=None, row=None: None


def _to_host(trainable: Params, initial: Start) -> Params:
    """Trained leaves as NumPy arrays, experts by name."""
    whole = jax.tree.map(to_host, trainable)
    if STACKED in whole.get("experts", {}):
        whole = {**whole, "experts": unstack_weights(whole["experts"], initial.params["experts"])}
    return whole


def _save(job: _Job, state: TrainState, iterator: grain.DatasetIterator, window: Window) -> None:
    meta: dict[str, Any] = {name: int(getattr(state, name)) for name in _COUNTERS}
    meta |= {"window": window.state, "validation": dataclasses.asdict(job.validation.progress)}
    _keep_best(job)
    trainable, opt_state = by_name((state.trainable, state.opt_state), job.experts)
    job.checkpoints.save(meta["step"], trainable, opt_state, iterator.get_state(), meta)


def _read(job: _Job, state: TrainState, step: int | None = None) -> Restored | None:
    """The newest checkpoint, or that of `step`, in the form and on the mesh of `state`; None where there is none."""
    like = state.trainable, state.opt_state
    trainable, opt_state = shapes_by_name(like, job.experts)
    restored = job.checkpoints.restore(trainable, opt_state, step)
    if restored is None:
        return None
    trainable, opt_state = as_stacked((restored.trainable, restored.opt_state), like)
    return dataclasses.replace(restored, trainable=trainable, opt_state=opt_state)


def _restore(job: _Job, state: TrainState, iterator: grain.DatasetIterator) -> tuple[TrainState, Window]:
    """The newest checkpoint's state, or `state` where there is none, and the sums of the steps since the last line."""
    run, restored = job.run, _read(job, state)
    if restored is None:
        return state, Window()
    for step, reason in restored.skipped:
        log.info(f"skipped the damaged checkpoint {step}: {reason}")
    log.info(f"resumed at step {restored.step}")
    iterator.set_state(restored.data_state)
    job.validation.resume(restored.meta.get("validation"))
    best = job.validation.progress.step
    if run.publish == "best" and best is not None and not job.checkpoints.holds(best):
        log.info(f"the best weights so far, of step {best}, are not kept: the search for the best step starts again")
        job.validation.forget()
    _keep_best(job)
    counters = {name: jnp.full_like(getattr(state, name), restored.meta[name]) for name in _COUNTERS}
    own = lambda tree: jax.tree.map(jnp.array, tree)  # noqa: E731 - a copy: the state is donated
    state = TrainState(trainable=own(restored.trainable), opt_state=own(restored.opt_state), **counters)
    return state, Window(restored.meta.get("window"))


def _keep_best(job: _Job) -> None:
    if job.run.publish == "best" and (best := job.validation.progress.step) is not None:
        job.checkpoints.keep(best)


def _published(job: _Job, state: TrainState) -> tuple[int, Params]:
    """(number of steps, trained leaves) of what the run publishes."""
    best, last = job.validation.progress.step, int(state.step)
    if job.run.publish == "last" or best == last:
        return last, state.trainable
    remedy = "--config.publish=last publishes the weights of the last step"
    if best is None:
        raise ArtifactError("config.publish is 'best', and of no step are a finite score and its weights known", remedy)
    if not job.checkpoints.holds(best):
        raise ArtifactError(f"the best weights, of step {best}, are not in {job.checkpoints.path} any more", remedy)
    log.info(f"published are the weights after step {best}, the best on held-out text, not those after step {last}")
    restored = _read(job, state, best)
    assert restored is not None  # damaged files are an error
    return restored.step, restored.trainable


def _open_data(
    run: RunConfig, initial: Start, out: pathlib.Path, started: bool
) -> tuple[dict[str, TokenStore], dict[str, str | None]]:
    """(token stores, digests of the documents) of all sources by name; makes the tokens where missing."""
    hashed = HashedFiles(out / "hashed.json")
    documents, stores = documents_of(run, hashed), {}
    for name, source in run.sources.items():
        tokens, made = tokens_of(out, name), made_of(run, source, documents[name], initial.tokenizer.digest)
        if is_lead() and not started:
            drop_stale_tokens(tokens, made)
        barrier(f"stale tokens in {tokens.name}")
        stores[name] = open_tokens(run, source, initial, tokens, hashed, made)
    return stores, documents


def open_tokens(
    run: RunConfig,
    source: Source,
    initial: Start,
    tokens: pathlib.Path,
    hashed: HashedFiles,
    made: dict[str, Any] | None = None,
) -> TokenStore:
    """The tokens of a source: a token store, OLMo files, or documents, tokenized once into the store `tokens`.

    The index of `tokens` keeps what they are `made` of. Process 0 checks the bytes of a source that `hashed` does not
    know as unchanged, and every process that its files have the names, sizes and index that those of process 0 have.
    """
    folder = pathlib.Path(source.path)
    kind, holdout = kind_of(folder), holdout_of(run, source)
    if holdout and kind != "documents":
        what = f"config.holdout is {run.holdout} and config.data {source.path!r} holds tokens, not documents"
        raise DataError(what, "give documents, or config.validation: documents that are not in these tokens")
    if kind == "store":
        return _open_store(folder, initial, hashed)
    if kind == "olmo":
        vocab_size = initial.tokenizer.vocab_size
        dtype = run.token_dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")
        bos_id = None if initial.tokenizer.bos_id == initial.tokenizer.eos_id else initial.tokenizer.bos_id
        how = folder, dtype, initial.tokenizer.eos_id, vocab_size, bos_id
        what, files = f"token files {folder.absolute()}", sorted(folder.glob("*.npy"))
        known = hashed.digest(what, files, lambda: TokenStore.from_olmo(*how, sha256_of).digest)
        return dataclasses.replace(TokenStore.from_olmo(*how), sha256=known)
    if is_lead() and not tokens.exists():  # who looks too early may see none for a while on a network disk
        documents = read_documents(folder, fields=fields_of(run, source.key))
        write_store((d for d in documents if not held_out(d, holdout)), initial.tokenizer, tokens, made_of=made)
    barrier(f"tokens in {tokens.name}")
    return _open_store(tokens, initial, hashed)


def _open_store(folder: pathlib.Path, initial: Start, hashed: HashedFiles) -> TokenStore:
    store = TokenStore.open(folder, initial.tokenizer, digest_of=None)  # the sizes of its files are those of its index
    what, files = f"token store {folder.absolute()}", [folder / "index.json", *sorted(folder.glob("part-*"))]
    hashed.digest(what, files, lambda: TokenStore.open(folder, initial.tokenizer).digest, store.digest)
    return store


def _write_product(product: pathlib.Path, job: _Job, trained: Params, steps: int, skipped: int) -> None:
    run, initial, progress = job.run, job.initial, job.validation.progress
    # Frozen leaves come from the start of the run, not from their copies in the compute dtype.
    _, frozen = partition(initial.params, freezing_mask(initial.params, run.owner, run.freeze))
    params = jax.tree.map(np.asarray, combine(trained, frozen))
    training = {
        "steps": steps,
        "tokens": steps * run.batch_size * run.seq_len,
        "skipped_steps": skipped,
        "config": job.identity["config"],
        "config_digest": digest(job.identity["config"]),
        "privacy_budget": None,
    }
    if progress.step == steps and run.publish == "best":
        training |= {"published": "best", "heldout_bits_per_byte": progress.bits_per_byte}
    record = {
        "training": training,
        **initial.history,
        "router": initial.router,
        "licence": run.licence,
        "contact": run.contact,
    }
    if run.is_public:
        records = dict.fromkeys(split(params), record)
        create_model(product, params, initial.model, initial.tokenizer.files, records, top_k=run.top_k)
    else:
        expert = params["experts"][run.owner]
        write_package(product, owner=run.owner, params=expert, config=initial.model, base=initial.base, record=record)
