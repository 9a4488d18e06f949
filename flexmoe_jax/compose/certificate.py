"""Opt-out certificates: what was removed, what remains, and that the two share no bytes.

A certificate is a sealed JSON file of digests and names; it holds no parameters. It can be checked offline against the
model directory, and against a merge of the remaining packages, which has the digest that the certificate names. The
seal shows alterations, not who wrote the certificate.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.model_changes import check_entries
from flexmoe_jax.artifacts.model_dir import ModelDir, find_signatures, open_model, seal_model
from flexmoe_jax.artifacts.package import check_files, load_package, raise_problems
from flexmoe_jax.artifacts.sealed import check_fields, check_format, is_sha256, read_sealed, seal, write_json
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.errors import ArtifactError, Check, FlexMoEError
from flexmoe_jax.files import CHUNK_BYTES, check_outside, list_files, sha256_file, sync_directory
from flexmoe_jax.tree import PUBLIC, TRUNK, check_owner_name, expert_name, flatten

FORMAT = "flexmoe-certificate-1"
WINDOW = 64  # bytes: common runs of this length of an expert and the rest are found at any offset
_BLOCK = WINDOW // 2  # every window holds a whole block, at any offset
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
    """The sealed certificate of removing the expert `name` from `model`, which still holds the expert.

    `top_k` is the wanted top-k of the model without it. ArtifactError if a package is damaged.
    """
    for part, its in model.manifests.items():  # scan only regular files of the stated sizes
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
    """A context around the removal of the expert `name` from `model`, which makes the model directory `made`.

    The certificate is written beside `path` beforehand, while the expert is still there, and moves to `path` when the
    block succeeds. `path` None: no certificate. ArtifactError if `path` exists or is inside `model` or `made`.
    """
    if path is None:
        yield
        return
    if os.path.lexists(path):
        raise ArtifactError(f"{path} already exists", "give another path for the certificate")
    check_outside(path, [model.path, made])
    write_json(_pending(path), certify(model, name, top_k))
    yield
    publish_pending(path, name, open_model(made), must=True)


def publish_pending(path: pathlib.Path | None, name: str, model: ModelDir, must: bool) -> bool:
    """Moves the pending certificate to `path` if it is about `name` and the present `model`; whether `name` has left.

    `must`: `name` has left, so that a missing certificate is an ArtifactError. So are an entry of the directory that
    the certificate does not know, and a file at `path`. `path` None: returns `must`.
    """
    if path is None:
        return must
    pending = _pending(path)
    if pending.exists():
        fields = read_certificate(pending)
        if (fields["removed"]["name"], fields["model"]) == (name, model.digest):
            check_entries(model.path)
            if os.path.lexists(path):
                what = f"{path} already exists, and the certificate of an interrupted opt-out belongs there"
                raise ArtifactError(what, "move the file away, then run the same command again")
            pending.rename(path)
            sync_directory(path.parent)
            return True
    if must:
        raise ArtifactError(
            f"{name!r} left {model.path} without a certificate, which cannot be made without the expert's bytes",
            "see the journal for what was removed: flexmoe inspect --journal",
        )
    return False


def read_certificate(path: pathlib.Path | str) -> dict:
    """The fields of the certificate at `path`, of the types that `certify` gives; ArtifactError if it is altered."""
    fields = read_sealed(pathlib.Path(path))
    check_format(fields, FORMAT, path)
    check_fields(fields, _FIELDS, path)
    removed: dict[str, type] = {"name": str, "manifest": str, "content": str, "tensors": dict}
    check_fields(fields["removed"], removed, f"{path}: removed")
    check_fields(fields["scan"], {"window_bytes": int, "scanned_bytes": int, "found": list}, f"{path}: scan")
    gone, remaining = fields["removed"], fields["remaining"]
    digests = [*remaining.values(), *gone["tensors"].values(), gone["manifest"], gone["content"]]
    digests += [fields["model"], fields["model_before"]]
    if wrong := [value for value in digests if not is_sha256(value)]:
        raise ArtifactError(f"{path}: {wrong[0]!r} is not a digest", "do not use this certificate")
    if fields["label"] not in ("exact", "approximate") or not all(isinstance(x, str) for x in fields["scan"]["found"]):
        what = f"{path}: the label is {fields['label']!r}, the scan found {fields['scan']['found']!r}"
        raise ArtifactError(what, "do not use this certificate")
    try:
        check_owner_name(gone["name"])
        for name in {*remaining} - {TRUNK}:
            expert_name(name)
    except FlexMoEError as error:
        raise ArtifactError(f"{path}: {error.what}", "do not use this certificate") from error
    return fields


def verify_certificate(path: pathlib.Path | str, model: pathlib.Path | str) -> list[Check]:
    """Checks of the certificate at `path` against the model directory `model`; nothing is raised."""
    try:
        fields = read_certificate(path)
        opened = open_model(model)
    except FlexMoEError as error:
        return [Check("certificate", False, error.what, error.remedy)]
    removed, remaining = fields["removed"], {n: m.digest for n, m in opened.manifests.items()}
    same = f"the model is {opened.digest}, the certificate's {fields['model']}"
    gone = removed["name"] not in opened.manifests and not os.path.lexists(opened.path / removed["name"])
    # A tensor that equals one of the public model (a bias that is still 0) does not count as the owner's.
    theirs = {t.sha256 for name in (TRUNK, PUBLIC) for t in opened.manifests[name].tensors.values()}
    tensors = {sha256: name for name, sha256 in removed["tensors"].items() if sha256 not in theirs}
    found = {file: sha256_file(opened.path / file) for file in list_files(opened.path)[0] if file != JOURNAL}
    left = [
        f"{file} is {removed['name']}/{tensors[sha256]}"
        for file, sha256 in found.items()
        if sha256 in tensors and not _repeats(opened.path / file)
    ]
    shared, label = fields["scan"]["found"], f"{fields['label']} {fields['reason']}".strip()
    return [
        Check("certificate", True, f"{removed['name']} ({removed['manifest']}) was removed: {label}"),
        Check("certificate: model", opened.digest == fields["model"], same),
        Check("certificate: remaining", remaining == fields["remaining"], f"{', '.join(remaining)}"),
        Check("certificate: removed", gone, f"{removed['name']} is {'not' if gone else 'still'} there"),
        Check("certificate: tensors", not left, "; ".join(left) or "no removed tensor is in any file"),
        Check("certificate: scan", not shared, "; ".join(shared) or "no bytes in common when removed"),
    ]


def scan(
    own: Mapping[str, np.ndarray], initial: Mapping[str, np.ndarray], files: Iterable[pathlib.Path], root: pathlib.Path
) -> list[str]:
    """`FILE holds bytes of TENSOR` for every file that shares a run of bytes with a tensor of `own`.

    Finds every run of `WINDOW` bytes at any offset. Blocks that equal the tensor's `initial` values do not count as the
    owner's, and neither do blocks of one repeated word. `FILE` is relative to `root`.
    """
    names, parts = [], []
    for name, array in own.items():
        mine = _blocks(array)
        keep = (mine != mine[:, :1]).any(1)
        if name in initial and (theirs := _blocks(initial[name])).shape == mine.shape:
            keep &= (mine != theirs).any(1)
        names += [name] * int(keep.sum())
        parts.append(mine[keep])
    table = np.concatenate(parts)
    keys = _keys(*table.T)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    maybe = np.zeros(1 << _BITS, bool)  # dismisses most offsets of a file with one lookup
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


def _repeats(file: pathlib.Path) -> bool:
    """Whether a file is one word again and again, as zeros are: nobody's data."""
    words = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
    return len(words) % 8 == 0 and bool((words.reshape(-1, 8) == words[:8]).all())


def _own(model: ModelDir, name: str) -> tuple[dict, dict]:
    """The tensors of the expert `name`, and of the public expert, which are its initial values."""
    own, initial = (load_package(model.package(n), digest=model.manifests[n].digest) for n in (name, PUBLIC))
    return flatten(own), flatten(initial)


def _blocks(array: np.ndarray) -> np.ndarray:
    """The bytes of an array as whole blocks of words [N, 4]."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return raw[: len(raw) // _BLOCK * _BLOCK].view("<u8").reshape(-1, _BLOCK // 8)


def _keys(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """One hash per block of words."""
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
    """(offset, key) of the blocks in `chunk`, at every byte offset, that `maybe` does not dismiss."""
    for shift in range(min(8, len(chunk) - _BLOCK + 1)):
        words = np.frombuffer(chunk, "<u8", (len(chunk) - shift) // 8, shift)
        keys = _keys(*(words[i : len(words) - 3 + i] for i in range(4)))
        for place in np.flatnonzero(maybe[keys >> np.uint64(64 - _BITS)]):
            yield int(place) * 8 + shift, keys[place]


def _pending(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.pending")
