"""The results of a study as JSON lines: one line for the study, then one for each system.

    {"format": "flexmoe-study-1", "study": "reproduction-small", "config": {...}, "documents": {...}, ...}
    {"study": "reproduction-small", "name": "FlexMoE", "kind": "method", "bits_per_byte": {...}, ...}
    {"study": "reproduction-small", "name": "public", "kind": "baseline", "bits_per_byte": {...}, ...}

A file may hold several studies one after another, for example one for each value of a varied number; every line names
its study.
"""

import dataclasses
import enum
import json
import pathlib
import typing
from collections.abc import Iterable
from typing import Any

from flexmoe_jax.artifacts.sealed import check_fields, check_format
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.json_files import MAX_TEXT_BYTES, parse_json, read_bytes
from flexmoe_jax.study.intervals import Interval
from flexmoe_jax.tree import PUBLIC

FORMAT = "flexmoe-study-1"
_REMEDY = "run `flexmoe reproduce` again with the same config.out, which trains nothing anew"
RESULTS, SAMPLES = "results.jsonl", "samples.json"  # files in the folder of a study
MEAN = "mean"  # over the public text and the owners' domains
PUBLIC_TEXT = "public text"  # the mean over the sources of the public text, where it has several
MARK = "\N{DAGGER}"
MARK_MEANS = f"{MARK} chooses or weighs models by the very text that it scores, and is no language model."
# Files that were written before have these keys,
_GONE = ("choice_items", "choice")
# and do not say that these systems see the text they score.
_SAW = {"BTM", "BTM, top-2", "prompt routing", "weighted soup", "oracle dense expert", "oracle expert, frozen trunk"}


class Kind(enum.StrEnum):
    """The groups in which systems are compared, in the order in which they are shown."""

    METHOD = "method"
    BASELINE = "baseline"
    ABLATION = "ablation"
    PART = "part"

    @property
    def heading(self) -> str:
        """What tables and the page call the group."""
        return {
            Kind.METHOD: "The method",
            Kind.BASELINE: "Baselines",
            Kind.ABLATION: "Ablations and variants",
            Kind.PART: "Parts: single experts, fewer owners",
        }[self]


@dataclasses.dataclass(frozen=True)
class SystemResult:
    """What was measured of one system. Keys of the dictionaries are domains, and "mean"."""

    name: str
    """Unique in the study."""

    kind: Kind
    """The group in which it is compared."""

    experts: list[str]
    """The experts kept, where the system is a selection of the merged model's experts; else empty."""

    sees_text: bool
    """Whether it chooses or weighs models by the very text that it scores."""

    bits_per_byte: dict[str, Interval]
    """On held-out text; lower is better."""

    against_method: dict[str, Interval]
    """`bits_per_byte` minus the method's, paired; empty for the method."""

    forward_flops_per_token: float
    """Floating-point operations of the forward pass."""

    training_flops_after_public: float
    """Floating-point operations of all owners' training together, without that of the public model."""

    share: dict[str, list[list[float]]]
    """Weight of each expert by domain, [layers][experts], with the first seed; empty where there is no router."""

    chosen: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By domain and seed what was chosen on validation text: causal BTM's forgetting factor; empty elsewhere."""

    @property
    def label(self) -> str:
        """Its name, with a mark where it sees the text that it scores."""
        return f"{self.name} {MARK}" if self.sees_text else self.name

    @property
    def mean(self) -> Interval:
        """Bits per byte over the public text and the owners' domains."""
        return self.bits_per_byte[MEAN]


@dataclasses.dataclass(frozen=True)
class Regret:
    """What a merge costs or gives an owner: bits per byte on its own text in the merged model, minus those without."""

    model: str
    """The system that was merged."""

    owner: str
    """The owner, or `public` for what the merge does to the public text."""

    against_hybrid: Interval | None
    """Minus those of the owner's own hybrid, {public, owner}; None for `public`."""

    against_public: Interval
    """Minus those of the public model alone."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Training loss of a run of `system` on `text` (a domain, or "all"): `points` are [step, nats per token]."""

    system: str
    text: str
    points: list[list[float]]


@dataclasses.dataclass(frozen=True)
class RateSearch:
    """How the learning rate of a kind of training was chosen."""

    bits_per_byte: dict[str, float | None]
    """Of short runs, on validation text, by rate; None where training diverged."""

    chosen: float
    """The rate with the lowest."""

    at_end: bool
    """Whether it is the lowest or the highest rate tried: a better one may lie beyond."""


@dataclasses.dataclass(frozen=True)
class Results:
    """A finished study."""

    study: str
    """Its name: that of its folder, which for a varied number tells the value."""

    config: dict[str, Any]
    """The `StudyConfig` it was run with, as JSON values."""

    documents: dict[str, dict[str, int]]
    """Held-out text by domain: the numbers of `documents` and `bytes`."""

    opting_out: list[dict[str, dict[str, Any]]]
    """By seed and owner: the digest of the model `left` by an opt-out, of one `never` merged with it, and `equal`."""

    regret: list[Regret]
    """What joining costs or gives each owner, in the merged models of the first two owners, three, and so on."""

    curves: list[Curve]
    """Of the runs with the first seed."""

    classifiers: dict[str, float]
    """Held-out accuracy of each owner's classifier."""

    suites: dict[str, dict[str, dict[str, list[float]]]]
    """Scores on the paper's tasks by system, task and measure (`accuracy`, `gold_bits_per_byte`), with each seed."""

    rates: dict[str, RateSearch]
    """By kind of training; empty where all trained at one rate."""

    systems: list[SystemResult]
    """One row per system."""

    @property
    def owners(self) -> list[str]:
        """Names in the order of their experts."""
        return sorted(self.config["domains"].split(","))

    @property
    def domains(self) -> list[str]:
        """Public text, source by source and the mean of several; the owners' domains; those that interleave two."""
        mixed = [domain for domain in self.documents if " + " in domain]
        public = [domain for domain in self.documents if domain not in (*mixed, *self.owners)]
        return [*public, *([PUBLIC_TEXT] if len(public) > 1 else []), *self.owners, *mixed]

    @property
    def public_text(self) -> str:
        """The column of all public text."""
        return PUBLIC_TEXT if PUBLIC_TEXT in self.domains else PUBLIC

    @property
    def method(self) -> SystemResult:
        """The row of the method."""
        return next(system for system in self.systems if system.kind == Kind.METHOD)

    @property
    def public(self) -> SystemResult:
        """The row of the public model."""
        return next(system for system in self.systems if system.name == PUBLIC)

    @property
    def joined(self) -> list[Regret]:
        """`regret`; where a file was written before there was any, that of the method, from its differences."""
        if self.regret:
            return self.regret
        method, public = self.method.name, self.public.against_method
        rows = [Regret(method, PUBLIC, None, -public[self.public_text])]
        for owner in self.owners:
            hybrid = next(system for system in self.systems if {*system.experts} == {PUBLIC, owner})
            rows.append(Regret(method, owner, -hybrid.against_method[owner], -public[owner]))
        return rows

    def of(self, name: str) -> SystemResult:
        """The row of a system; KeyError if there is none."""
        return {system.name: system for system in self.systems}[name]

    def grouped(self) -> dict[Kind, list[SystemResult]]:
        """Systems by kind in the order of `Kind`, the best mean first."""
        ranked = sorted(self.systems, key=lambda system: system.mean.value)
        groups = {kind: [system for system in ranked if system.kind == kind] for kind in Kind}
        return {kind: group for kind, group in groups.items() if group}

    def relative_cost(self, system: SystemResult) -> float:
        """Operations of a token's forward pass as a multiple of the public model's."""
        return system.forward_flops_per_token / self.public.forward_flops_per_token


def hybrid_of(owner: str) -> str:
    """The system that is the public expert with one owner's."""
    return f"hybrid {owner}"


def write_results(path: pathlib.Path, studies: Iterable[Results]) -> None:
    """Writes the studies as JSON lines, atomically."""
    lines = [json.dumps(line, ensure_ascii=False, allow_nan=False) for study in studies for line in json_lines(study)]
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def json_lines(study: Results) -> list[dict[str, Any]]:
    """The lines of one study as JSON values."""
    head = {"format": FORMAT, **dataclasses.asdict(study)}
    return [{key: value for key, value in head.items() if key != "systems"}] + [
        {"study": study.study, **system} for system in head["systems"]
    ]


def read_results(path: pathlib.Path) -> list[Results]:
    """The studies that `write_results` wrote at `path`. Raises ArtifactError for anything else."""
    studies: list[Results] = []
    for number, raw in enumerate(read_bytes(path, MAX_TEXT_BYTES).rstrip(b"\n").split(b"\n"), 1):
        where = f"{path}, line {number}"
        line = parse_json(raw, where, MAX_TEXT_BYTES)
        line = {key: value for key, value in line.items() if key not in _GONE}
        try:
            if "format" in line or not studies:
                studies.append(_study(line, where))
            elif line.pop("study") == studies[-1].study:
                studies[-1].systems.append(_system(line))
            else:
                raise ValueError(f"it is not of the study {studies[-1].study!r}")
        except FlexMoEError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{where} is not a line of results: {error!r}", _REMEDY) from error
    for study in studies:
        kinds, names = [system.kind for system in study.systems], [system.name for system in study.systems]
        if kinds.count(Kind.METHOD) != 1 or PUBLIC not in names:
            what = f"{path}: the study {study.study!r} has {kinds.count(Kind.METHOD)} methods and the systems {names}"
            raise ArtifactError(f"{what}, not 1 method and {PUBLIC!r}", _REMEDY)
    return studies


def _study(line: dict[str, Any], where: str) -> Results:
    check_format(line, FORMAT, where)
    line = {"rates": {}, "suites": {}, "regret": [], **line}  # files of before have none
    fields = [field for field in dataclasses.fields(Results) if field.name != "systems"]
    kinds: dict[str, Any] = {field.name: typing.get_origin(field.type) or field.type for field in fields}
    check_fields(line, {"format": str, **kinds}, where)
    curves = [Curve(**curve) for curve in line["curves"]]
    rates = {kind: RateSearch(**row) for kind, row in line["rates"].items()}
    regret = [
        Regret(**row | {key: row[key] and Interval(**row[key]) for key in ("against_hybrid", "against_public")})
        for row in line["regret"]
    ]
    return Results(
        **{key: line[key] for key in kinds} | {"curves": curves, "regret": regret, "rates": rates, "systems": []}
    )


def _system(line: dict[str, Any]) -> SystemResult:
    cells = {
        key: {domain: Interval(**cell) for domain, cell in line[key].items()}
        for key in ("bits_per_byte", "against_method")
    }
    line = {"sees_text": line["name"] in _SAW, **line}
    kind = Kind(line["kind"])
    for key, row in cells.items():
        if MEAN not in row and (key, kind) != ("against_method", Kind.METHOD):
            raise ValueError(f"{key} has no {MEAN!r}")
    return SystemResult(**line | cells | {"kind": kind})
