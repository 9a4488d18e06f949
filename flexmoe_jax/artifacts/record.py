"""What a package says about its making: read strictly where this library reads it, kept whole otherwise.

training   steps, tokens, the configuration and its digest, ...
router     where the router row is from: encoder, digest of the encoder, scale and seed of the projection, ...
tuned      {"with": owners who had a part in the package by router tuning or joint training, ...}
start      manifest digest of the package that the training continued
licence, contact
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.artifacts.sealed import canonical_json
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.tree import ExpertName, expert_name

_SECTIONS = ("training", "router", "tuned")
_TEXTS = ("start", "licence", "contact")
_ROUTER: dict[str, tuple[type, ...]] = {
    "encoder": (str,),
    "encoder_digest": (str,),
    "scale": (int, float),
    "projection_seed": (int,),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A package's record. `fields` is what it says, unknown keys included, and what is written again."""

    fields: dict[str, Any]

    @property
    def training(self) -> dict[str, Any] | None:
        """What the package was trained with; None if it does not say."""
        return self.fields.get("training")

    @property
    def router(self) -> dict[str, Any] | None:
        """Where the router row is from: at least `encoder`, `encoder_digest`, `scale`, `projection_seed`; or None."""
        return self.fields.get("router") or None

    @property
    def tuned_with(self) -> tuple[ExpertName, ...]:
        """The owners who had a part in this package by router tuning or joint training; empty if none is recorded."""
        return tuple(map(expert_name, (self.fields.get("tuned") or {}).get("with", ())))

    @property
    def licence(self) -> str | None:
        """The licence of the parameters; None if it is not stated."""
        return self.fields.get("licence") or None

    @property
    def contact(self) -> str | None:
        """Whom to ask about the package; None if it is not stated."""
        return self.fields.get("contact") or None


def make_record(fields: Mapping[str, Any], owner: str) -> Record:
    """The record of a package to be written: any JSON, checked as `read_record` checks it, else ArtifactError."""
    try:
        plain = json.loads(canonical_json(dict(fields)))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the record of {owner!r} is not JSON: {error}", "give plain JSON values") from error
    return read_record(plain, f"the record of {owner!r}")


def read_record(fields: dict[str, Any], where: object) -> Record:
    """The record that a manifest states; ArtifactError for a known key with a value that no package has."""
    for name, kind in (*((name, dict) for name in _SECTIONS), *((name, str) for name in _TEXTS)):
        if not isinstance(fields.get(name), kind | None):
            raise ArtifactError(f"{where}: record.{name} is {fields[name]!r}, not a {kind.__name__}", _REMEDY)
    for name, kinds in _ROUTER.items() if fields.get("router") else ():
        value = fields["router"].get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ArtifactError(f"{where}: record.router.{name} is {value!r}, not a {kinds[0].__name__}", _REMEDY)
    names = (fields.get("tuned") or {}).get("with", [])
    try:
        if not isinstance(names, list):
            raise FlexMoEError(f"it is {names!r}")
        for name in names:
            expert_name(name)
    except FlexMoEError as error:
        raise ArtifactError(f"{where}: record.tuned does not name a list of owners: {error.what}", _REMEDY) from error
    return Record(fields)


_REMEDY = "fetch the package again from its owner"
