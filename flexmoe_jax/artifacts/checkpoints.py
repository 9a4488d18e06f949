"""Run checkpoints: the private state of one training run, resumable bit for bit.

    run/
      .lock                 held while a process uses the run
      checkpoints/<step>/   Orbax CheckpointManager: trainable, optimizer, data, meta
      digests/<step>.json   sealed sha256 of every file of that step, written after Orbax commits it
      damaged/<step>/       damaged steps that a restore skipped

Leaves have the names that they have in a model, whatever mesh wrote them: the caller stacks experts only in memory. Any
mesh restores what another one saved.

Orbax restores flipped bits without an error. A step therefore counts as saved only when its digests are written, and is
checked against them before it is used. Frozen leaves are not in a checkpoint: they are those of the public model, which
the caller identifies by digest in `meta` or in `run.json`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from flexmoe_jax.artifacts import arrays
from flexmoe_jax.artifacts.sealed import check_fields, is_sha256, read_sealed, write_sealed
from flexmoe_jax.errors import ArtifactError, Check
from flexmoe_jax.files import NOT_A_FILE, digest_files, list_files, lock_directory, remove_directory, sha256_file
from flexmoe_jax.parallel.processes import barrier, from_lead, is_lead

_NONE = -1  # no step
_FOLDERS = ("checkpoints", "digests", "damaged")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored step; `skipped` are the newer, damaged steps as (step, reason), newest first."""

    step: int
    trainable: Any
    opt_state: Any
    data_state: dict
    meta: dict
    skipped: tuple[tuple[int, str], ...]


@dataclasses.dataclass
class _Preserved:
    """Which steps stay on disk: the `newest`, and those in `kept` (a PreservationPolicy of Orbax)."""

    newest: int
    kept: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        first = len(checkpoints) - self.newest
        return [i >= first or info.step in self.kept for i, info in enumerate(checkpoints)]


class RunCheckpoints:
    """The checkpoints of the run directory `path`, locked for this process; use it in a `with` block.

    The `keep` newest steps stay on disk; with fewer than 2 there is nothing to fall back to when one is damaged.
    Orbax starts with the first step that is saved or restored: a run that is refused before has no threads to end.
    ArtifactError if another process holds the directory, it cannot be written, or it has links that lead elsewhere.
    """

    def __init__(self, path: pathlib.Path | str, keep: int = 2):
        self.path, self._keep, self._kept = pathlib.Path(path).absolute(), keep, set[int]()
        self._steps, self._digests = self.path / "checkpoints", self.path / "digests"
        self._lead = is_lead()
        for folder in map(self.path.joinpath, _FOLDERS):  # steps and digests are deleted and moved in these
            links = [folder] if folder.is_symlink() else [p for p in folder.glob("*") if p.is_symlink()]
            if links:
                remedy = "do not use this run directory, or replace the link with its target"
                raise ArtifactError(f"{links[0]} is a link", remedy)
        try:
            for folder in (self._steps, self._digests):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "give a config.out that you may write to, on a disk with free space"
            raise ArtifactError(f"the run directory {self.path} cannot be made: {error.strerror}", remedy) from error
        self._held = contextlib.ExitStack()
        if self._lead:
            self._held.enter_context(lock_directory(self.path, ".lock"))
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "digests")
        self._pending: concurrent.futures.Future | None = None

    @functools.cached_property
    def _ocp(self) -> Any:
        import orbax.checkpoint

        return orbax.checkpoint

    @functools.cached_property
    def _manager(self) -> Any:
        if self._lead:  # here and not by Orbax, whose thread for it can outlive an error
            for folder in self._steps.iterdir():
                if not folder.name.isdecimal() and folder.is_dir():  # of an interrupted save
                    remove_directory(folder)
        barrier("interrupted saves")
        return self._ocp.CheckpointManager(
            self._steps,
            item_names=("trainable", "optimizer", "data", "meta"),
            options=self._ocp.CheckpointManagerOptions(preservation_policy=_Preserved(self._keep, self._kept)),
        )

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with self._held:
            if kind is not None and issubclass(kind, KeyboardInterrupt):  # at once: every write is atomic
                self._worker.shutdown(wait=False)
                return
            try:
                self.wait()
            except ArtifactError:
                if kind is None:  # otherwise the first error is the one to show
                    raise
            finally:
                self._worker.shutdown()
                if "_manager" in vars(self):
                    with contextlib.suppress(Exception):  # `wait` has reported it
                        self._manager.close()

    def keep(self, step: int) -> None:
        """Keeps `step` beside the newest ones, in place of the step that was kept so before.

        That one stays until `step` is saved: a crash before finds what its checkpoints speak of.
        """
        if step in self._kept:
            self._kept.intersection_update({step})
        else:
            self._kept.difference_update(sorted(self._kept)[:-1])
            self._kept.add(step)

    def holds(self, step: int) -> bool:
        """Whether all files of `step` are there with their sizes; process 0 looks for all."""
        self.wait()
        found = self._lead and all(check.ok for check in _check_step(self.path, step, quick=True))
        return bool(from_lead(int(found)))

    def save(self, step: int, trainable: Any, opt_state: Any, data_state: dict, meta: dict) -> None:
        """Starts to save `step`; the arrays may be donated or changed when this returns.

        The step is saved when `wait` returns. The next call, or `wait`, raises ArtifactError for a failure. After a
        failure this object saves nothing more: leave the `with` block.
        """
        self.wait()
        args = self._ocp.args
        items = args.Composite(
            trainable=args.StandardSave(trainable),
            optimizer=args.StandardSave(opt_state),
            data=args.JsonSave(data_state),
            meta=args.JsonSave(meta),
        )
        with self._named_errors(step):
            if not self._manager.save(step, args=items, force=True):
                raise OSError(f"Orbax declined step {step}")
        self._pending = self._worker.submit(self._commit, step)

    def wait(self) -> None:
        """Waits until the last `save` is on disk with its digests; ArtifactError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def started(self) -> bool:
        """Whether a step was ever saved; does not check whether it is damaged."""
        return any(self._digests.glob("*.json"))

    def latest(self) -> int | None:
        """The newest saved step, or None; does not check whether it is damaged."""
        self.wait()
        saved = [step for step in self._manager.all_steps() if self._digest_file(step).exists()]
        return max(saved, default=None)

    def restore(self, like_trainable: Any, like_opt: Any, step: int | None = None) -> Restored | None:
        """The newest undamaged step (or `step`), bit for bit; None if there is no step.

        `like_*` are trees of the same structure with the shape, dtype and sharding of each leaf: arrays or
        `jax.ShapeDtypeStruct`. Damaged steps are moved to `damaged/` and listed in `skipped`; so is the first step of a
        run whose save was interrupted, and then there is no step. ArtifactError if every step is damaged, or the
        structure differs.
        """
        self.wait()
        skipped: list[tuple[int, str]] = []
        steps = self._manager.all_steps()  # on every process: the manager starts on all of them together
        chosen = self._choose(steps if step is None else [step], skipped) if self._lead else None
        # Process 0 chooses the step for all processes.
        number = from_lead(_NONE if chosen is None else chosen)
        if number != _NONE:
            self._set_aside(skipped)
            return self._read(number, like_trainable, like_opt, tuple(skipped))
        if not self.started:
            self._set_aside(skipped)
            return None
        if skipped:
            reasons = "".join(f"\n    step {number}: {reason}" for number, reason in skipped)
            raise ArtifactError(
                f"no checkpoint of {self.path} can be used:{reasons}", "restore the directory, or start a new run"
            )
        return None

    def _choose(self, steps: Sequence[int], skipped: list[tuple[int, str]]) -> int | None:
        """The newest undamaged one of `steps`, or None; adds newer ones to `skipped`, with reasons."""
        for candidate in sorted(steps, reverse=True):
            problem = self._problem(candidate)
            if problem is None:
                return candidate
            skipped.append((candidate, problem))
        return None

    def _read(self, step: int, like_trainable: Any, like_opt: Any, skipped: tuple[tuple[int, str], ...]) -> Restored:
        args = self._ocp.args
        items = args.Composite(
            trainable=args.StandardRestore(_abstract(like_trainable)),
            optimizer=args.StandardRestore(_abstract(like_opt)),
            data=args.JsonRestore(),
            meta=args.JsonRestore(),
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ArtifactError(
                f"step {step} of {self.path} does not fit this model and optimizer: {error}",
                "resume with the configuration, and the version of this library, of the start of the run",
            ) from error
        return Restored(step, found.trainable, found.optimizer, found.data, found.meta, skipped)

    def _commit(self, step: int) -> None:
        with self._named_errors(step):
            self._manager.wait_until_finished()
            if not self._lead:
                return
            write_sealed(self._digest_file(step), {"step": step, "files": digest_files(self._steps / str(step))})
            kept = {f"{number}.json" for number in self._manager.all_steps()}
            for file in self._digests.glob("*.json"):
                if file.name not in kept:
                    file.unlink()

    def _problem(self, step: int) -> str | None:
        return "; ".join(f"{f.subject}: {f.detail}" for f in _check_step(self.path, step) if not f.ok) or None

    def _set_aside(self, skipped: list[tuple[int, str]]) -> None:
        """Moves the damaged steps away (process 0 only: `skipped` is empty on the others)."""
        for step, _ in skipped:
            target = self.path / "damaged" / str(step)
            remove_directory(target)
            target.parent.mkdir(exist_ok=True)
            os.rename(self._steps / str(step), target)
            self._digest_file(step).unlink(missing_ok=True)
        barrier("damaged steps")
        if skipped or not self._lead:
            self._manager.reload()

    def _digest_file(self, step: int) -> pathlib.Path:
        return self._digests / f"{step}.json"

    @contextlib.contextmanager
    def _named_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            system = arrays.system_error(error)
            raise ArtifactError(
                f"saving step {step} to {self.path} failed: {system.strerror if system else error}",
                "check free space and permissions, then run the same command: it resumes from the last good step",
            ) from error


def verify_run(path: pathlib.Path | str, *, quick: bool = False) -> list[Check]:
    """Checks of every file of every checkpoint of the run directory `path`; `quick` checks only names and sizes."""
    path = pathlib.Path(path)
    folders, digests = (_entries(path / name) for name in ("checkpoints", "digests"))
    checks = []
    for folder in folders:
        if folder.name.isdecimal() and folder.name == str(int(folder.name)):
            rows = _check_step(path, int(folder.name), quick)
            checks += [dataclasses.replace(f, subject=f"checkpoints/{folder.name}/{f.subject}") for f in rows]
        else:
            what = "was left by an interrupted save"
            checks.append(Check(f"checkpoints/{folder.name}", False, what, "start the run again: it removes this"))
    for file in digests:
        if not (path / "checkpoints" / file.stem).is_dir():
            checks.append(Check(f"digests/{file.name}", False, f"there is no checkpoints/{file.stem}"))
    return checks or [Check("checkpoints", False, "there is none: nothing could be checked")]


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is in `folder`; nothing if it is missing, a link or a file."""
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _check_step(path: pathlib.Path, step: int, quick: bool = False) -> list[Check]:
    """Checks of every file of one saved step against its digests."""
    folder, digests = path / "checkpoints" / str(step), path / "digests" / f"{step}.json"
    if not digests.exists():
        return [Check("digests", False, "missing: the save was interrupted")]
    try:
        fields = read_sealed(digests)
        check_fields(fields, {"step": int, "files": dict, "digest": str}, digests)
        for name, row in fields["files"].items():
            if not isinstance(row, dict) or type(row.get("size")) is not int or not is_sha256(row.get("sha256")):
                raise ArtifactError(f"{digests}: {name!r} is {row!r}, not a size and a sha256", "do not use this run")
    except ArtifactError as error:
        return [Check("digests", False, error.what, error.remedy)]
    if fields["step"] != step:
        return [Check("digests", False, f"they are those of step {fields['step']}, not of step {step}")]
    if folder.is_symlink() or not folder.is_dir():
        return [Check("", False, "is missing, or not a directory")]
    sizes, others = list_files(folder)
    checks = [Check(name, False, NOT_A_FILE) for name in others]
    for name in sorted({*sizes, *fields["files"]}):
        expected = fields["files"].get(name)
        if name not in sizes or expected is None:
            checks.append(Check(name, False, "missing" if name not in sizes else "foreign"))
            continue
        found = {"size": sizes[name], "sha256": expected["sha256"] if quick else sha256_file(folder / name)}
        detail = f"{found['size']} bytes {'' if quick else found['sha256']}".strip()
        checks.append(Check(name, found == expected, detail if found == expected else f"altered: {detail}"))
    return checks


def _abstract(tree: Any) -> Any:
    """Leaves as shape, dtype and sharding; those without a sharding are restored to the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf):
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)
