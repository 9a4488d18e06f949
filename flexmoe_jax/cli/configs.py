"""ConfigDicts at the edge: experiment files with command-line overrides, turned into frozen configurations."""

from absl import flags
from ml_collections import config_flags

from flexmoe_jax.config import RunConfig, from_mapping
from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.experiment import load_experiment


def parse_run(argv: list[str], verb: str) -> RunConfig:
    """`--config=FILE[:ARG]` and `--config.key=value` overrides -> RunConfig."""
    return parse_config(argv, verb, RunConfig)


def parse_config(argv: list[str], verb: str, kind):
    """`--config=FILE[:ARG]` and `--config.key=value` overrides -> the frozen configuration `kind`."""
    return from_mapping(kind, parse_mapping(argv, verb))


def parse_mapping(argv: list[str], verb: str) -> dict:
    """The same as nested dictionaries, without the keys that neither the experiment nor the command line sets."""
    files = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    if len(files) != 1:
        raise ConfigError(
            f"{len(files)} --config options were given", f"flexmoe {verb} --config=experiments/FILE.py[:ARG]"
        )
    config = load_experiment(files[0])
    values = flags.FlagValues()
    overrides = [f"flexmoe {verb}", *(a for a in argv if not a.startswith("--config="))]
    known = [f"config.{key}" for key in _keys(config.to_dict())]
    unknown = [n for n in (a.lstrip("-").partition("=")[0] for a in overrides[1:]) if n not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; write --config.KEY=VALUE", did_you_mean(unknown[0], known))
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=overrides)
        values(overrides)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"in {files[0]} or its overrides: {error}", "correct the value") from error
    # A key left at None is one the experiment leaves to the command line.
    return {key: value for key, value in config.to_dict().items() if value is not None}


def _keys(mapping: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in mapping.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys
