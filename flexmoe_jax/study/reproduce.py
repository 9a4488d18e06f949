"""A study from start to end, and studies at several values of one of its numbers."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.sealed import differences
from flexmoe_jax.errors import ArtifactError, BusyError, ConfigError, did_you_mean
from flexmoe_jax.files import lock_directory, write_json
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.ranges import ranges_of
from flexmoe_jax.study import tables
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.rates import searches
from flexmoe_jax.study.results import RESULTS, SAMPLES, Results, write_results
from flexmoe_jax.study.scoring import Bench, make_texts
from flexmoe_jax.study.sharing import every, once, until_free
from flexmoe_jax.study.suites import Scores, by_seed, score_suites
from flexmoe_jax.study.systems import METHOD, systems
from flexmoe_jax.study.train import OF_PUBLIC, OF_SHARED, make_shared, train_public, train_seed
from flexmoe_jax.study.workshop import Artifacts

log = logging.getLogger(__name__)

MAY_DIFFER = ("out", "seeds", "ablations", "systems", "leave_out", "suites")  # of studies that share a folder


def reproduce(config: StudyConfig, shared: pathlib.Path | None = None) -> Results:
    """Runs the study in `config.out`, or what is missing of it; writes and returns its results.

    `shared` is the folder of another study of the same domains, whose mix and domain vectors are used. Other processes
    may run the same study at the same time: each makes what no other does. Raises ArtifactError where `config.out`
    holds another study.
    """
    root = pathlib.Path(config.out)
    shared = root if shared is None else shared
    root.mkdir(parents=True, exist_ok=True)
    with _held(root):
        check_same(config, root)
    public = _prepare(config, shared, root)
    config = dataclasses.replace(config, model=open_model(public).config)  # results tell it where config.public has it
    texts = make_texts(config, shared / "mix")
    homes = [root / f"seed-{seed}" for seed in range(config.seeds)]
    benches = [Bench(config, Artifacts({}), texts, shared / "mix", home) for home in homes]

    def work(seed: int, bench: Bench) -> Scores:
        train = functools.partial(train_seed, config, shared, public, bench.home, seed, bench.artifacts)
        every([train, *(functools.partial(bench.add, system.name, system.score) for system in systems(config))])
        every(functools.partial(_opt_out, bench, owner) for owner in config.owners)
        return score_suites(bench)

    suites = until_free(lambda: every(functools.partial(work, *one) for one in enumerate(benches)))
    with lock_directory(root, f".{RESULTS}.lock", wait=True):
        return _write_results(config, shared, benches, suites)


def _prepare(config: StudyConfig, shared: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """Makes the text and vectors in `shared`, and the public model of the study in `root`, one process at a time."""
    shared.mkdir(parents=True, exist_ok=True)
    with _held(shared):
        make_shared(config, shared)
    with _held(root):
        return train_public(config, shared, root)


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    """The lock of a folder of studies; the log says who is waited for."""
    name, stack = ".study.lock", contextlib.ExitStack()
    try:
        stack.enter_context(lock_directory(folder, name))
    except BusyError as error:
        log.info(f"waiting: {error.what}")
        stack.enter_context(lock_directory(folder, name, wait=True))
    with stack:
        yield


def _opt_out(bench: Bench, owner: str) -> dict[str, Any]:
    """`compare_never_merged` of one owner, kept in the seed's folder."""
    path = bench.home / "left" / f"{owner}.json"
    once(path, lambda path: write_json(path, tables.compare_never_merged(bench.artifacts, owner)))
    return parse_json(read_bytes(path), path)


def _write_results(
    config: StudyConfig, shared: pathlib.Path, benches: Sequence[Bench], suites: Sequence[Scores]
) -> Results:
    """Writes and returns the results of seeds that are trained and scored."""
    root = pathlib.Path(config.out)
    texts, scores = benches[0].texts, [bench.scores for bench in benches]
    results = Results(
        study=root.resolve().name,
        config=to_mapping(config),
        documents=tables.document_sizes(texts.heldout),
        opting_out=[{owner: _opt_out(bench, owner) for owner in config.owners} for bench in benches],
        regret=tables.regret(config, texts.heldout, scores),
        curves=tables.curves(config, root),
        classifiers=tables.classifiers(config, shared),
        suites=by_seed(suites),
        rates=searches(root),
        systems=tables.tabulate(config, texts.heldout, scores),
    )
    # Held-out text stays in the study's folder: results may be published, news may not.
    heldout = {domain: [text.text for text in some] for domain, some in texts.heldout.items()}
    write_json(root / SAMPLES, tables.samples(load(benches[0].artifacts.models[METHOD]), heldout))
    write_results(root / RESULTS, [results])
    return results


def vary(config: StudyConfig, key: str, values: Sequence[str]) -> dict[str, Results]:
    """{value: results} of the study at each value of one number, of the method and the dense experts only.

    Each is a study of its own in `config.out`/KEY-VALUE; `config.out`/KEY.jsonl has the results of all. They share the
    text and the public model where these do not depend on the number.
    """
    kinds = {name: allowed.kind for name, allowed in ranges_of(StudyConfig).items()}
    if key not in kinds:
        raise ConfigError(f"config.{key} cannot be varied", did_you_mean(key, kinds))
    if config.public is not None and key in ("public_steps", "public_share"):
        raise ConfigError(f"config.public is {config.public!r} and config.{key} is varied", "leave config.public out")
    root, base = pathlib.Path(config.out), dataclasses.replace(config, systems="method")
    try:
        changes: list[dict] = [{key: kinds[key](value), "out": str(root / f"{key}-{value}")} for value in values]
        studies = [dataclasses.replace(base, **change) for change in changes]
    except ValueError as error:
        raise ConfigError(f"{key} is varied over {', '.join(values)}: {error}", "give numbers") from error
    if key not in OF_PUBLIC:
        root.mkdir(parents=True, exist_ok=True)
        public = str(_prepare(base, root, root))
        studies = [dataclasses.replace(study, public=public) for study in studies]
    shared = None if key in OF_SHARED else root
    results = {value: reproduce(study, shared) for value, study in zip(values, studies, strict=True)}
    write_results(root / f"{key}.jsonl", results.values())
    return results


def check_same(config: StudyConfig, root: pathlib.Path) -> None:
    """Refuses a folder that holds another study, since its models and scores would be taken for this one's.

    More seeds, other ablations, more systems and suites may be added.
    """
    path, fields = root / "study.json", to_mapping(config)
    fields = {key: value for key, value in fields.items() if key not in MAY_DIFFER}
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, fields)
    elif lines := differences(parse_json(read_bytes(path), path), fields):
        raise ArtifactError(
            f"{root} holds another study (there != now):\n    " + "\n    ".join(lines), "give another config.out"
        )
