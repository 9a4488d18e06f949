"""The learning rate of each kind of training, chosen by short runs with the first seed on text that is not reported.

Owners choose as `flexmoe lr-find` does: their own text decides, an expert is scored beside the public one, and all
owners of a kind take the rate with the lowest mean. For what is trained jointly all domains decide, though a trainer of
public text alone could not know them: baselines are to be as strong as they can be.

`rates.json` in the study's folder holds {kind: {rate: bits per byte}} of what is done; null is training that diverged.
"""

import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from flexmoe_jax.api import Model, load
from flexmoe_jax.errors import BusyError, DivergedError, FlexMoEError
from flexmoe_jax.evaluate.perplexity import first_texts
from flexmoe_jax.files import lock_directory, remove_directory, write_json
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.study.config import Experts
from flexmoe_jax.study.results import RateSearch
from flexmoe_jax.study.scoring import held_out
from flexmoe_jax.study.sharing import every
from flexmoe_jax.study.workshop import Artifacts, Joint, Training, Workshop, folder_name
from flexmoe_jax.tree import PUBLIC

log = logging.getLogger(__name__)

FILE, FOLDER = "rates.json", "rates"  # in the folder of a study; the second holds what a search is training
PART = 3  # a trial has a third of the steps


def find_rate(name: str, trainings: Mapping[str, Training], workshop: Workshop, artifacts: Artifacts) -> float:
    """The rate at which all systems of the kind of `name` train; `trainings` has every system that is trained.

    Trials that `rates.json` does not have are done now, from `artifacts`. Raises FlexMoEError where all diverge, and
    BusyError with another seed than the first, or while another process does them.
    """
    rates, root = workshop.config.grid, workshop.home.parent
    if len(rates) == 1:
        return rates[0]
    kind = _kind(name, trainings[name])
    members = {other: how for other, how in trainings.items() if _kind(other, how) == kind}
    missing = [rate for rate in rates if f"{rate:g}" not in _read(root).get(kind, {})]
    if missing and workshop.seed:
        raise BusyError(f"{root} has no learning rate of {kind} yet", "train with the first seed before")
    every(functools.partial(_try, kind, rate, members, workshop, artifacts) for rate in missing)
    scores = _read(root)[kind]
    search = _chosen(kind, scores)
    if missing:
        end = ", an end of config.rates: a better one may lie beyond" if search.at_end else ""
        tried = ", ".join(f"{rate} {'diverged' if bits is None else f'{bits:.4f}'}" for rate, bits in scores.items())
        log.info(f"learning rates of {kind}, bits per byte: {tried}; all seeds train at {search.chosen:g}{end}")
    return search.chosen


def _try(kind: str, rate: float, members: Mapping[str, Training], workshop: Workshop, artifacts: Artifacts) -> None:
    """Trains the `members` at `rate`, unless it is done, and adds their score to `rates.json`."""
    root = workshop.home.parent
    name = folder_name(f"{kind} {rate:g}")
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    with lock_directory(root / FOLDER, f".{name}.lock"):
        if f"{rate:g}" in _read(root).get(kind, {}):
            return
        home = root / FOLDER / name
        score = _trial(members, dataclasses.replace(workshop, home=home, rate=rate), artifacts)
        with lock_directory(root, f".{FILE}.lock", wait=True):
            found = _read(root)
            found.setdefault(kind, {})[f"{rate:g}"] = score
            write_json(root / FILE, found)
        if home.exists():
            remove_directory(home)


def searches(root: pathlib.Path) -> dict[str, RateSearch]:
    """{kind of training: its search} of the study in `root`."""
    return {kind: _chosen(kind, scores) for kind, scores in _read(root).items()}


def _read(root: pathlib.Path) -> dict[str, dict[str, float | None]]:
    path = root / FILE
    found = parse_json(read_bytes(path), path) if path.exists() else {}
    return {kind: dict(sorted(scores.items(), key=lambda item: float(item[0]))) for kind, scores in found.items()}


def _chosen(kind: str, scores: dict[str, float | None]) -> RateSearch:
    finite = {rate: bits for rate, bits in scores.items() if bits is not None}
    if not finite:
        what = f"training of {kind} diverged at every learning rate: {', '.join(scores)}"
        raise FlexMoEError(what, "start the study again in another config.out, with lower config.rates")
    best = float(min(finite, key=lambda rate: finite[rate]))
    tried = [*map(float, scores)]
    return RateSearch(scores, best, at_end=best in (min(tried), max(tried)))


def _kind(name: str, training: Training) -> str:
    """What shares a rate: "dense" of "dense code", the training of one owner; else the system."""
    return name.removesuffix(f" {training.text}") if isinstance(training, Joint) else name


def _trial(members: Mapping[str, Training], workshop: Workshop, artifacts: Artifacts) -> float | None:
    """Mean bits per byte of the `members` after a part of their steps, with the schedule of so many; None: diverged."""
    steps = workshop.config
    short = dataclasses.replace(steps, owner_steps=_part(steps.owner_steps), tune_steps=_part(steps.tune_steps))
    workshop = dataclasses.replace(workshop, config=short)
    bits = []
    for name, training in members.items():
        if isinstance(training, Joint):
            training = dataclasses.replace(training, steps=_part(training.steps))
        try:
            model = load(workshop.make(name, training, artifacts))
        except DivergedError as error:
            log.info(f"{name} at {workshop.rate:g}: {error.what}")
            return None
        bits += _score(model, training, workshop)
    mean = float(np.mean(bits))
    return mean if math.isfinite(mean) else None


def _part(steps: int) -> int:
    return -(-steps // PART)


def _score(model: Model, training: Training, workshop: Workshop) -> list[float]:
    """Bits per byte on the validation text of each domain that decides."""
    config, mix = workshop.config, workshop.shared / "mix"
    scored: dict[str, Model] = dict.fromkeys((PUBLIC, *config.owners), model)
    match training:
        case Experts():
            scored = {owner: model.select((PUBLIC, owner)) for owner in config.owners}
        case Joint(text) if text in config.owners:
            scored = {text: model}
    bits = []
    for domain, scorer in scored.items():
        documents = held_out(mix / domain, validation=True)
        starts = [dataclasses.replace(document, text=document.text[: config.document_chars]) for document in documents]
        texts = first_texts(starts, config.heldout_bytes // 2)
        bits.append(scorer.score(texts, seq_len=config.seq_len).bits_per_byte)
    return bits
