"""The loop around the step: data, checkpoints, metrics, and the model or package at the end."""

import contextlib
import logging
import pathlib
import signal
import time
from collections.abc import Collection, Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexmoe_jax.artifacts.checkpoints import RunCheckpoints
from flexmoe_jax.artifacts.model_dir import create_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.artifacts.sealed import digest
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import make_batches, make_iterator, mix_batches
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.store import TokenStore, kind_of
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import DataError, FlexMoEError
from flexmoe_jax.parallel.chips import peak_flops
from flexmoe_jax.parallel.mesh import mesh_of_all, replicated
from flexmoe_jax.parallel.processes import Agreement, barrier, is_lead, to_host
from flexmoe_jax.parallel.specs import check_rows, place_batch
from flexmoe_jax.parallel.stacked import STACKED, unstack_weights
from flexmoe_jax.progress import Advance, track
from flexmoe_jax.training.freezing import freezing_mask, freezing_table
from flexmoe_jax.training.metrics import Meter, MetricsFile, Recorder, check_skipped
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.profile import Profile, parse_steps
from flexmoe_jax.training.resume import (
    SOURCES,
    TOKENS,
    check_identity,
    documents_of,
    drop_stale_tokens,
    fields_of,
    identity_of,
)
from flexmoe_jax.training.signals import EX_INTERRUPTED, EX_TEMPFAIL, StopSignals
from flexmoe_jax.training.start import Start, prepare
from flexmoe_jax.training.state import (
    TrainState,
    as_stacked,
    by_name,
    create_state,
    flops_per_token,
    shapes_by_name,
)
from flexmoe_jax.training.step import make_train_step
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
    `tokens/` (unless the data is a token store), `checkpoints/`, `metrics.jsonl`, and at the end `model/` or
    `package/`. Progress is logged.

    Raises `Stopped` after saving on SIGTERM, SIGHUP, SIGUSR1 and the first Ctrl-C (in the main thread), ArtifactError
    if `run.out` belongs to another run, and FlexMoEError for input that cannot be used, when the loss stays non-finite,
    or when too many steps were skipped.
    """
    out, traced = pathlib.Path(run.out), parse_steps(profile, run.steps)
    product = out / ("model" if run.is_public else "package")
    mesh = mesh_of_all(run.mesh)
    check_rows(mesh, run.batch_size)
    initial = prepare(run, mesh)
    with RunCheckpoints(out, keep=run.keep_checkpoints) as checkpoints:
        started = checkpoints.started or product.exists()
        stores, documents = _open_data(run, initial, out, started)
        identity = identity_of(run, initial, stores, documents)
        check_identity(out / "run.json", identity, allow, started)
        if product.exists():
            log.info(f"{product} exists: nothing to do")
            return product
        for pattern, trainable, leaves, count in freezing_table(initial.params, run.owner, run.freeze):
            log.info(f"{'trained' if trainable else 'frozen ':8} {pattern:34} {leaves:3} leaves {count:14,} parameters")
        with jax.set_mesh(mesh):
            state = _fit(run, initial, mesh, stores, checkpoints, traced)
        check_skipped(run, int(state.skipped))
        trained = _to_host(state.trainable, initial)
        if is_lead():
            _write_product(product, run, initial, trained, int(state.skipped), identity)
        barrier("product")
    return product


def _fit(
    run: RunConfig,
    initial: Start,
    mesh: Mesh,
    stores: list[TokenStore],
    checkpoints: RunCheckpoints,
    traced: range,
) -> TrainState:
    out = checkpoints.path
    optimizer = make_optimizer(run.optimizer, run.steps)
    state, frozen = create_state(mesh, initial.params, run.owner, optimizer, jnp.dtype(run.compute_dtype), run.freeze)
    iterator = make_iterator(_batches(run, stores))
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
    names = canonical_order(initial.params["experts"])
    state = _restore(checkpoints, state, iterator, names)
    first = int(state.step)
    step = make_train_step(initial.model, run, shardings)
    meter = _meter(run, initial, mesh)
    if traced and first >= traced.stop:
        log.info(f"steps {traced[0]} to {traced[-1]} are done: there is nothing to profile")
    stop, agreement = StopSignals(), Agreement(mesh)
    saved_at, answer = time.monotonic(), None
    profile = Profile(traced, out / "profile" / str(jax.process_index()))
    shown = track(f"train {run.owner}", run.steps, "steps", start=first) if is_lead() else _nothing()
    with stop, profile, shown as advance, MetricsFile(out / "metrics.jsonl", first, written=is_lead()) as metrics_file:
        recorder = Recorder(run, names, metrics_file, advance, meter)
        for n in range(first, run.steps):
            with profile.step(n, recorder.paused):
                batch = next(iterator)
                state, metrics = step(state, frozen, place_batch(mesh, batch))
                recorder.add(n, metrics)
            overdue = is_lead() and (time.monotonic() - saved_at) / 60 >= run.save_minutes
            # Several processes agree on the request of a step one step later, when the answer costs no wait.
            asked = agreement.ask(stop.received is not None, overdue)
            stopping, due = agreement.read(answer if agreement.shared and answer is not None else asked)
            answer = asked
            last = n + 1 == run.steps
            if stopping and not last:
                log.info(f"{stop.name}: saving after step {n + 1}; Ctrl-C ends at once")
            if stopping or last or due or (n + 1) % run.save_every == 0:
                with recorder.paused():
                    saved_at = time.monotonic()
                    _save(checkpoints, state, iterator, names)
            if stopping and not last:
                checkpoints.wait()
                raise Stopped(stop, f"after step {n + 1} of {run.steps}; the state is saved in {run.out}")
    checkpoints.wait()
    return state


def _meter(run: RunConfig, initial: Start, mesh: Mesh) -> Meter:
    flops, devices = flops_per_token(initial.model, run, initial.params), mesh.size
    peak, kind = peak_flops(devices), jax.devices()[0].device_kind
    known = "its peak is not known" if peak is None else f"{peak / devices:.4g} bfloat16 FLOP/s at most each"
    log.info(f"{flops:.4g} FLOPs per token of a step on {devices} x {kind}, {known}")
    return Meter(run.batch_size * run.seq_len, flops, peak)


@contextlib.contextmanager
def _nothing() -> Iterator[Advance]:
    yield lambda n=1, note="": None


def _to_host(trainable: Params, initial: Start) -> Params:
    """Trained leaves as NumPy arrays, experts by name."""
    whole = jax.tree.map(to_host, trainable)
    if STACKED in whole.get("experts", {}):
        whole = {**whole, "experts": unstack_weights(whole["experts"], initial.params["experts"])}
    return whole


def _save(
    checkpoints: RunCheckpoints, state: TrainState, iterator: grain.DatasetIterator, names: tuple[str, ...]
) -> None:
    counters = {name: int(getattr(state, name)) for name in _COUNTERS}
    trainable, opt_state = by_name((state.trainable, state.opt_state), names)
    checkpoints.save(counters["step"], trainable, opt_state, iterator.get_state(), counters)


def _restore(
    checkpoints: RunCheckpoints, state: TrainState, iterator: grain.DatasetIterator, names: tuple[str, ...]
) -> TrainState:
    like = state.trainable, state.opt_state
    restored = checkpoints.restore(*shapes_by_name(like, names))
    if restored is None:
        return state
    for step, reason in restored.skipped:
        log.info(f"skipped the damaged checkpoint {step}: {reason}")
    log.info(f"resumed at step {restored.step}")
    iterator.set_state(restored.data_state)
    counters = {name: jnp.full_like(getattr(state, name), restored.meta[name]) for name in _COUNTERS}
    own = lambda tree: jax.tree.map(jnp.array, tree)  # noqa: E731 - a copy: the state is donated
    trainable, opt_state = own(as_stacked((restored.trainable, restored.opt_state), like))
    return TrainState(trainable=trainable, opt_state=opt_state, **counters)


def _batches(run: RunConfig, stores: list[TokenStore]) -> grain.MapDataset:
    """The run's batches: its own data, with `public_sequences` rows of public data if it has any."""
    sizes = (run.batch_size - run.public_sequences, run.public_sequences)
    parts = [
        make_batches(store, seq_len=run.seq_len, batch_size=size, seed=run.seed)
        for store, size in zip(stores, sizes, strict=False)
    ]
    return mix_batches(*parts) if len(parts) == 2 else parts[0]


def _open_data(
    run: RunConfig, initial: Start, out: pathlib.Path, started: bool
) -> tuple[list[TokenStore], dict[str, str | None]]:
    """(token stores, digests of the documents) of the owner's and the public data; makes the tokens where missing."""
    for key in SOURCES.values():
        if (path := getattr(run, key)) is not None and not pathlib.Path(path).exists():
            raise DataError(f"config.{key} {path!r} does not exist", "give a folder of documents or a token store")
    documents = documents_of(run)
    if is_lead() and not started:
        drop_stale_tokens(out, documents, initial.tokenizer.digest)
    barrier("stale tokens")
    return [_open_tokens(run, SOURCES[name], initial, out / TOKENS[name]) for name in documents], documents


def _open_tokens(run: RunConfig, key: str, initial: Start, tokens: pathlib.Path) -> TokenStore:
    """The tokens of `config.key`: a token store, OLMo files, or documents, tokenized once into the store `tokens`."""
    folder = pathlib.Path(getattr(run, key))
    kind = kind_of(folder)
    if kind == "store":
        return TokenStore.open(folder, initial.tokenizer)
    if kind == "olmo":
        vocab_size = initial.tokenizer.vocab_size
        dtype = run.token_dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")
        bos_id = None if initial.tokenizer.bos_id == initial.tokenizer.eos_id else initial.tokenizer.bos_id
        return TokenStore.from_olmo(folder, dtype, initial.tokenizer.eos_id, vocab_size, bos_id)
    if not tokens.exists() and is_lead():
        write_store(read_documents(folder, fields=fields_of(run, key)), initial.tokenizer, tokens)
    barrier(f"tokens of {key}")
    return TokenStore.open(tokens, initial.tokenizer)


def _write_product(
    product: pathlib.Path, run: RunConfig, initial: Start, trained: Params, skipped: int, identity: dict
) -> None:
    # Frozen leaves come from the start of the run, not from their copies in the compute dtype.
    _, frozen = partition(initial.params, freezing_mask(initial.params, run.owner, run.freeze))
    params = jax.tree.map(np.asarray, combine(trained, frozen))
    record = {
        "training": {
            "steps": run.steps,
            "tokens": run.steps * run.batch_size * run.seq_len,
            "skipped_steps": skipped,
            "config": identity["config"],
            "config_digest": digest(identity["config"]),
            "privacy_budget": None,
        },
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
