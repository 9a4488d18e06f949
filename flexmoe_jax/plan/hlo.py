"""Collectives of a compiled program, read from its HLO text and counted as often as they run."""

import math
import re
from collections.abc import Iterator

_DTYPES = {1: "pred s8 u8", 2: "s16 u16 bf16 f16", 4: "s32 u32 f32", 8: "s64 u64 f64"}
_BYTES = {dtype: size for size, dtypes in _DTYPES.items() for dtype in dtypes.split()}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)")


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """{kind: (how often it runs, bytes that a device receives)} of a compiled module's text.

    Of an array of S bytes, a device in a group of g receives S (g-1)/g of the result by an all-gather, S (g-1)/g of the
    operand by a reduce-scatter or an all-to-all, both by an all-reduce, and S by a collective-permute. A TPU program
    names one collective in several places when it overlaps it with other work; such a chain counts once.
    """
    computations = _computations(text)
    entry = next(match[1] for match in re.finditer(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE))
    channels: dict[str, tuple[str, float, int]] = {}
    for place, line, times in _walk(computations, entry, 1):
        match = _COLLECTIVE.search(line)
        size = _received(match[1], match[2], line) if match else 0.0
        if match and size:
            piece = re.search(r"channel_id=\d+", line) if "chain_id=" in line else None
            key = piece[0] if piece else place
            channels[key] = max(channels.get(key, ("", 0.0, 0)), (match[2], size, times), key=lambda seen: seen[2])
    found: dict[str, tuple[int, float]] = {}
    for kind, size, times in channels.values():
        count, total = found.get(kind, (0, 0.0))
        found[kind] = (count + times, total + times * size)
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """{name of a computation: its lines}."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, str, int]]:
    """(place, line, how often it runs) of each collective reached from computation `name`, which runs `times` times."""
    for i, line in enumerate(computations.get(name, ())):
        if _COLLECTIVE.search(line):
            yield f"{name}:{i}", line, times
            continue
        trips = _trips(computations, line) if " while(" in line else 1
        for called in _CALLED.findall(line):
            for inner in called.split(", "):
                yield from _walk(computations, inner.lstrip("%"), times * trips)


def _trips(computations: dict[str, list[str]], line: str) -> int:
    """Trip count of a loop: the compiler's note, else the bound in the loop's condition, else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = computations.get(re.search(r"condition=%?([\w.-]+)", line)[1], [])  # type: ignore[index]
    root = next((line for line in condition if "ROOT" in line and "direction=LT" in line), "")
    bounds = [
        c for c in condition if re.search(r"= [su]32\[\]\S* constant\(", c) and c.split(" = ")[0].split("%")[-1] in root
    ]
    return int(re.search(r"constant\((\d+)\)", bounds[0])[1]) if bounds else 1  # type: ignore[index]


def _received(result: str, kind: str, line: str) -> float:
    """Bytes that a device receives by one run of the collective on `line`, whose result type is `result`."""
    arrays = [
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in _ARRAY.findall(result)
    ]
    if kind == "collective-permute":
        return float(max(arrays))
    group = _group(line)
    # The result of an all-gather-start is (operands, results): its second half counts.
    started = "all-gather-start(" in line
    size = sum(arrays[len(arrays) // 2 :] if started else arrays)
    if kind == "reduce-scatter":
        return size * (group - 1.0)
    return size * (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _group(line: str) -> int:
    """Devices per group: 2 in `{{0,1},{2,3}}`, 4 in `[2,4]<=[8]` and in `mesh['x'=2,'y'=4] {'y'}`."""
    groups = line.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]*)\}", groups):
        return match[1].count(",") + 1
    if match := re.match(r"\[([\d,]+)\]<=", groups):
        return int(match[1].split(",")[-1])
    if match := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'\w+'", match[2]))
    return 1
