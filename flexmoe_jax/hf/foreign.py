"""The files of a checkpoint: how long they may be, their JSON, and paths that are not on this machine."""

import os
import pathlib
import re
from typing import Any

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.foreign import check_count, read_bytes
from flexmoe_jax.json_files import parse_json

# The longest of each kind in bytes: several times the longest that is published. Tokenizers: tokenizer_files.LIMITS.
LIMITS = {
    "config.json": 4 << 20,  # exports of ours keep every owner's record in it
    "generation_config.json": 1 << 20,
    "adapter_config.json": 1 << 20,
    "model.safetensors.index.json": 32 << 20,
    "header of safetensors": 32 << 20,
    "header of GGUF": 128 << 20,
}
FETCH = "fetch the checkpoint again from its source"
_HUB_ID = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/?")


def existing(path: pathlib.Path | str) -> pathlib.Path:
    """`path`, if it exists on this machine; ArtifactError says what to do with an id of the hub, or an address."""
    text = str(path)
    if os.path.lexists(text):
        return pathlib.Path(path)
    hub_id = _HUB_ID.fullmatch(text)
    if "://" in text and not hub_id:
        what = f"{text} is an address, and only paths on this machine are read and written"
        raise ArtifactError(what, "copy it to a local disk first, or mount it as a folder")
    remedy = f"give a path on this machine; relative paths start at {os.getcwd()}"
    if hub_id:
        remedy += f"; a model of the Hugging Face hub is downloaded first: hf download {hub_id[1]} --local-dir DIR"
    raise ArtifactError(f"{text} does not exist", remedy)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the file `path`, one of LIMITS; ArtifactError as of `read_bytes` and `parse`."""
    limit = LIMITS[path.name]
    return parse(read_bytes(path, limit, ArtifactError), path, limit)


def parse(raw: bytes, where: object, limit: int) -> dict[str, Any]:
    """The JSON object in `raw`; ArtifactError for too many values for this `limit`, and as of `parse_json`."""
    check_count(raw, where, limit, ArtifactError)
    try:
        return parse_json(raw, where, limit)
    except ArtifactError as error:
        raise ArtifactError(error.what, f"{FETCH}, or repair the file") from error
