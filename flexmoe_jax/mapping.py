"""Frozen configurations from plain mappings, and back."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.errors import ConfigError, did_you_mean


def field_docs(cls: type) -> dict[str, str]:
    """{field: the docstring under it} of a dataclass; fields without one are left out."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    docs: dict[str, str] = {}
    for statement, after in itertools.pairwise(definition.body):  # type: ignore[attr-defined]
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[ast.unparse(statement.target)] = inspect.cleandoc(ast.literal_eval(after.value))
    return docs


def from_mapping(cls, values: Mapping, where: str = "config") -> Any:
    """Builds the frozen dataclass `cls` from a nested mapping; unknown, missing and mistyped keys are ConfigErrors."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {where}.{key}", did_you_mean(key, fields))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is not set", f"add {where}.{name} ({_kind(hints[name]).__name__})")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def to_mapping(config: Any) -> dict:
    """The inverse of `from_mapping`: plain nested dictionaries of JSON values.

    The keys `LATER` of a class are left out at their defaults: a configuration that uses none of them has the digest
    that it had before they came, and what was written then still belongs to it.
    """
    later, found = getattr(type(config), "LATER", ()), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in later or value != field.default:
            found[field.name] = to_mapping(value) if dataclasses.is_dataclass(value) else value
    return found


def _convert(hint: Any, value: Any, where: str) -> Any:
    if type(None) in typing.get_args(hint) and (value is None or value == ""):  # "" is None on the command line
        return None
    kind = _kind(hint)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}", "give a nested section of keys")
        return from_mapping(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r} ({type(value).__name__})", f"give a value of type {kind.__name__}")
    return value


def _kind(hint: Any) -> type:
    """The type of values in a mapping: str of `str | pathlib.Path | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))
