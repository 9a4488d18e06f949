"""Experiment files: Python files that define `get_config(arg) -> ConfigDict`.

    run = read_config(RunConfig, "experiments/quickstart_expert.py:news", ["steps=20", "optimizer.lr=1e-3"])

The result is a frozen configuration; the strings override values of the file.
"""

import dataclasses
import pathlib
import runpy
import traceback
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any

from ml_collections import ConfigDict

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError, FlexMoEError, did_you_mean
from flexmoe_jax.mapping import field_docs, from_mapping
from flexmoe_jax.model_config import ModelConfig

Config = typing.TypeVar("Config")
REQUIRED = dataclasses.MISSING
_WORDS = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a configuration, such as `optimizer.lr`; a section if its `kind` is a dataclass."""

    name: str
    kind: type
    optional: bool  # whether it may be None
    default: Any  # REQUIRED if there is none
    text: str  # the docstring under the field

    @property
    def is_section(self) -> bool:
        """Whether the key holds further keys."""
        return dataclasses.is_dataclass(self.kind)

    def parse(self, text: str) -> Any:
        """The value of the command-line text `text`; an empty text and `none` are None for an optional key.

        ConfigError if the text is not of the key's type; a section can only be None.
        """
        if self.optional and text.lower() in ("", "none"):
            return None
        if self.is_section:
            raise ConfigError(f"config.{self.name} is {text!r}", f"give none, or its keys (config.{self.name}.KEY)")
        try:
            return _WORDS[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError) as error:
            wanted = "true or false" if self.kind is bool else f"a value of type {self.kind.__name__}"
            remedy = f"give {wanted}{', or none' if self.optional else ''}"
            raise ConfigError(f"config.{self.name} is {text!r}", remedy) from error


def keys_of(cls: type, prefix: str = "") -> dict[str, Key]:
    """{dotted name: key} of the configuration `cls` in field order; a section comes before its keys."""
    keys: dict[str, Key] = {}
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(option for option in options if option is not type(None))
        keys[name] = Key(name, kind, type(None) in options, field.default, docs.get(field.name, ""))
        if keys[name].is_section:
            keys |= keys_of(kind, f"{name}.")
    return keys


def suggest_key(name: str, keys: Collection[str]) -> str:
    """A hint for an unknown key: the keys of that name in a section (`lr`: `optimizer.lr`), else the closest one."""
    same_end = [repr(key) for key in keys if key.endswith(f".{name}")]
    return f"did you mean {' or '.join(same_end)}?" if same_end else did_you_mean(name, keys)


def run_config(*, model: ModelConfig | None = None, **values: Any) -> ConfigDict:
    """A ConfigDict with every key of `RunConfig`, for experiment files: `values`, else the defaults.

    Required keys that are not given are None: the command line sets them.
    """
    defaults = {f.name: None if f.default is REQUIRED else f.default for f in dataclasses.fields(RunConfig)}
    config = ConfigDict({**defaults, "optimizer": dataclasses.asdict(RunConfig.optimizer)})
    if model is not None:
        config.model = ConfigDict(dataclasses.asdict(model))
    config.update(values)
    return config


def load_experiment(spec: str) -> ConfigDict:
    """`FILE[:ARG]` -> the result of the file's `get_config(ARG)` (ARG is "" by default).

    A colon may be part of FILE, and of ARG: the longest FILE that exists counts. ConfigError if there is no such file,
    it defines no `get_config`, or it raises an error.
    """
    parts = spec.split(":")
    names = [":".join(parts[:count]) for count in range(len(parts), 0, -1)]
    name = next((name for name in names if pathlib.Path(name).is_file()), None)
    if name is None:
        missing = next((name for name in names if name.endswith(".py")), spec)
        raise ConfigError(
            f"the experiment file {missing} does not exist", f"relative paths start at {pathlib.Path.cwd()}"
        )
    try:
        module = runpy.run_path(name)
        if "get_config" not in module:
            raise ConfigError(f"{name} defines no get_config", "define get_config(arg) -> ConfigDict in it")
        return module["get_config"](spec[len(name) + 1 :])
    except FlexMoEError:
        raise
    except Exception as error:
        lines = [f", line {f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
        raise ConfigError(
            f"{name}{(lines or [''])[-1]}: {type(error).__name__}: {error}",
            "correct the file, or give an argument (FILE:ARG) that its get_config takes",
        ) from error


def read_values(cls: type, spec: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The nested values of the experiment `FILE[:ARG]` with `KEY=VALUE` overrides; keys that neither sets are absent.

    ConfigError for an experiment file that cannot be used, an unknown key, or a value of another type.
    """
    keys = {name: key for name, key in keys_of(cls).items() if key.optional or not key.is_section}
    values = load_experiment(spec).to_dict()
    for override in overrides:
        name, equals, text = override.partition("=")
        if name not in keys:
            raise ConfigError(f"unknown key config.{name}", suggest_key(name, keys))
        if not equals:
            raise ConfigError(f"config.{name} is given without a value", f"write --config.{name}=VALUE")
        *sections, last = name.split(".")
        inner = values
        for section in sections:
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
        inner[last] = keys[name].parse(text)
    # None is the value of a key that may be None and has another default; any other is left to the command line.
    chosen = {name for name, key in keys.items() if key.optional and key.default not in (None, REQUIRED)}
    return {name: value for name, value in values.items() if value is not None or name in chosen}


def read_config(cls: type[Config], spec: str, overrides: Iterable[str] = ()) -> Config:
    """The frozen configuration `cls` of the experiment `FILE[:ARG]` with `KEY=VALUE` overrides.

    ConfigError as of `read_values`, for keys that are missing, and for values that `cls` refuses.
    """
    return from_mapping(cls, read_values(cls, spec, overrides))
