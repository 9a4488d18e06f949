"""A checkpoint as read, from a folder or from one GGUF file."""

import dataclasses
import os
import pathlib
from typing import Any

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.foreign import short
from flexmoe_jax.hf import foreign
from flexmoe_jax.hf.configuration import CheckpointConfig, read_config
from flexmoe_jax.hf.foreign import FETCH
from flexmoe_jax.hf.mapping import check_count, drop_surplus, slots, widened
from flexmoe_jax.hf.tensors import INDEX, Tensor, read_tensors
from flexmoe_jax.tokenizer_files import GENERATION_CONFIG, TOKENIZER, read_files


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Configuration, tensors by the names of `transformers`, and tokenizer of one checkpoint; no weight is read yet.

    `where` names it in messages. `tokenizer` is {file name: content}, None without a tokenizer.json. `generation` is
    the content of generation_config.json, {} without one. `notes` say what was read, filled in and passed over.
    """

    where: str
    config: CheckpointConfig
    tensors: dict[str, Tensor]
    tokenizer: dict[str, bytes] | None
    generation: dict[str, Any]
    notes: tuple[str, ...] = ()

    def without_surplus(self) -> "Checkpoint":
        """This checkpoint without the tensors that change nothing, which its notes then name.

        ArtifactError where such a tensor would change the function, and for far too few tensors.
        """
        check_count(self.tensors, self.config.model, self.config.experts, self.where)
        tensors, notes = drop_surplus(self.tensors, self.config.model, self.where)
        experts = tuple(f"expert_{i}" for i in range(self.config.experts))
        notes += widened(tensors, slots(self.config.model, self.config.architecture, experts))
        return dataclasses.replace(self, tensors=tensors, notes=(*self.notes, *self.config.notes, *notes))


def open_folder(path: pathlib.Path | str) -> Checkpoint:
    """The checkpoint in a folder that `save_pretrained` wrote. Raises ArtifactError as its parts do."""
    path = _folder(foreign.existing(path))
    config = read_config(foreign.read_json(path / "config.json"), path / "config.json")
    generation = path / "generation_config.json"
    tokenizer = read_files(path)
    tensors = read_tensors(path)
    return Checkpoint(
        where=str(path),
        config=config,
        tensors=tensors,
        tokenizer=tokenizer if TOKENIZER in tokenizer else None,
        generation=foreign.read_json(generation) if os.path.lexists(generation) else {},
        notes=_notes(path, config.architecture.name, tensors, {*tokenizer}),
    ).without_surplus()


def _folder(path: pathlib.Path) -> pathlib.Path:
    """`path`, if it is a folder with a whole checkpoint; ArtifactError says what it is instead."""
    if not path.is_dir():
        other = "import it with `flexmoe import-gguf`" if path.suffix == ".gguf" else "give the folder that holds it"
        raise ArtifactError(f"{path} is not a folder", other)
    if os.path.lexists(path / "adapter_config.json"):
        base = foreign.read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ArtifactError(
            f"{path} is a PEFT adapter of the model {short(base)}, not a model",
            "merge the two with peft, then import the result: PeftModel.from_pretrained(AutoModelForCausalLM"
            f".from_pretrained({short(base)}), {str(path)!r}).merge_and_unload().save_pretrained('merged')",
        )
    if not os.path.lexists(path / "config.json"):
        revisions = sorted(str(p) for p in path.glob("snapshots/*") if (p / "config.json").exists())
        remedy = f"give one of its snapshots: {', '.join(revisions)}" if revisions else FETCH
        raise ArtifactError(f"{path} has no config.json", remedy)
    return path


def _notes(path: pathlib.Path, name: str, tensors: dict[str, Tensor], read: set[str]) -> tuple[str, ...]:
    """What of the folder was read, where its links lead, and which files were passed over."""
    files = sorted({tensor.stored for tensor in tensors.values()})
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    named = files[0] if len(files) == 1 else f"{len(files)} files"
    others = ", ".join(sorted(read)) or "no tokenizer"
    lines = [f"read {path}: {name}, {len(tensors)} tensors ({dtypes}) in {named}, {others}"]
    links = {
        str((path / file).resolve().parent) for file in ("config.json", *files, *read) if (path / file).is_symlink()
    }
    if links:
        lines.append(f"its files are links into {short(sorted(links))}")
    entries = sorted(entry.name for entry in path.iterdir())
    if over := [entry for entry in entries if entry not in {"config.json", GENERATION_CONFIG, INDEX, *files, *read}]:
        lines.append(f"files passed over: {short(over)}")
    return tuple(lines)
