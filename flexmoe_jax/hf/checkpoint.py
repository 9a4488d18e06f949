"""A checkpoint as read, from a folder or from one GGUF file."""

import dataclasses
import logging
import pathlib
from typing import Any

from flexmoe_jax.artifacts.sealed import parse_json, read_bytes
from flexmoe_jax.hf.configuration import CheckpointConfig, read_config
from flexmoe_jax.hf.tensors import INDEX, Tensor, read_tensors
from flexmoe_jax.tokenizer_files import TOKENIZER, read_files

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Configuration, tensors by the names of `transformers`, and tokenizer of one checkpoint; no weight is read yet.

    `where` names it in messages. `tokenizer` is {file name: content}, None without a tokenizer.json. `generation` is
    the content of generation_config.json, {} without one.
    """

    where: str
    config: CheckpointConfig
    tensors: dict[str, Tensor]
    tokenizer: dict[str, bytes] | None
    generation: dict[str, Any]


def open_folder(path: pathlib.Path | str) -> Checkpoint:
    """The checkpoint in a folder that `save_pretrained` wrote. Raises ArtifactError as its parts do."""
    path = pathlib.Path(path)
    config = read_config(parse_json(read_bytes(path / "config.json"), path / "config.json"), path / "config.json")
    generation = path / "generation_config.json"
    tokenizer = read_files(path)
    used = {"config.json", INDEX, *tokenizer}
    left = sorted(p.name for p in path.iterdir() if p.name not in used and p.suffix != ".safetensors")
    if left:
        log.info(f"{path}: not read: {', '.join(left)}")
    return Checkpoint(
        where=str(path),
        config=config,
        tensors=read_tensors(path),
        tokenizer=tokenizer if TOKENIZER in tokenizer else None,
        generation=parse_json(read_bytes(generation), generation) if generation.is_file() else {},
    )
