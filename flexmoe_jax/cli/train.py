"""`flexmoe pretrain` and `flexmoe train`: one command per role, driven by an experiment file."""

import argparse
import logging

from flexmoe_jax.cli.configs import parse_run
from flexmoe_jax.errors import ConfigError

_HELP = """usage: flexmoe {verb} --config=experiments/FILE.py[:ARG] [--config.KEY=VALUE ...]

{what}

Every key of the experiment's configuration can be overridden. The run directory (config.out) is resumed when it exists
and belongs to the same configuration and data, and refused with the differences shown otherwise; --allow=KEY (as shown
there, may be given several times) goes on in spite of one. SIGTERM saves and exits with code 75.

--profile=10:13 writes an XLA trace of the steps 10 to 13 into the run directory (profile/).

example:
  {example}"""


def pretrain(argv: list[str]) -> int:
    """Trains the public model; prints the model directory."""
    what = "Trains the public model: trunk and public expert, densely, on public data."
    example = "flexmoe pretrain --config=experiments/quickstart_public.py --config.optimizer.lr=1e-3"
    return _run(argv, "pretrain", what, example, public=True)


def train(argv: list[str]) -> int:
    """Trains one owner's expert; prints the package directory."""
    what = "Trains one owner's expert beside the frozen public model, on the owner's own data."
    example = "flexmoe train --config=experiments/quickstart_expert.py:news --config.data=data --config.public=public"
    return _run(argv, "train", what, example, public=False)


def _run(argv, verb, what, example, *, public: bool) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(_HELP.format(verb=verb, what=what, example=example))
        return 0 if argv else 2
    p = argparse.ArgumentParser(prog=f"flexmoe {verb}", add_help=False, allow_abbrev=False)
    p.add_argument("--allow", action="append", default=[])
    p.add_argument("--profile", default=None)
    options, rest = p.parse_known_args(argv)
    run = parse_run(rest, verb)
    if run.is_public != public:
        other = "train" if public else "pretrain"
        raise ConfigError(f"config.owner is {run.owner!r}: not a run of flexmoe {verb}", f"use flexmoe {other}")
    from flexmoe_jax.parallel.processes import is_lead, join
    from flexmoe_jax.training.loop import train

    join()
    if not is_lead():
        logging.getLogger("flexmoe_jax").setLevel(logging.WARNING)
    print(train(run, allow=options.allow, profile=options.profile))
    return 0
