"""The record of a package: how it was made.

    training   steps, tokens, the configuration and its digest, ...
    router     the origin of the router row: encoder, digest of the encoder, scale and seed of the projection, ...
    tuned      {"with": owners whose data influenced the package by router tuning or joint training, ...}
    start      manifest digest of the package that was trained further
    compressed, rebased   what the package was made from, and how (compose/convert.py)
    licence, contact

Keys that this library uses are checked, all others are kept as they are.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.json_files import canonical_json
from flexmoe_jax.tree import ExpertName, expert_name

_SECTIONS = ("training", "router", "tuned", "compressed", "rebased")
_TEXTS = ("start", "licence", "contact")
_ROUTER: dict[str, tuple[type, ...]] = {
    "encoder": (str,),
    "encoder_digest": (str,),
    "scale": (int, float),
    "projection_seed": (int,),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A package's record. `fields` holds all keys, also unknown ones; copies of the package keep them."""

    fields: dict[str, Any]

    @property
    def training(self) -> dict[str, Any] | None:
        """How the package was trained; None if it is not recorded."""
        return self.fields.get("training")

    @property
    def router(self) -> dict[str, Any] | None:
        """The origin of the router row: at least `encoder`, `encoder_digest`, `scale`, `projection_seed`; or None."""
        return self.fields.get("router") or None

    @property
    def tuned_with(self) -> tuple[ExpertName, ...]:
        """The owners whose data influenced this package by router tuning or joint training; empty if none did."""
        return tuple(map(expert_name, (self.fields.get("tuned") or {}).get("with", ())))

    @property
    def licence(self) -> str | None:
        """The license of the parameters; None if it is not stated."""
        return self.fields.get("licence") or None

    @property
    def contact(self) -> str | None:
        """The contact for questions about the package; None if it is not stated."""
        return self.fields.get("contact") or None


def make_record(fields: Mapping[str, Any], owner: str) -> Record:
    """The record for a new package from JSON values; ArtifactError for other values, and as of `read_record`."""
    try:
        plain = json.loads(canonical_json(dict(fields)))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the record of {owner!r} is not JSON: {error}", "give plain JSON values") from error
    return read_record(plain, f"the record of {owner!r}")


def read_record(fields: dict[str, Any], where: object) -> Record:
    """The record in a manifest; ArtifactError if a known key has a value of another type or form."""
    for name, kind in (*((name, dict) for name in _SECTIONS), *((name, str) for name in _TEXTS)):
        if not isinstance(fields.get(name), kind | None):
            raise ArtifactError(f"{where}: record.{name} is {fields[name]!r}, not a {kind.__name__}", _REMEDY)
    for name, kinds in _ROUTER.items() if fields.get("router") else ():
        value = fields["router"].get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ArtifactError(f"{where}: record.router.{name} is {value!r}, not a {kinds[0].__name__}", _REMEDY)
    if fields.get("router") and fields["router"]["projection_seed"] < 0:
        what = f"{where}: record.router.projection_seed is {fields['router']['projection_seed']}"
        raise ArtifactError(what, _REMEDY)
    names = (fields.get("tuned") or {}).get("with", [])
    try:
        if not isinstance(names, list):
            raise FlexMoEError(f"`with` is {names!r}")
        for name in names:
            expert_name(name)
    except FlexMoEError as error:
        raise ArtifactError(f"{where}: record.tuned does not name a list of owners: {error.what}", _REMEDY) from error
    return Record(fields)


_REMEDY = "fetch the package again from its owner"
