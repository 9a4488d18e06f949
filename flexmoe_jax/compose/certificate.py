"""Opt-out certificates: what was removed, what remains, and that no byte of the one is in the other.

A certificate is a sealed JSON file of digests and names; it holds no parameter. Whoever has it and a model directory
can check the two against each other offline, and against a merge of the remaining packages: the digest it names is
the one that such a merge has. The seal shows alterations, not who wrote it.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.model_dir import ModelDir, find_signatures, open_model, seal_model
from flexmoe_jax.artifacts.package import check_files, load_package, raise_problems
from flexmoe_jax.artifacts.sealed import check_fields, check_format, read_sealed, seal, write_json
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.errors import ArtifactError, Check, FlexMoEError
from flexmoe_jax.files import CHUNK_BYTES, list_files, sha256_file, sync_directory
from flexmoe_jax.tree import PUBLIC, TRUNK, check_owner_name, expert_name, flatten

FORMAT = "flexmoe-certificate-1"
WINDOW = 64  # bytes: a run of this length that an expert and the rest have in common is found wherever it lies
_BLOCK = WINDOW // 2  # every window holds a whole block, whatever its offset
_BITS, _MIX = 24, np.uint64(0x9E3779B97F4A7C15)
_FIELDS: dict[str, type] = {
    "format": str,
    "removed": dict,
    "remaining": dict,
    "model": str,
    "model_before": str,
    "label": str,
}
_FIELDS |= {"reason": str, "scan": dict, "digest": str}


def certify(model: ModelDir, name: str, top_k: int | None) -> dict:
    """The certificate of removing the expert `name` from `model`, made while its bytes are still there, sealed."""
    for part, its in model.manifests.items():  # what is scanned is regular files of the sizes stated
        raise_problems(model.package(part), check_files(model.package(part), its))
    manifest = model.manifests[name]
    rest = {n: m for n, m in model.manifests.items() if n != name}
    moved = [n for n, m in rest.items() if name in m.record.tuned_with]
    reason = f"{name!r} had a part in training {', '.join(moved)}" if moved else ""
    files = [model.package(n) / file for n, m in rest.items() for file in ("manifest.json", *m.files)]
    files += [model.package(n) / SIGNATURE for n in find_signatures(model.path, rest)]
    files += [model.path / file for file in model.tokenizer]
    return seal(
        {
            "format": FORMAT,
            "removed": {
                "name": name,
                "manifest": manifest.digest,
                "content": manifest.content,
                "tensors": {path: tensor.sha256 for path, tensor in manifest.tensors.items()},
            },
            "remaining": {n: m.digest for n, m in rest.items()},
            "model_before": model.digest,
            "model": seal_model(model.path, [n for n in rest if n != TRUNK], top_k, rest)["digest"],
            "label": "approximate" if moved else "exact",
            "reason": reason,
            "scan": {
                "window_bytes": WINDOW,
                "scanned_bytes": sum(file.stat().st_size for file in files),
                "found": scan(*_own(model, name), files, model.path),
            },
        }
    )


@contextlib.contextmanager
def certified(
    model: ModelDir, name: str, top_k: int | None, path: pathlib.Path | None, made: pathlib.Path
) -> Iterator[None]:
    """Around the removal of the expert `name` from `model`, which makes the model directory `made`.

    The certificate is written beside `path` before, while the expert's bytes are still there, and moves to `path` when
    the block ends well. None: no certificate.
    """
    if path is None:
        yield
        return
    if os.path.lexists(path):
        raise ArtifactError(f"{path} already exists", "give another path for the certificate")
    if path.resolve().is_relative_to(made.resolve()):
        raise ArtifactError(f"{path} lies in the model it is about", "give a path outside")
    write_json(_pending(path), certify(model, name, top_k))
    yield
    publish_pending(path, name, open_model(made), must=True)


def publish_pending(path: pathlib.Path | None, name: str, model: ModelDir, must: bool) -> bool:
    """Puts the pending certificate at `path` if it is about `name` and what `model` now is; whether `name` has left.

    `must`: it has, so a certificate that was asked for and cannot be had is an ArtifactError.
    """
    if path is None:
        return must
    pending = _pending(path)
    if pending.exists():
        fields = read_certificate(pending)
        if (fields["removed"]["name"], fields["model"]) == (name, model.digest):
            pending.rename(path)
            sync_directory(path.parent)
            return True
    if must:
        raise ArtifactError(
            f"{name!r} left {model.path} without a certificate, and cannot have one now that its bytes are gone",
            "the journal records what was removed: flexmoe inspect --journal",
        )
    return False


def read_certificate(path: pathlib.Path | str) -> dict:
    """The fields of the certificate at `path`; ArtifactError for anything altered."""
    fields = read_sealed(pathlib.Path(path))
    check_format(fields, FORMAT, path)
    check_fields(fields, _FIELDS, path)
    removed: dict[str, type] = {"name": str, "manifest": str, "content": str, "tensors": dict}
    check_fields(fields["removed"], removed, f"{path}: removed")
    check_fields(fields["scan"], {"window_bytes": int, "scanned_bytes": int, "found": list}, f"{path}: scan")
    try:
        check_owner_name(fields["removed"]["name"])
        for name in {*fields["remaining"]} - {TRUNK}:
            expert_name(name)
    except FlexMoEError as error:
        raise ArtifactError(f"{path}: {error.what}", "do not use this certificate") from error
    return fields


def verify_certificate(path: pathlib.Path | str, model: pathlib.Path | str) -> list[Check]:
    """Checks of the certificate at `path` and the model directory it is said to be about."""
    try:
        fields = read_certificate(path)
        opened = open_model(model)
    except FlexMoEError as error:
        return [Check("certificate", False, error.what)]
    removed, remaining = fields["removed"], {n: m.digest for n, m in opened.manifests.items()}
    same = f"the model is {opened.digest}, the certificate's {fields['model']}"
    gone = removed["name"] not in opened.manifests and not os.path.lexists(opened.path / removed["name"])
    # A tensor that equals one of the public expert's (a bias that stayed 0) is the public trainer's.
    theirs = {t.sha256 for name in (TRUNK, PUBLIC) for t in opened.manifests[name].tensors.values()}
    tensors = {sha256: name for name, sha256 in removed["tensors"].items() if sha256 not in theirs}
    found = {file: sha256_file(opened.path / file) for file in list_files(opened.path)[0] if file != JOURNAL}
    left = [f"{file} is {removed['name']}/{tensors[sha256]}" for file, sha256 in found.items() if sha256 in tensors]
    shared, label = fields["scan"]["found"], f"{fields['label']} {fields['reason']}".strip()
    return [
        Check("certificate", True, f"{removed['name']} ({removed['manifest']}) was removed: {label}"),
        Check("certificate: model", opened.digest == fields["model"], same),
        Check("certificate: remaining", remaining == fields["remaining"], f"{', '.join(remaining)}"),
        Check("certificate: removed", gone, f"{removed['name']} is {'not' if gone else 'still'} there"),
        Check("certificate: tensors", not left, "; ".join(left) or "no removed tensor is in any file"),
        Check("certificate: scan", not shared, "; ".join(map(str, shared)) or "no bytes in common when removed"),
    ]


def scan(
    own: Mapping[str, np.ndarray], began: Mapping[str, np.ndarray], files: Iterable[pathlib.Path], root: pathlib.Path
) -> list[str]:
    """`FILE holds bytes of TENSOR` for every file with a run of bytes out of a tensor of `own`.

    Every run of `WINDOW` bytes is found at any offset. Blocks that still are what the tensor `began` as are not the
    owner's, and blocks of one repeated word are nobody's.
    """
    names, parts = [], []
    for name, array in own.items():
        mine = _blocks(array)
        keep = (mine != mine[:, :1]).any(1)
        if name in began and (theirs := _blocks(began[name])).shape == mine.shape:
            keep &= (mine != theirs).any(1)
        names += [name] * int(keep.sum())
        parts.append(mine[keep])
    table = np.concatenate(parts)
    keys = _keys(*table.T)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    maybe = np.zeros(1 << _BITS, bool)  # most places in a file are dismissed by one look into this
    maybe[keys >> np.uint64(64 - _BITS)] = True
    found = []
    for file in files:
        hits: set[str] = set()
        for chunk in _overlapping(file):
            for at, key in _candidates(chunk, maybe):
                block = np.frombuffer(chunk, "<u8", _BLOCK // 8, at)
                same = order[np.searchsorted(keys, key, "left") : np.searchsorted(keys, key, "right")]
                hits |= {names[place] for place in same if (table[place] == block).all()}
        found += [f"{file.relative_to(root)} holds bytes of {name}" for name in sorted(hits)]
    return found


def _own(model: ModelDir, name: str) -> tuple[dict, dict]:
    """The tensors of the expert `name`, and of the public expert as which it began."""
    own, began = (load_package(model.package(n), digest=model.manifests[n].digest) for n in (name, PUBLIC))
    return flatten(own), flatten(began)


def _blocks(array: np.ndarray) -> np.ndarray:
    """The bytes of an array as whole blocks of words [N, 4]."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return raw[: len(raw) // _BLOCK * _BLOCK].view("<u8").reshape(-1, _BLOCK // 8)


def _keys(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """One number per block of words, which depends on all of them."""
    keys = first * _MIX
    for words in others:
        keys = (keys ^ words) * _MIX
    return keys


def _overlapping(file: pathlib.Path) -> Iterable[bytes]:
    with open(file, "rb") as reader:
        tail = b""
        while chunk := reader.read(CHUNK_BYTES):
            yield tail + chunk
            tail = (tail + chunk)[-_BLOCK + 1 :]


def _candidates(chunk: bytes, maybe: np.ndarray) -> Iterator[tuple[int, np.uint64]]:
    """(offset, key) of the blocks in `chunk`, at every byte offset, that `maybe` lets pass."""
    for shift in range(min(8, len(chunk) - _BLOCK + 1)):
        words = np.frombuffer(chunk, "<u8", (len(chunk) - shift) // 8, shift)
        keys = _keys(*(words[i : len(words) - 3 + i] for i in range(4)))
        for place in np.flatnonzero(maybe[keys >> np.uint64(64 - _BITS)]):
            yield int(place) * 8 + shift, keys[place]


def _pending(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.pending")
