"""Trackers: the lines of `metrics.jsonl` as TensorBoard files, and in Weights & Biases for those who ask for it.

Each number of a line becomes one scalar of its step: {"share": {"news": 0.4}} is `share/news`. Nothing leaves the
machine by itself: Weights & Biases starts in its offline mode unless WANDB_MODE says otherwise.
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.training.metrics import Sink
from flexmoe_jax.tree import flatten


@contextlib.contextmanager
def open_trackers(run: RunConfig, identity: dict, resume_step: int) -> Iterator[list[Sink]]:
    """The trackers that `config.track` names, for the run directory `run.out`.

    `identity` (`run.json`) is stored with them. A run that resumes writes the lines of step `resume_step` and later
    again. ConfigError if Weights & Biases is asked for and not installed.
    """
    made: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(made[name](run, identity, resume_step))) for name in run.trackers]


def scalars(line: dict) -> Iterator[tuple[str, float]]:
    """(name, number) of every number in a line of metrics but `step`; lists are numbered."""
    for path, value in flatten(line).items():
        numbered = [(f"{path}/{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(path, value)]
        yield from ((name, float(number)) for name, number in numbered if number is not None and name != "step")


class _TensorBoard:
    """Files in `tensorboard/` of the run directory; the identity is a text, its settings are hyperparameters."""

    def __init__(self, run: RunConfig, identity: dict, resume_step: int):
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        purge = resume_step if resume_step else None
        self._writer = SummaryWriter(str(pathlib.Path(run.out) / "tensorboard"), purge_step=purge)
        text = json.dumps(identity, indent=1)
        self._writer.add_text("run.json", "\n".join(f"    {row}" for row in text.splitlines()), resume_step)
        plain = {k: v for k, v in flatten(to_mapping(run)).items() if isinstance(v, bool | int | float | str)}
        for part in hparams(plain, {"loss": None, "validation/own": None})[:2]:  # the third says that the run has ended
            self._writer.file_writer.add_summary(part)

    def write(self, line: dict) -> None:
        for name, number in scalars(line):
            self._writer.add_scalar(name, number, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of the project `flexmoe`, in `wandb/` of the run directory; its id is kept there, so that it resumes."""

    def __init__(self, run: RunConfig, identity: dict, resume_step: int):
        try:
            import wandb
        except ImportError as error:
            remedy = "install the extra: pip install 'flexmoe_jax[track]'; or leave wandb out of config.track"
            raise ConfigError("config.track names wandb, which is not installed", remedy) from error
        folder = pathlib.Path(run.out) / "wandb"
        folder.mkdir(exist_ok=True)
        name = folder / "id"
        if not name.exists():
            name.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flexmoe"),
            name=f"{run.owner}-{pathlib.Path(run.out).name}",
            id=name.read_text(encoding="utf-8"),
            dir=run.out,
            config=identity | {"run": to_mapping(run)},
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            settings=wandb.Settings(silent=True, disable_git=True, save_code=False),
        )

    def write(self, line: dict) -> None:
        self._run.log(dict(scalars(line)), step=line["step"])

    def close(self) -> None:
        self._run.finish()
