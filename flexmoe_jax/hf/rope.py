"""The rotary embedding of a `config.json`, read in the old and the new spelling and written in the new one."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.foreign import short
from flexmoe_jax.hf.architectures import SMOLLM3, Architecture
from flexmoe_jax.model_config import ModelConfig, RopeScaling

# {kind of scaling: {key of config.json: field of RopeScaling}}
_LENGTH = {"factor": "factor", "original_max_position_embeddings": "original_max_seq_len"}
_KEYS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": _LENGTH | {name: name for name in ("low_freq_factor", "high_freq_factor")},
    "yarn": _LENGTH | {name: name for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")},
}
_MSCALES = ("mscale", "mscale_all_dim")
_WORDS = ("rope_type", "type")
_AS_PUBLISHED = "give the config.json of the checkpoint as it was published"
READ = {"rope_parameters", "rope_scaling", "rope_theta", "no_rope_layers", "no_rope_layer_interval"}


def read_rope(
    fields: Mapping[str, Any], architecture: Architecture, length: int, where: pathlib.Path | str
) -> tuple[float, RopeScaling | None]:
    """(rotary base, scaling) of a config.json without null values; `length` is its number of positions.

    Raises ArtifactError for a kind of scaling, or a number of it, that our decoder lacks.
    """
    rope = {
        k: v for k, v in (fields.get("rope_parameters") or fields.get("rope_scaling") or {}).items() if v is not None
    }
    for key, value in rope.items():
        if type(value) not in (int, float, bool, str) or (key not in _WORDS and type(value) is str):
            raise ArtifactError(f"{where}: {short(key)} of the rotary embedding is {short(value)}", _AS_PUBLISHED)
        if type(value) is int and abs(value) > 1 << 62:
            raise ArtifactError(f"{where}: {key} of the rotary embedding is {short(value)}", _AS_PUBLISHED)
    thetas = {float(t) for t in (rope.pop("rope_theta", None), fields.get("rope_theta")) if t is not None}
    if len(thetas) > 1:
        raise ArtifactError(f"{where}: rope_theta has the values {sorted(thetas)}", "keep one of them")
    theta = thetas.pop() if thetas else architecture.theta
    kind, old = rope.pop("rope_type", None), rope.pop("type", None)
    kind = kind or old or "default"
    if (part := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ArtifactError(f"{where}: it rotates {part} of each head", "give a checkpoint that rotates whole heads")
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1.0):
        return theta, None
    if kind not in _KEYS:
        known = f"this version supports: default, {', '.join(sorted(_KEYS))}"
        raise ArtifactError(f"{where}: the rotary embedding is scaled by {short(kind)}", known)
    if kind == "yarn":
        rope = {"original_max_position_embeddings": length} | rope
        scales = [rope.pop(name) for name in _MSCALES if name in rope]
        if len(scales) == len(_MSCALES) and all(scales) and rope.get("factor", 1.0) > 0:
            one, other = (0.1 * scale * math.log(rope.get("factor", 1.0)) + 1 for scale in scales)
            rope.setdefault("attention_factor", one / other)
    if rope.keys() - _KEYS[kind].keys() or (kind == "llama3" and rope.keys() != _KEYS[kind].keys()):
        what = f"{where}: the rotary embedding is scaled by {kind!r} with {short(sorted(rope))}"
        raise ArtifactError(what, f"this version reads: {', '.join(_KEYS[kind])}")
    try:
        return theta, RopeScaling(kind, **{_KEYS[kind][key]: value for key, value in rope.items()})
    except (ConfigError, TypeError) as error:
        raise ArtifactError(f"{where}: {error}", _AS_PUBLISHED) from error


def read_skip(
    fields: Mapping[str, Any], architecture: Architecture, layers: int, where: pathlib.Path | str
) -> int | None:
    """`ModelConfig.rope_skip` of the layers that `no_rope_layers` marks with 0. ArtifactError for unequal distances."""
    interval = fields.get("no_rope_layer_interval", 4)
    if (given := fields.get("no_rope_layers")) is None:
        return interval if architecture is SMOLLM3 and interval <= layers else None
    turns = [bool(turn) for turn in given[:layers]]
    skip = turns.index(False) + 1 if False in turns else None
    expected = [skip is None or (i + 1) % skip != 0 for i in range(len(turns))]
    if len(turns) < layers or turns != expected:
        what = f"{where}: no_rope_layers is {short(given)}"
        raise ArtifactError(what, "give a checkpoint whose layers without rotary embedding have equal distances")
    return skip


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json from which `read_rope` and `read_skip` read this model's."""
    rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if model.rope_scaling is not None:
        rope |= write_scaling(model.rope_scaling)
    written: dict[str, Any] = {"rope_parameters": rope}
    if model.rope_skip is not None:
        turns = [int((i + 1) % model.rope_skip != 0) for i in range(model.num_layers)]
        written |= {"no_rope_layers": turns, "no_rope_layer_interval": model.rope_skip}
    return written


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The keys of `rope_parameters` from which `read_rope` reads this scaling."""
    values = dataclasses.asdict(scaling)
    keys = {key: values[name] for key, name in _KEYS[scaling.kind].items() if values[name] is not None}
    return {"rope_type": scaling.kind, **keys}
