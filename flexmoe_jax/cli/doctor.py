"""`flexmoe doctor`: devices, versions, memory, processes and common mistakes of a machine."""

import dataclasses
import os

from flexmoe_jax.cli.common import add_json, emit, parser
from flexmoe_jax.doctor.checks import check_machine
from flexmoe_jax.doctor.facts import Facts, gather
from flexmoe_jax.doctor.rendezvous import Rendezvous, meet
from flexmoe_jax.errors import Check, MachineError
from flexmoe_jax.parallel.processes import place_of

GIB = 2**30
_TEXT = """Checks this machine: devices, versions, memory, environment and common mistakes, each with a remedy.

Exit code 1 if a check fails. Under a launcher (PROCESSES=2 launch/local.sh doctor, sbatch launch/slurm.sh doctor) the
processes of the job also connect to each other, which takes at most half a minute, and compare their versions."""


def doctor(argv: list[str]) -> int:
    """Prints the facts and the checks; 1 if a check fails."""
    p = parser("doctor", _TEXT, "flexmoe doctor --json")
    add_json(p)
    args = p.parse(argv)
    place = place_of(os.environ)
    facts = gather()
    roll = meet(place, _about(facts, place.count)) if place else None
    found = check_machine(facts, roll)
    emit(report(facts, found, roll), lines(facts, found, roll), args.json)
    bad = [check.subject for check in found if not check.ok]
    if bad:
        raise MachineError(f"{len(bad)} of {len(found)} checks are bad: {', '.join(bad)}", "see the remedies above")
    return 0


def report(facts: Facts, found: list[Check], roll: Rendezvous | None) -> dict:
    """Everything, for programs."""
    checks = [{"level": check.level, **dataclasses.asdict(check)} for check in found]
    result: dict = {"facts": dataclasses.asdict(facts), "checks": checks}
    return result | {"processes": None if roll is None else dataclasses.asdict(roll)}


def lines(facts: Facts, found: list[Check], roll: Rendezvous | None) -> list[str]:
    """Everything, for people."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    shown = [f"{facts.host}: {facts.system}, {facts.cores} of {facts.machine_cores} cores", f"  {versions}"]
    sizes = {
        "memory": facts.memory,
        "free": facts.memory_free,
        "/dev/shm": facts.shared_memory,
        "disk free here": facts.disk_free,
    }
    shown.append("  " + ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in sizes.items() if size is not None))
    for i, device in enumerate(facts.devices):
        memory = "" if not device.limit else f", {(device.used or 0) / GIB:.1f} of {device.limit / GIB:.1f} GiB used"
        shown.append(f"  device {i}: {device.platform}, {device.kind}{memory}")
    shown += [f"  {name}={value}" for name, value in facts.environment.items()]
    for number, about in roll.seen if roll else ():
        shown.append(f"  process {number}: {', '.join(f'{key} {value}' for key, value in about.items())}")
    for check in found:
        shown.append(f"{check.level:4}  {check.subject}: {check.detail}")
        if check.remedy:
            shown.append(f"      remedy: {check.remedy}")
    return shown


def _about(facts: Facts, count: int) -> dict[str, str]:
    """What this process tells the others about itself."""
    kinds = sorted({f"{facts.on(d.platform)} {d.kind}" for d in facts.devices})
    versions = {name: facts.versions.get(name, "?") for name in ("python", "jax", "flexmoe_jax")}
    return {"host": facts.host, **versions, "count": str(count), "devices": ", ".join(kinds)}
