"""`flexmoe pretrain` and `flexmoe train`: one training run, driven by an experiment file."""

import logging
import pathlib

from flexmoe_jax.cli.common import add_json, check_paths, emit, parser
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.experiment import read_config

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
