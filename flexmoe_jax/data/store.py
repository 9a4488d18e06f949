"""Token stores: documents as flat token files, memory-mapped and read at any offset.

The files have the format of OLMo-core: raw little-endian token ids named `part-00000.npy` **without** a header, uint16
where the vocabulary allows it and uint32 otherwise, every document followed by the end-of-document id. `index.json`
beside them states their content and their sha256. Where texts begin with a token, it stands before every document.

A store of conversations has a file of marks beside each token file (`part-00000.marks`), one byte per token: COUNTS
where the token is a target of the loss, STARTS where it is the first of a document. Stores of such documents have the
format `flexmoe-tokens-2`.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from flexmoe_jax.data.corpus import is_documents
from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import Check, DataError, FlexMoEError
from flexmoe_jax.files import sha256_file
from flexmoe_jax.foreign import read_bytes
from flexmoe_jax.json_files import MAX_JSON_BYTES, parse_json

T = TypeVar("T")
DigestOf = Callable[[pathlib.Path], str]

FORMAT, FORMAT_2 = "flexmoe-tokens-1", "flexmoe-tokens-2"
COUNTS, STARTS = 1, 2
EOS_SEARCH_TOKENS = 1 << 22
MAX_INDEX_BYTES = 1 << 26


def sha256_of(path: pathlib.Path) -> str:
    """sha256 (hex) of the file `path`; a link to a file elsewhere is fine."""
    return sha256_file(path.resolve())


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of many documents, concatenated, in one or more memory-mapped files.

    The fields from `documents` to `sha256` are None for OLMo files, which do not record them; `sha256`, which is over
    the sha256 of the files, may be given.
    """

    parts: tuple[np.ndarray, ...]  # uint16 or uint32 [tokens of the file] each
    starts: np.ndarray  # int64 [parts + 1]: the position of each part's first token, and the total number of tokens
    eos_id: int
    bos_id: int | None = None  # where every document begins with one
    marks: tuple[np.ndarray, ...] | None = None  # uint8 [tokens of the file] each, of conversations
    documents: int | None = None
    text_bytes: int | None = None
    vocab_size: int | None = None
    tokenizer_digest: str | None = None
    sha256: str | None = None

    @classmethod
    def open(
        cls, path: str | pathlib.Path, tokenizer: Tokenizer | None = None, digest_of: DigestOf | None = sha256_of
    ) -> "TokenStore":
        """The store that `writer.write_store` wrote at `path`.

        The store must have been written with `tokenizer`, if given. `digest_of` gives the sha256 of a file, which is
        compared with the index: by default every byte is read; None compares sizes only. Raises DataError for anything
        missing, altered or not matching.
        """
        path = pathlib.Path(path)
        index = _read_index(path)
        if tokenizer is not None:
            _check_tokenizer(path, index, tokenizer)
        parts = tuple(_map_file(path / file["name"], index["dtype"]) for file in index["files"])
        marked = index["files"][0].get("marks") is not None
        marks = tuple(_map_file(marks_of(path / file["name"]), "uint8") for file in index["files"]) if marked else None
        digests = [file["sha256"] for file in index["files"]]
        for number, (file, part) in enumerate(zip(index["files"], parts, strict=True)):
            _check_file(path / file["name"], file["tokens"], file["sha256"], part, digest_of)
            if marks is not None:
                digests.append(file["marks"])
                _check_file(marks_of(path / file["name"]), file["tokens"], file["marks"], marks[number], digest_of)
        fields = {name: index[name] for name in ("eos_id", "documents", "text_bytes", "vocab_size", "tokenizer_digest")}
        return cls(parts, _starts(parts), marks=marks, bos_id=index.get("bos_id"), sha256=_joined(digests), **fields)

    @classmethod
    def from_olmo(
        cls,
        paths: str | pathlib.Path | Sequence[str | pathlib.Path],
        dtype: str,
        eos_id: int,
        vocab_size: int | None = None,
        bos_id: int | None = None,
        digest_of: DigestOf | None = None,
    ) -> "TokenStore":
        """OLMo token files without an index: a folder of `.npy` files (in name order) or a list of files.

        The caller states `dtype` ("uint16" or "uint32") and `eos_id`, because the files record neither. `digest_of`
        gives the sha256 of each file; without it `digest` reads them when it is asked for. Raises
        DataError for a missing file, and where the start of a file contradicts them: no end-of-document id, no `bos_id`
        (if given) or an id that `vocab_size` does not have, or two-byte tokens that are four-byte ones with zeros in
        between.
        """
        if isinstance(paths, (str, pathlib.Path)):
            folder = pathlib.Path(paths)
            paths = sorted(folder.glob("*.npy")) if folder.is_dir() else [folder]
            if not paths:
                raise DataError(f"{folder} holds no .npy file", "give the folder of the token files, or list them")
        parts = tuple(_map_file(pathlib.Path(path), dtype) for path in paths)
        if not parts:
            raise DataError("an empty list of token files", "give at least one file")
        for path, part in zip(paths, parts, strict=True):
            _check_head(path, part[:EOS_SEARCH_TOKENS], dtype, (eos_id, bos_id), vocab_size)
        digests = None if digest_of is None else _joined(digest_of(pathlib.Path(path)) for path in paths)
        return cls(parts, _starts(parts), eos_id, bos_id, vocab_size=vocab_size, sha256=digests)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) over the sha256 of the files: identifies the tokens. Files without an index are read whole."""
        return self.sha256 or _joined(
            hashlib.sha256(np.ascontiguousarray(part).data).hexdigest() for part in self.parts
        )

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all files."""
        return int(self.starts[-1])

    def num_windows(self, length: int) -> int:
        """The number of windows of `length` tokens plus the next one; DataError if there is none."""
        if length < 1:
            raise DataError(f"a window of {length} tokens", "give a length of at least 1")
        count = (self.num_tokens - 1) // length
        if count < 1:
            raise DataError(
                f"{self.num_tokens} tokens are too few for one window of {length} tokens (it needs {length + 1})",
                "give more documents, or a shorter sequence length",
            )
        return count

    def window(self, i: int, length: int) -> np.ndarray:
        """Window `i`: int32 [length + 1], tokens `i * length` to `(i + 1) * length` inclusive, across files."""
        if not 0 <= i < self.num_windows(length):
            raise IndexError(f"window {i} of {self.num_windows(length)}")
        start, end = i * length, (i + 1) * length + 1
        tokens = self._slice(self.parts, start, end)
        if self.vocab_size is not None and (largest := int(tokens.max())) >= self.vocab_size:
            raise DataError(
                f"tokens {start} to {end - 1} hold the id {largest}, the tokenizer has {self.vocab_size} ids",
                "give tokens of this tokenizer, of the dtype that they were written with",
            )
        return tokens

    def window_marks(self, i: int, length: int) -> np.ndarray:
        """The marks of `window(i, length)`: int32 [length + 1]. Only a store of conversations has them."""
        assert self.marks is not None
        return self._slice(self.marks, i * length, (i + 1) * length + 1)

    def _slice(self, parts: Sequence[np.ndarray], start: int, end: int) -> np.ndarray:
        """Entries `start` to `end` across files, int32."""
        entries = np.empty(end - start, np.int32)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for part, part_start in zip(parts[first:], self.starts[first:-1], strict=True):
            if part_start >= end:
                break
            chunk = part[max(start - part_start, 0) : end - part_start]
            at = max(part_start - start, 0)
            entries[at : at + len(chunk)] = chunk
        return entries


def verify_store(path: pathlib.Path, *, quick: bool = False) -> list[Check]:
    """Checks of every file of the token store `path` against its index; `quick` compares sizes only."""
    try:
        index = _read_index(path)
    except DataError as error:
        return [Check("index.json", False, error.what, error.remedy)]
    checks = []
    for file in index["files"]:
        rows = [(path / file["name"], index["dtype"], file["sha256"])]
        rows += [(marks_of(path / file["name"]), "uint8", file["marks"])] if file.get("marks") else []
        for name, dtype, sha256 in rows:
            try:
                _check_file(name, file["tokens"], sha256, _map_file(name, dtype), None if quick else sha256_of)
                checks.append(Check(name.name, True, f"{file['tokens']} tokens"))
            except DataError as error:
                checks.append(Check(name.name, False, error.what, error.remedy))
    return checks


def kind_of(path: pathlib.Path) -> str:
    """What training data at `path` is: "store" (of `writer.write_store`), "olmo" (raw token files) or "documents".

    DataError for a folder that holds raw token files beside files of documents.
    """
    index = path / "index.json"
    if index.is_file():
        with index.open("rb") as file:
            if b'"flexmoe-tokens-' in file.read(MAX_INDEX_BYTES):
                return "store"
    if not path.is_dir() or not any(path.glob("*.npy")):
        return "documents"
    if others := sorted(file.name for file in path.iterdir() if is_documents(file.name)):
        raise DataError(
            f"{path} holds both token files (*.npy) and documents ({others[0]}, ...)",
            "move one kind to a folder of its own",
        )
    return "olmo"


def batches_of(
    items: Iterable[T], size: int, weight: Callable[[T], int] = lambda item: 0, limit: int = 1
) -> Iterator[list[T]]:
    """Lists of `size` consecutive items, or of fewer: the last one, and one whose weights add up to `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += weight(item)
        if len(batch) == size or total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def marks_of(path: pathlib.Path) -> pathlib.Path:
    """The file of the marks beside a token file."""
    return path.with_suffix(".marks")


_INDEX: dict[str, type] = {
    "dtype": str,
    "eos_id": int,
    "vocab_size": int,
    "tokenizer_digest": str,
    "documents": int,
    "text_bytes": int,
    "files": list,
}


def _read_index(path: pathlib.Path) -> dict[str, Any]:
    """The checked fields of a store's index.json."""
    try:
        index = parse_json(read_bytes(path / "index.json", MAX_JSON_BYTES, DataError), path / "index.json")
    except FlexMoEError as error:
        raise DataError(error.what, "write the store again: flexmoe data tokenize") from error
    found = index.get("format")
    if found not in (FORMAT, FORMAT_2):
        what = f"{path} has format {found!r}, not {FORMAT!r} or {FORMAT_2!r}"
        raise DataError(what, "write the store again with this version")
    wrong = [name for name, kind in _INDEX.items() if type(index.get(name)) is not kind]
    if type(index.get("bos_id", 0)) not in (int, type(None)):
        wrong.append("bos_id")
    if wrong or not index["files"]:
        what = f"{path / 'index.json'}: {', '.join(wrong) or 'files'} is missing, or of another type"
        raise DataError(what, "write the store again")
    for number, file in enumerate(index["files"]):
        # Nothing outside the folder, nothing out of order; all files have marks, or none has.
        if not isinstance(file, dict) or file.get("name") != f"part-{number:05d}.npy":
            raise DataError(f"{path}: file {number} of the index is {file!r}", "write the store again")
        kinds = {"tokens": int, "sha256": str, "marks": type(index["files"][0].get("marks"))}
        if any(type(file.get(name)) is not kind for name, kind in kinds.items()):
            raise DataError(f"{path}: file {number} of the index is {file!r}", "write the store again")
    return index


def _map_file(path: pathlib.Path, dtype: str) -> np.memmap:
    if dtype not in ("uint8", "uint16", "uint32"):
        raise DataError(f"tokens of type {dtype!r}", "token files are uint16 or uint32")
    if not path.is_file():
        raise DataError(f"{path} is not a file", "check the path; copy the store again")
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise DataError(f"{path} has {size} bytes, not a positive multiple of {width} ({dtype})", "copy the file again")
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise DataError(f"{path} has a NumPy header", "write raw tokens, as OLMo-core does: array.tofile(path)")
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")


def _check_head(
    path: object, head: np.ndarray, dtype: str, needed: Sequence[int | None], vocab_size: int | None
) -> None:
    """Refuses the first tokens of a file without an index that cannot be of this dtype and vocabulary.

    `needed` are the ids at the end and, where there is one, at the start of documents.
    """
    wrong = None
    if dtype == "uint16" and len(head) > 1 and not head[1::2].any():
        wrong = "every second one is 0, as in tokens of type uint32"
    elif not (head == needed[0]).any():
        wrong = f"none is the end-of-document id {needed[0]}"
    elif vocab_size is not None and (largest := int(head.max())) >= vocab_size:
        wrong = f"the largest id is {largest}, the tokenizer has {vocab_size} ids"
    elif needed[1] is not None and not (head == needed[1]).any():
        wrong = f"none is the id {needed[1]}, with which this tokenizer begins every text"
    if wrong:
        raise DataError(
            f"the first {len(head)} tokens of {path}, read as {dtype}: {wrong}",
            "give the dtype (config.token_dtype) and the tokenizer that the files were written with, or the documents",
        )


def _check_tokenizer(path: pathlib.Path, index: dict[str, Any], tokenizer: Tokenizer) -> None:
    bos_id = None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id
    ours = {"tokenizer_digest": tokenizer.digest, "eos_id": tokenizer.eos_id, "bos_id": bos_id}
    marked = index["files"][0].get("marks") is not None
    for name, value in ours.items():
        # A chat template, not the store, puts tokens before a conversation.
        if index.get(name) != value and not (name == "bos_id" and marked):
            raise DataError(
                f"{path} was written with {name} {index.get(name)}, the tokenizer has {value}",
                "use the tokenizer of the store, or tokenize the documents again",
            )


def _check_file(path: pathlib.Path, tokens: int, sha256: str, part: np.ndarray, digest_of: DigestOf | None) -> None:
    if len(part) != tokens:
        raise DataError(f"{path} holds {len(part)} tokens, its index states {tokens}", "copy the store again")
    if digest_of is not None and (found := digest_of(path)) != sha256:
        raise DataError(f"{path} is altered: sha256 {found}, its index states {sha256}", "copy the store again")


def _joined(digests: Iterable[str]) -> str:
    """sha256 (hex) over the sha256 of files."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
