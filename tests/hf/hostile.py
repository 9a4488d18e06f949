"""What the import of a hostile checkpoint may do: refuse it by name, or give a model that verifies."""

import pathlib
import pickle
import random
from collections.abc import Callable

import pytest

from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.hf.checkpoint import Checkpoint
from flexmoe_jax.hf.load import import_model
from tests.faults.hostile import limits, snapshot

PICKLE = pickle.dumps({"a": [1, 2, 3]})


def refused_by_name(root: pathlib.Path, read: Callable[[], Checkpoint], words: str) -> None:
    """The import into `root` is refused with one of the words (w|w), in a short printable message; nothing changes."""
    before = snapshot(root)
    with limits(), pytest.raises(FlexMoEError) as error:
        import_model(read(), root / "out")
    assert any(word in error.value.what for word in words.split("|"))
    assert error.value.remedy
    assert len(str(error.value)) < 2000
    assert str(error.value).replace("\n", "").isprintable()
    assert snapshot(root) == before


def refused_or_sound(root: pathlib.Path, read: Callable[[], Checkpoint]) -> None:
    """The import is refused, and nothing around it changes, or it gives a model that verifies."""
    before = snapshot(root)
    refused = None
    with limits():
        try:
            import_model(read(), root / "out")
        except FlexMoEError as error:
            refused = error
    if refused is not None:
        assert refused.remedy
        assert snapshot(root) == before
        return
    assert all(check.ok for check in verify_model(root / "out"))


def cut_or_flipped(raw: bytes, seed: int) -> bytes:
    """The bytes with some of them changed, or a part missing or doubled."""
    rng, raw = random.Random(seed), bytearray(raw)
    at, kind = rng.randrange(max(len(raw), 1)), rng.choice(("flip", "flip", "cut", "double"))
    if kind == "flip":
        for _ in range(rng.choice((1, 8))):
            raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        return bytes(raw)
    return bytes(raw[:at]) if kind == "cut" else bytes(raw[:at] + raw)
