"""What an import reads from, whatever its files are: a configuration, tensors by their published names, a tokenizer."""

import dataclasses
import pathlib
from typing import Any

from flexmoe_jax.artifacts.model_dir import TOKENIZER, TOKENIZER_CONFIG
from flexmoe_jax.artifacts.sealed import parse_json, read_bytes
from flexmoe_jax.hf.configuration import Read, read_config
from flexmoe_jax.hf.tensors import Tensor, read_checkpoint


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors have the names of `transformers`; `tokenizer` is {file name: content}, or None."""

    where: str
    config: Read
    tensors: dict[str, Tensor]
    tokenizer: dict[str, bytes] | None
    generation: dict[str, Any]


def open_folder(path: pathlib.Path | str) -> Source:
    """The checkpoint in a folder that `save_pretrained` wrote; weights are not read."""
    path = pathlib.Path(path)
    config = read_config(parse_json(read_bytes(path / "config.json"), path / "config.json"), path / "config.json")
    generation = path / "generation_config.json"
    tokenizer = {name: read_bytes(path / name) for name in (TOKENIZER, TOKENIZER_CONFIG) if (path / name).is_file()}
    return Source(
        str(path),
        config,
        read_checkpoint(path),
        tokenizer if TOKENIZER in tokenizer else None,
        parse_json(read_bytes(generation), generation) if generation.is_file() else {},
    )
