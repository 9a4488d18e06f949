"""`flexmoe pretrain` and `flexmoe train`: one training run of an experiment file; before it `flexmoe lr-find`."""

import argparse
import dataclasses
import logging
import pathlib
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import add_json, check_paths, emit, parser, table
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.experiment import read_config
from flexmoe_jax.ranges import COUNT, POSITIVE

if TYPE_CHECKING:
    from flexmoe_jax.training.lr_find import Sweep

_TEXT = """{what}

The run directory (config.out) is resumed if it holds a checkpoint of the same configuration and data; one of others is
refused, and the differences are shown. SIGTERM, SIGHUP and SIGUSR1 save the state and exit with code 75, the first
Ctrl-C with 130; a second one ends at once. A run that skipped over 1% of its steps publishes nothing."""


def pretrain(argv: list[str]) -> int:
    """Trains a public model; prints the model directory."""
    what = (
        "Trains a public model (trunk and public expert, densely, on public data), or all experts of a model together."
    )
    example = "flexmoe pretrain --config=experiments/quickstart_public.py --config.optimizer.lr=1e-3"
    return _run(argv, "pretrain", what, example)


def train(argv: list[str]) -> int:
    """Trains one owner's expert; prints the package directory."""
    what = "Trains one owner's expert beside the frozen public model, on the owner's own data."
    example = "flexmoe train --config=experiments/quickstart_expert.py:news --config.data=data --config.public=public"
    return _run(argv, "train", what, example)


def lr_find(argv: list[str]) -> int:
    """Compares learning rates in short runs; prints a table and the chosen one, and refuses if none helps."""
    text = """Compares learning rates: short runs from the start of the configured run, on the same batches.

Each is scored on held-out text (config.validation and so on), without any on text that no short run has read. Nothing
is written into config.out."""
    example = "flexmoe lr-find --config=experiments/quickstart_expert.py:news --steps 20"
    p = parser("lr-find", text, example, config=RunConfig)
    what = "rates to compare, with commas; by default config.optimizer.lr times 0.1, 0.3, 1, 3 and 10"
    p.add_argument("--rates", metavar="LR,LR,..", help=what)
    p.add_argument(
        "--steps", type=COUNT, help="steps of each short run; a tenth of config.steps by default, at least 10"
    )
    add_json(p)
    args = p.parse(argv)
    run = read_config(RunConfig, args.config, args.overrides)
    check_paths(run)
    rates = _rates(args.rates, run.optimizer.lr)
    steps = args.steps or min(max(run.steps // 10, 10), run.steps)
    from flexmoe_jax.training.lr_find import find_rate

    sweep = find_rate(run, rates, steps)
    emit(dataclasses.asdict(sweep), _rate_lines(run, sweep), args.json)
    if sweep.chosen is None:
        raise ConfigError("no rate is better than no training", "give lower --rates, or more --steps")
    return 0


def _rates(text: str | None, lr: float) -> list[float]:
    """The rates to compare in ascending order; ConfigError if `text` holds anything but positive numbers."""
    if text is None:
        text = ",".join(f"{factor * lr:.2g}" for factor in (0.1, 0.3, 1, 3, 10))
    try:
        return sorted({POSITIVE(word) for word in text.split(",")})
    except argparse.ArgumentTypeError as error:
        raise ConfigError(
            f"a rate to compare: {error}", "give numbers above 0 with commas: --rates 1e-4,3e-4"
        ) from error


def _rate_lines(run: RunConfig, sweep: "Sweep") -> list[str]:
    rows = []
    for trial in (sweep.before, *sweep.trials):
        name = f"{trial.rate:g}" if trial.rate else "untrained"
        said = [f"diverged: {trial.bad_steps} of {sweep.steps} steps not finite"] if trial.bad_steps else []
        said += ["worse than untrained"] if not said and not trial.losses["own"] <= sweep.before.losses["own"] else []
        rows.append([name, *trial.losses.values(), *(said or ["chosen" if trial.rate == sweep.chosen else ""])])
    lines = table(["rate", *(f"{side} loss" for side in sweep.scored), ""], rows)
    lines += ["", *(f"{side} loss: {sweep.unit} of {text}" for side, text in sweep.scored.items())]
    if sweep.chosen is None:
        return lines
    lines.append(f"chosen: --config.optimizer.lr={sweep.chosen:g}, the lowest own loss after {sweep.steps} steps")
    if sweep.chosen in (sweep.trials[0].rate, sweep.trials[-1].rate) and len(sweep.trials) > 1:
        lines.append("it is at the edge of the rates compared: give --rates beyond it")
    return [
        *lines,
        f"{sweep.steps} of {run.steps} steps are a short run: the best rate of a longer one is the same or lower",
    ]


def _run(argv: list[str], verb: str, what: str, example: str) -> int:
    p = parser(verb, _TEXT.format(what=what), example, config=RunConfig)
    what = "resume although this key differs (as shown in the refusal); several may be given"
    p.add_argument("--allow", action="append", default=[], metavar="KEY", help=what)
    what = "10:13 writes an XLA trace of steps 10 to 13 into the run directory (profile/)"
    p.add_argument("--profile", metavar="STEPS", help=what)
    add_json(p)
    args = p.parse(argv)
    run = read_config(RunConfig, args.config, args.overrides)
    if run.is_public != (verb == "pretrain"):
        other = "pretrain" if run.is_public else "train"
        raise ConfigError(f"config.owner is {run.owner!r}: not a run of flexmoe {verb}", f"use flexmoe {other}")
    check_paths(run)
    from flexmoe_jax.parallel.processes import is_lead, join
    from flexmoe_jax.training.loop import train as train_run

    join()
    if not is_lead():
        logging.getLogger("flexmoe_jax").setLevel(logging.WARNING)
    product = train_run(run, allow=args.allow, profile=args.profile)
    if is_lead():
        emit(_describe(product, run), [str(product)], args.json)
    return 0


def _describe(product: pathlib.Path, run: RunConfig) -> dict:
    """The model directory or the package as JSON values."""
    if run.is_public:
        from flexmoe_jax.artifacts.model_dir import open_model
        from flexmoe_jax.cli.models import describe_model

        return describe_model(open_model(product))
    from flexmoe_jax.artifacts.manifest import read_manifest

    manifest = read_manifest(product)
    return {"path": str(product), "owner": run.owner, "digest": manifest.digest, "content": manifest.content}
