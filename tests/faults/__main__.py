"""Injects real faults and prints their outcomes: `make test-faults`. Exit code 1 if one is lost or not detected."""

import collections
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

from flexmoe_jax.artifacts.checkpoints import RunCheckpoints
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import FlexMoEError
from tests.artifacts.test_checkpoints import advance, save, start
from tests.faults import hostile, kills, optouts, tamper
from tests.faults.kills import Fault
from tests.tiny import build_world

SEED = 0


def hostile_packages(root: pathlib.Path, folder: pathlib.Path, number: int):
    """Every attack, then manifests with one odd value, `number` in total: refused by name, in time, nothing written."""
    rng = random.Random(SEED)
    attacks = [*hostile.ATTACKS.items()]
    for count in range(number):
        package = shutil.copytree(root / "news", folder / "news")
        if count < len(attacks):
            name, (strike, words) = attacks[count]
            strike(package)
        else:
            name, words = hostile.alter_manifest(package, rng), ""
        before = hostile.snapshot(folder)
        try:
            with hostile.limits():
                merge(root / "public", [package], folder / "model")
            refused = named = False
        except FlexMoEError as error:
            refused, named = True, any(word in str(error) for word in words.split("|"))
        except (MemoryError, AssertionError):
            refused = named = False
        yield Fault(f"hostile package: {name}", refused and named, refused and hostile.snapshot(folder) == before)
        shutil.rmtree(folder)
        folder.mkdir()


def saved_run(path: pathlib.Path) -> pathlib.Path:
    state = start()
    with RunCheckpoints(path) as checkpoints:
        for step in (1, 2):
            state = advance(state)
            save(checkpoints, step, state)
    return path


def groups(root: pathlib.Path) -> Iterator[tuple[str, Iterator[Fault]]]:
    """(name, its faults), each set up in turn; those that fork come before those that start JAX."""
    home = kills.home(root / "home")
    yield "kill -9 in merge, opt-out, replace", kills.kill_changes(home, _new(root / "changes"), 60, SEED)
    with kills.small_disk(root / "disk", "2m") as disk:
        yield "disk full in merge", kills.full_disk_changes(home, disk, 10)
    things = {"package": home / "news", "model": home / "all", "run": saved_run(root / "run")}
    yield "tampered package, model, run", tamper.tamper(things, start(), _new(root / "tamper"), 231, SEED)
    yield "hostile packages", hostile_packages(home, _new(root / "hostile"), 200)
    yield "opt-outs in every order", optouts.every_order(_new(root / "orders"))
    yield "kill -9 in run checkpoints", kills.kill_saves(root / "saves", 25, SEED)
    yield "second process on a run", kills.second_process(root / "second", 3)
    with kills.small_disk(root / "disk2", "16m") as disk:
        yield "disk full in run checkpoints", kills.full_disk_saves(disk, 4)
    yield "kill -9, SIGTERM in training", kills.stop_training(build_world(root / "world"), root / "training", 6, SEED)


def main() -> int:
    started = time.monotonic()
    rows: list[tuple[str, list[Fault]]] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        for group, faults in groups(pathlib.Path(name)):
            rows.append((group, list(faults)))
            print(f"{time.monotonic() - started:6.0f} s  {group}", file=sys.stderr, flush=True)
        sizes = optouts.merge_at_size(_new(pathlib.Path(name) / "size"), 256, (2, 4, 8, 16))
    total = [fault for _, faults in rows for fault in faults]
    print("| faults | injected | detected | survived | lost |\n|---|---|---|---|---|")
    for group, faults in [*rows, ("all", total)]:
        detected, survived = (sum(getattr(f, name) for f in faults) for name in ("detected", "survived"))
        print(f"| {group} | {len(faults)} | {detected} | {survived} | {len(faults) - survived} |")
    print("\n| merge and export of experts of 256 MiB | bytes | seconds | peak memory |\n|---|---|---|---|")
    for row in sizes:
        gib, peak = row["bytes"] / (1 << 30), f"{row['peak'] >> 20}" if "peak" in row else "below 512"
        print(f"| {row['experts']}, {row['how']} | {gib:.2f} GiB | {row['seconds']:.1f} | {peak} MiB |")
    # A killed process cannot report its fault; everything else must be named.
    silent = [f for f in total if not f.detected and not f.what.startswith("kill -9")]
    lost = [f for f in total if not f.survived]
    for word, faults in (("LOST", lost), ("NOT DETECTED", silent)):
        for what, count in collections.Counter(f.what for f in faults).items():
            print(f"{word}: {count} x {what}")
    print(f"{time.monotonic() - started:.0f} seconds")
    return 1 if lost or silent else 0


def _new(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
