"""Experiment files: Python files that define `get_config(arg) -> ConfigDict`, and how they are loaded."""

import dataclasses
import pathlib
import runpy
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from flexmoe_jax.config import ModelConfig, RunConfig
from flexmoe_jax.errors import ConfigError


def run_config(*, model: ModelConfig | None = None, **values: Any) -> ConfigDict:
    """A ConfigDict with every key of `RunConfig`, for experiment files: `values`, else the defaults.

    Required keys that are not given are placeholders for the command line. TypeError for a value whose type is not that
    of the default.
    """
    config = ConfigDict()
    for field in dataclasses.fields(RunConfig):
        if field.default is dataclasses.MISSING:
            config[field.name] = config_dict.placeholder(field.type)
        elif field.default is None:
            kinds = [kind for kind in typing.get_args(field.type) if kind in (str, int)]
            config[field.name] = config_dict.placeholder(kinds[0]) if kinds else None
        elif dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
            config[field.name] = ConfigDict(dataclasses.asdict(field.default))
        else:
            config[field.name] = field.default
    if model is not None:
        config.model = ConfigDict(dataclasses.asdict(model))
    optimizer = values.pop("optimizer", {})
    config.update(values)
    config.optimizer.update(optimizer)
    return config


def load_experiment(spec: str) -> ConfigDict:
    """`FILE[:ARG]` -> the result of the file's `get_config(ARG)` (ARG is "" by default).

    ConfigError if there is no such file, or it defines no `get_config`.
    """
    name, _, arg = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ConfigError(f"the configuration file {name} does not exist", "give the path of an experiment file")
    module = runpy.run_path(str(path))
    if "get_config" not in module:
        raise ConfigError(f"{name} defines no get_config", "define get_config(arg) -> ConfigDict in it")
    return module["get_config"](arg)
