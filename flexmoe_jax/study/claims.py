"""What a study shows, in sentences made from its intervals: "beats" and "loses to" have an interval without 0.

A difference that was not seen may be there. Every "no difference" therefore says what could have been seen: the
smallest difference that would have been found with 80% power at 5%.
"""

from collections.abc import Iterable, Sequence

from flexmoe_jax.study.intervals import Interval
from flexmoe_jax.study.results import MARK, MEAN, PUBLIC_TEXT, Kind, Regret, Results, SystemResult
from flexmoe_jax.tree import PUBLIC

ORACLE = "oracle dense expert"
WITHIN, LOST = 0.02, 0.01  # goals: behind the oracle on an owner's text; lost on public text


def sign(difference: Interval) -> int:
    """1 where the whole interval is above 0, -1 where it is below, 0 where it holds 0."""
    return (difference.low > 0) - (difference.high < 0)


def headline(results: Results) -> str:
    """The paragraph that a reader who reads nothing else should read."""
    method, owners, seeds = results.method, results.owners, results.config["seeds"]
    baselines = results.grouped().get(Kind.BASELINE, [])
    blind = [system for system in baselines if not system.sees_text]
    seeing = [system for system in baselines if system.sees_text]
    found = [
        f"{method.name} merges what {len(owners)} owners ({listed(owners)}) trained apart beside one public model; a",
        f"token costs {results.relative_cost(method):.2f} times what it costs the public model.",
        f"On the mean of public and owners' text (bits per byte, {seeds} seed{'s' if seeds != 1 else ''})",
        f"{'; '.join(_against('it', blind, MEAN))}.",
    ]
    if seeing:
        found.append(f"Of the systems that see the text they score ({MARK}), {_counted(seeing)}.")
    return " ".join([*found, *regret_sentences(results), *goals(results), opting_out(results), *warnings(results)])


def differences(results: Results, kind: Kind, column: str = MEAN) -> list[str]:
    """Sentences on the method against all systems of a kind."""
    found = _against(results.method.name, results.grouped().get(kind, []), column)
    return [f"{clause[:1].upper()}{clause[1:]}." for clause in found]


def _by_sign(systems: Sequence[SystemResult], column: str) -> dict[int, list[SystemResult]]:
    """The systems that the method beats (1), loses to (-1), and that no difference is seen to (0); none is empty."""
    found = {which: [s for s in systems if sign(s.against_method[column]) == which] for which in (1, -1, 0)}
    return {which: some for which, some in found.items() if some}


def _against(subject: str, systems: Sequence[SystemResult], column: str) -> list[str]:
    """What the method, as `subject`, beats, what it loses to, and where no difference was seen; by name."""
    words = {1: f"{subject} beats", -1: f"{subject} loses to", 0: "no difference is seen to"}
    return [
        f"{words[which]} {listed([_named(system, column) for system in some])}"
        for which, some in _by_sign(systems, column).items()
    ]


def _named(system: SystemResult, column: str) -> str:
    difference = system.against_method[column]
    what = _size(difference.value) if sign(difference) else unseen(difference)
    name = "the public model" if system.name == PUBLIC else system.label
    return f"{name} ({what})" if what else name


def _counted(systems: Sequence[SystemResult]) -> str:
    """As `_against` on the mean, without names: how many, and by how much."""
    words, parts = {1: "it beats", -1: "it loses to", 0: "no difference is seen to"}, []
    for which, some in _by_sign(systems, MEAN).items():
        sizes = sorted(abs(system.against_method[MEAN].value) for system in some)
        span = " to ".join(dict.fromkeys((_size(sizes[0]), _size(sizes[-1]))))
        parts.append(f"{words[which]} {len(some)}" + (f" (by {span})" if which else ""))
    return listed(parts)


def regret_sentences(results: Results) -> list[str]:
    """What joining costs or gives the owners."""
    rows = [row for row in results.joined if row.model == results.method.name]
    owners = [row for row in rows if row.owner != PUBLIC]
    sentences = [
        *_regret(owners, "against_public", "the public model alone"),
        *_regret(owners, "against_hybrid", "the owner's own hybrid"),
    ]
    for row in rows:
        if row.owner == PUBLIC:
            bits = results.public.bits_per_byte[results.public_text].value
            change = f"{abs(row.against_public.value) / bits:.1%}"
            word = {1: f"loses {change}", -1: f"gains {change}", 0: "shows no difference"}[sign(row.against_public)]
            could = unseen(row.against_public)
            sentences.append(
                f"On public text it {word}{f' ({could})' if could and not sign(row.against_public) else ''}."
            )
    return sentences


def _regret(rows: Iterable[Regret], key: str, other: str) -> list[str]:
    found: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for row in rows:
        difference: Interval = getattr(row, key)
        what = unseen(difference) if sign(difference) == 0 else _size(difference.value)
        found[sign(difference)].append(f"{row.owner} ({what})" if what else row.owner)
    words = {-1: "better on the text of", 1: "worse on the text of", 0: "no different, as far as seen, on that of"}
    parts = [f"{words[which]} {listed(names)}" for which, names in found.items() if names]
    return [f"Against {other} it is {'; '.join(parts)}."] if parts else []


def goals(results: Results) -> list[str]:
    """Whether the merge is close to the oracle on every owner's text and keeps the public text."""
    found = []
    if any(system.name == ORACLE for system in results.systems):
        oracle = results.of(ORACLE)
        behind = {owner: _behind(oracle, owner) for owner in results.owners}
        found.append(_goal(f"within {WITHIN:.0%} of the best dense expert", behind, WITHIN))
    lost = {PUBLIC_TEXT: _behind(results.public, results.public_text)}
    return [*found, _goal(f"at most {LOST:.0%} lost", lost, LOST)]


def _behind(system: SystemResult, column: str) -> Interval:
    """How far the method is behind a system, in parts of the system's bits per byte."""
    difference, bits = -system.against_method[column], system.bits_per_byte[column].value
    return Interval(difference.value / bits, difference.low / bits, difference.high / bits)


def _goal(what: str, behind: dict[str, Interval], most: float) -> str:
    """Whether the whole interval keeps to `most` (met), exceeds it (missed), or neither (open)."""
    states: dict[str, list[str]] = {"met": [], "missed": [], "open": []}
    for name, found in behind.items():
        state = "met" if found.high <= most else "missed" if found.low > most else "open"
        states[state].append(f"{name} ({found.value:+.1%})")
    parts = [f"{state} on {listed(names)}" for state, names in states.items() if names]
    return f"The goal of {what} is {', '.join(parts)}."


def opting_out(results: Results) -> str:
    """Whether the model that an owner left is one that was never merged with it."""
    equal = [row["equal"] for seed in results.opting_out for row in seed.values()]
    if all(equal):
        return f"Opting out is exact: {len(equal)} of {len(equal)} models have the digest of one never merged."
    return f"Opting out is NOT exact: {sum(equal)} of {len(equal)} models have the digest of one never merged."


def warnings(results: Results) -> list[str]:
    """What a reader must know before believing an interval."""
    found = []
    if results.public.against_method[MEAN].smallest is None:
        found.append(
            "These intervals are percentiles of a bootstrap, which are too narrow, and do not say what could have been"
            " seen: the study was measured before both were mended."
        )
    if results.config["seeds"] == 1:
        found.append("One seed: the intervals cover the choice of documents, not of trainings.")
    few = [domain for domain, size in results.documents.items() if size.get("groups", 3) < 3]
    if few:
        what = f"The text of {listed(few)} is of fewer than three groups of documents"
        found.append(f"{what}: its own intervals are too narrow.")
    return found


def chosen(results: Results) -> str:
    """The numbers that baselines chose on validation text, by domain: of every seed, one where all chose the same."""
    parts = []
    for system in results.systems:
        if system.chosen:
            cells = [
                f"{domain} {'/'.join(f'{n:g}' for n in dict.fromkeys(by))}" for domain, by in system.chosen.items()
            ]
            parts.append(f"{system.name}: {', '.join(cells)}")
    return "; ".join(parts)


def unseen(difference: Interval) -> str:
    """The smallest difference that could have been seen, in words; empty where it is not known."""
    return "" if difference.smallest is None else f"{_size(difference.smallest)} could have been seen"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def _size(value: float) -> str:
    """A difference without its sign, in three decimals."""
    return f"{abs(value):.3f}" if abs(value) >= 0.0005 else "under 0.0005"
