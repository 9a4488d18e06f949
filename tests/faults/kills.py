"""Real faults: kill -9 of writing processes at random moments, full disks, two processes on one run.

Every function yields one `Fault` per fault that it injects.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from flexmoe_jax.artifacts.checkpoints import verify_run
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_model, open_model
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out, replace
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.training.metrics import OF_TIME
from tests.tiny import contents, make_expert, make_release


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault: a description, whether it was detected and named, and whether it was survived.

    Survived: nothing is unreadable or wrong, and no more is lost than what is promised. A fault that leaves everything
    intact need not be detected.
    """

    what: str
    detected: bool
    survived: bool


def home(root: pathlib.Path) -> pathlib.Path:
    """Packages, and the models before and after every change that these tests interrupt."""
    release = make_release(root / "public")
    for name in ("code", "math", "news"):
        make_expert(root / name, name, release)
    make_expert(root / "code2", "code", release, seed=2)
    for out, names in {
        "all": ("code", "math", "news"),
        "without": ("code", "math"),
        "replaced": ("code2", "math", "news"),
    }.items():
        merge(root / "public", [root / name for name in names], root / out)
    return root


def killed(work: Callable[[], object], after_s: float) -> bool:
    """Runs `work` in a child process and kills it after `after_s` seconds; whether it was still running."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork")  # the child does nothing that needs JAX's threads
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0  # uninterrupted work does not fail
    return os.WIFSIGNALED(status)


def kill_changes(root: pathlib.Path, folder: pathlib.Path, number: int, seed: int) -> Iterator[Fault]:
    """Killed merges, opt-outs with a certificate, and replacements; the same call again must finish them."""
    rng = random.Random(seed)
    wanted = {
        "merge": contents(root / "all"),
        "opt-out": contents(root / "without"),
        "replace": contents(root / "replaced"),
    }
    last = dict.fromkeys(wanted, 0.05)  # seconds: adjusted so that kills hit
    count = 0
    while count < number:
        kind = rng.choice(list(wanted))
        place = folder / f"{kind}{count}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        model, proof = place / "model", place / "proof.json"
        if kind != "merge":
            shutil.copytree(root / "all", model)
        work = {
            "merge": lambda m=model: merge(root / "public", [root / n for n in ("code", "math", "news")], m),
            "opt-out": lambda m=model, p=proof: opt_out(m, "news", certificate=p),
            "replace": lambda m=model: replace(m, root / "code2"),
        }[kind]
        if not killed(work, rng.uniform(0, last[kind])):
            last[kind] *= 0.9
            continue
        last[kind] *= 1.05
        count += 1
        named, well = False, True
        if model.exists():
            opened, _ = load_model(model)  # the model before or after, every byte right
            before, after = (open_model(root / "all").digest, open_model(root / _after(kind)).digest)
            well &= opened.digest in (before, after)
            named = not all(f.ok for f in verify_model(model))
        well &= not proof.exists() or all(f.ok for f in verify_certificate(proof, model))
        if not (kind == "merge" and model.exists()) and not (kind == "opt-out" and proof.exists()):
            work()
        well &= contents(model) == wanted[kind] and all(f.ok for f in verify_model(model))
        well &= not [p for p in place.iterdir() if p.name.startswith(".")] or kind == "opt-out"
        yield Fault(f"kill -9 during {kind}", named, well)
        shutil.rmtree(place)


def _after(kind: str) -> str:
    return {"merge": "all", "opt-out": "without", "replace": "replaced"}[kind]


SAVING = """
import hashlib, pathlib, sys
import jax.numpy as jnp
import numpy as np
from flexmoe_jax.artifacts.checkpoints import RunCheckpoints
from flexmoe_jax.errors import ArtifactError

def state(step):  # different for every step, and incompressible
    draw = np.random.default_rng(step).standard_normal
    return {"w": jnp.asarray(draw(200_000, np.float32))}, {"m": jnp.asarray(draw(200_000, np.float32))}

with RunCheckpoints(sys.argv[1]) as checkpoints:
    found = checkpoints.restore(*state(0))
    step = 0
    if found is not None:
        step = found.step
        expected = state(step)
        assert found.data_state == {"next": step} and found.meta == {"step": step}
        assert (found.trainable["w"] == expected[0]["w"]).all() and (found.opt_state["m"] == expected[1]["m"]).all()
    print("restored", step, len(found.skipped) if found else 0, flush=True)
    for step in range(step + 1, step + 1 + int(sys.argv[2])):
        checkpoints.save(step, *state(step), {"next": step}, {"step": step})
        checkpoints.wait()
        print("saved", step, flush=True)
"""


def saving(run: pathlib.Path, steps: int) -> subprocess.Popen:
    """A process that restores and checks the run's state, then saves and reports step after step."""
    command = [sys.executable, "-c", SAVING, str(run), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_saves(run: pathlib.Path, number: int, seed: int) -> Iterator[Fault]:
    """A run killed while it saves step after step: no step that it reported as saved may be lost or wrong."""
    rng, announced = random.Random(seed), 0
    for _ in range(number + 1):
        process = saving(run, 10_000)
        assert process.stdout is not None
        first = process.stdout.readline().split()
        if not first or first[0] != "restored":
            yield Fault("kill -9 during a checkpoint", False, False)
            return
        if announced:
            yield Fault("kill -9 during a checkpoint", int(first[2]) > 0, int(first[1]) >= announced)
        for _ in range(rng.randrange(1, 4)):
            announced = int(process.stdout.readline().split()[1])
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        rest = process.communicate()[0].splitlines()
        announced = max([announced, *(int(line.split()[1]) for line in rest if line.startswith("saved"))])
    assert all(f.ok for f in verify_run(run) if f.subject.startswith(f"checkpoints/{announced}/"))


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
    """A tmpfs of `size` at `folder`; OSError if it cannot be mounted."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        raise OSError("a tmpfs cannot be mounted here: run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk_saves(disk: pathlib.Path, number: int) -> Iterator[Fault]:
    """Checkpoints onto a full disk: an error, no "saved", and the last good step is restored when there is room."""
    good = 0
    for _ in range(number):
        filler = disk / "filler"
        room = shutil.disk_usage(disk).free
        filler.write_bytes(b"x" * max(room - 1_000_000, 0))  # less than a step takes
        process = saving(disk / "run", 5)
        out, err = process.communicate(timeout=300)
        saved = [int(line.split()[1]) for line in out.splitlines() if line.startswith("saved")]
        named = process.returncode != 0 and "ArtifactError: saving step" in err
        good = max([good, *saved])
        filler.unlink()
        process = saving(disk / "run", 2)
        out, err = process.communicate(timeout=300)
        restored = int(out.split()[1]) if out.startswith("restored") else -1
        yield Fault("disk full during a checkpoint", named, restored >= good and process.returncode == 0)
        good = restored + 2


def full_disk_changes(root: pathlib.Path, disk: pathlib.Path, number: int) -> Iterator[Fault]:
    """Merges onto a disk that is too small: an error, and nothing is left of them."""
    for count in range(number):
        filler = disk / "filler"
        filler.write_bytes(b"x" * max(shutil.disk_usage(disk).free - 4096 * (1 + 3 * count), 0))
        named = False
        try:
            merge(root / "public", [root / "code"], disk / "model")
        except ArtifactError as error:
            named = "No space left" in str(error)
        yield Fault("disk full during merge", named, [p.name for p in disk.iterdir()] == ["filler"])
        filler.unlink()


def second_process(run: pathlib.Path, number: int) -> Iterator[Fault]:
    """A second process on a run directory in use: refused with the number of the first process, which continues."""
    first = saving(run, 10_000)
    assert first.stdout is not None
    first.stdout.readline()
    for _ in range(number):
        second = saving(run, 1)
        out, err = second.communicate(timeout=300)
        named = second.returncode != 0 and f"is in use by process {first.pid}" in err
        yield Fault("second process on a run", named, not out and first.stdout.readline().startswith("saved"))
    first.kill()
    first.communicate()


def stop_training(world: pathlib.Path, folder: pathlib.Path, number: int, seed: int) -> Iterator[Fault]:
    """A run killed or terminated at random steps and resumed ends bit-identical to an uninterrupted run.

    Compares parameters, optimizer moments, data state, counters and metrics. SIGTERM must end in exit code 75.
    """
    from tests.tiny import expert_run

    rng, steps = random.Random(seed), 40 * (number + 1)
    settings = {"steps": steps, "save_every": 4, "log_every": 1}
    runs = [expert_run(folder / n, "news", world / "public/run/model", **settings) for n in ("whole", "stopped")]
    process = _training(runs[0])
    assert process.wait() == 0
    stopped, faults = runs[1], []
    for count in range(number):
        process, kind = _training(stopped), signal.SIGTERM if count % 2 else signal.SIGKILL
        target = 40 * (count + 1) - rng.randrange(30)
        while _steps(stopped) < target:
            assert process.poll() is None
            time.sleep(0.002)
        before = _saved(stopped)
        process.send_signal(kind)
        code = process.wait()
        named = kind == signal.SIGKILL or code == 75
        word = "SIGTERM" if count % 2 else "kill -9"
        faults.append((f"{word} during training", named, named and _saved(stopped) >= before))
    assert _training(stopped).wait() == 0
    same = _end(runs[0]) == _end(stopped)
    yield from (Fault(what, named, well and same) for what, named, well in faults)


TRAINING = """
import json, sys
from flexmoe_jax.cli.main import use_compilation_cache
use_compilation_cache()
from flexmoe_jax.config import RunConfig
from flexmoe_jax.mapping import from_mapping
from flexmoe_jax.training.loop import Stopped, train
try:
    train(from_mapping(RunConfig, json.loads(sys.argv[1])))
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def _training(run) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", TRAINING, json.dumps(dataclasses.asdict(run))])


def _steps(run) -> int:
    metrics = pathlib.Path(run.out, "metrics.jsonl")
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _saved(run) -> int:
    return max((int(file.stem) for file in pathlib.Path(run.out, "digests").glob("*.json")), default=0)


def _end(run) -> tuple:
    """The final state and metrics of a run, in comparable form."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    out = pathlib.Path(run.out).absolute()
    step = out / "checkpoints" / str(run.steps)
    trees = [ocp.StandardCheckpointer().restore(step / item) for item in ("trainable", "optimizer")]
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]
    small = [(step / item / "metadata").read_text() for item in ("data", "meta")]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines]
    return leaves, small, metrics, contents(out / "package")
