"""Tampering with packages, models and run checkpoints on disk, one file or directory at a time."""

import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

from flexmoe_jax.artifacts.checkpoints import RunCheckpoints, verify_run
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_model
from flexmoe_jax.artifacts.package import load_package, verify_package
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.files import list_files
from tests.faults.kills import Fault
from tests.tiny import flip_bit

KINDS = ("flipped bit", "truncated", "missing", "extra", "swapped file", "missing folder", "swapped folder")


def damage(folder: pathlib.Path, kind: str, rng: random.Random, leave: tuple[str, ...] = ()) -> str:
    """Damages one file or directory under `folder`; returns the last part of its name, which must be reported.

    For two swapped ones, as a|b, one must be reported: if one is a manifest, the other cannot be checked.
    """
    names = [name for name in list_files(folder)[0] if name not in leave and (folder / name).stat().st_size]
    name = rng.choice(names)
    file = folder / name
    if kind == "flipped bit":
        flip_bit(file, rng.randrange(file.stat().st_size), rng.randrange(8))
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    elif kind == "missing":
        file.unlink()
    elif kind == "extra":
        (file.parent / "extra").write_bytes(rng.randbytes(8))
        return "extra"
    elif kind == "swapped file":
        others = [other for other in names if (folder / other).read_bytes() != file.read_bytes()]
        other = folder / rng.choice(others)
        _swap(file, other)
        return f"{file.name}|{other.name}"
    else:
        folders = sorted({p for p in folder.rglob("*") if p.is_dir() and any(p.iterdir())})
        chosen = rng.choice(folders)
        if kind == "missing folder":
            shutil.rmtree(chosen)
        else:
            pairs = [(a, b) for a in folders for b in folders if a != b and a not in b.parents and b not in a.parents]
            chosen, other = rng.choice(pairs)
            _swap(chosen, other)
            return f"{chosen.name}|{other.name}"
        return chosen.name
    return file.name


def _swap(a: pathlib.Path, b: pathlib.Path) -> None:
    c = a.with_name("swapping")
    a.rename(c)
    b.rename(a)
    c.rename(b)


def tamper(
    things: dict[str, pathlib.Path], like: tuple, folder: pathlib.Path, number: int, seed: int
) -> Iterator[Fault]:
    """`number` damages spread over the package, the model and the run in `things`: detected, named, and never used.

    If only the newest step of a run is damaged, the step before must be used, and the damaged one reported.
    """
    rng = random.Random(seed)
    readers: dict[str, tuple[Callable, Callable]] = {
        "package": (verify_package, load_package),
        "model": (verify_model, load_model),
    }
    for count in range(number):
        what, kind = [*things][count % len(things)], KINDS[count // len(things) % len(KINDS)]
        path = shutil.copytree(things[what], folder / what)
        if what == "run":
            newest = max((path / "checkpoints").iterdir(), key=lambda p: int(p.name))
            name = damage(newest, kind, rng)
            checks = verify_run(path)
            with RunCheckpoints(path) as checkpoints:
                restored = checkpoints.restore(*like)
            assert restored is not None
            refused = restored.step == int(newest.name) - 1 and [s for s, _ in restored.skipped] == [int(newest.name)]
        else:
            verify, load = readers[what]
            # Loading needs neither the journal nor entries that do not belong to the model.
            name = damage(path, kind, rng, leave=("journal.jsonl",))
            checks = verify(path)
            try:
                load(path)
                refused = kind == "extra"
            except FlexMoEError:
                refused = True
        reported = " ".join(f"{f.subject} {f.detail}" for f in checks if not f.ok)
        yield Fault(f"{kind}, {what}", any(part in reported for part in name.split("|")), refused)
        shutil.rmtree(path)
