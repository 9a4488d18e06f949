"""Token stores: documents as flat token files, memory-mapped and read at any offset.

The files are what OLMo-core reads and writes: raw little-endian token ids named `part-00000.npy` **without** a header,
uint16 where the vocabulary allows it and uint32 otherwise, every document followed by the end-of-document id.
`index.json` beside them says what they hold and their sha256.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.progress import track

FORMAT = "flexmoe-tokens-1"
TOKENS_PER_FILE = 1 << 28  # a new file is begun after the batch that reaches this
BATCH_DOCUMENTS = 512
EOS_SEARCH_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of many documents, end to end, over one or more memory-mapped files.

    The fields from `documents` on are None for OLMo files, which do not record them.
    """

    parts: tuple[np.ndarray, ...]
    starts: np.ndarray  # [parts + 1] int64: where each part begins, and the number of tokens in all
    eos_id: int
    documents: int | None = None
    text_bytes: int | None = None
    vocab_size: int | None = None
    tokenizer_digest: str | None = None
    sha256: tuple[str, ...] | None = None

    @classmethod
    def open(cls, path: str | Path, tokenizer_digest: str | None = None, verify: bool = True) -> "TokenStore":
        """The store that `write_store` wrote at `path`.

        `tokenizer_digest` is the digest the caller's tokenizer must have; `verify` also reads every byte and compares
        the sha256 (sizes are always compared). Raises DataError for anything missing, altered or not matching.
        """
        path = Path(path)
        index = _read_index(path)
        if tokenizer_digest is not None and index["tokenizer_digest"] != tokenizer_digest:
            raise DataError(
                f"{path} was written with tokenizer {index['tokenizer_digest']}, not with {tokenizer_digest}",
                "use the tokenizer of the store, or tokenise the documents again",
            )
        parts = tuple(_map_file(path / file["name"], index["dtype"]) for file in index["files"])
        for file, part in zip(index["files"], parts, strict=True):
            _check_file(path / file["name"], file, part, verify)
        fields = {name: index[name] for name in ("eos_id", "documents", "text_bytes", "vocab_size", "tokenizer_digest")}
        return cls(parts, _starts(parts), sha256=tuple(file["sha256"] for file in index["files"]), **fields)

    @classmethod
    def from_olmo(cls, paths: str | Path | Sequence[str | Path], dtype: str, eos_id: int) -> "TokenStore":
        """OLMo token files without an index: a folder of `.npy` files (in name order) or a list of files.

        `dtype` ("uint16" or "uint32") and `eos_id` are the caller's word, as the files record neither; a wrong one is
        noticed when the first file does not contain the end-of-document id. Raises DataError.
        """
        if isinstance(paths, (str, Path)):
            folder = Path(paths)
            paths = sorted(folder.glob("*.npy")) if folder.is_dir() else [folder]
            if not paths:
                raise DataError(f"{folder} holds no .npy file", "give the folder of the token files, or list them")
        parts = tuple(_map_file(Path(path), dtype) for path in paths)
        if not parts:
            raise DataError("an empty list of token files", "give at least one file")
        head = parts[0][:EOS_SEARCH_TOKENS]
        if not (head == eos_id).any():
            raise DataError(
                f"no end-of-document id {eos_id} among the first {len(head)} tokens of {paths[0]} read as {dtype}",
                "give the dtype and the end-of-document id the files were written with",
            )
        return cls(parts, _starts(parts), eos_id)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) over the files' own: which tokens these are, wherever they lie. Reads files without an index."""
        parts = self.sha256 or [hashlib.sha256(np.ascontiguousarray(part).data).hexdigest() for part in self.parts]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def num_tokens(self) -> int:
        """Tokens in all files together."""
        return int(self.starts[-1])

    def num_windows(self, length: int) -> int:
        """How many windows of `length` tokens and one to predict there are; DataError if not even one."""
        if length < 1:
            raise DataError(f"a window of {length} tokens", "give a length of at least 1")
        count = (self.num_tokens - 1) // length
        if count < 1:
            raise DataError(
                f"{self.num_tokens} tokens are too few for one window of {length} tokens (it takes {length + 1})",
                "give more documents, or a shorter sequence length",
            )
        return count

    def window(self, i: int, length: int) -> np.ndarray:
        """Window `i`: int32 `[length + 1]`, tokens `i*length` to `(i+1)*length` inclusive, across files."""
        if not 0 <= i < self.num_windows(length):
            raise IndexError(f"window {i} of {self.num_windows(length)}")
        begin, end = i * length, (i + 1) * length + 1
        tokens = np.empty(length + 1, np.int32)
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        for part, start in zip(self.parts[first:], self.starts[first:-1], strict=True):
            if start >= end:
                break
            chunk = part[max(begin - start, 0) : end - start]
            at = max(start - begin, 0)
            tokens[at : at + len(chunk)] = chunk
        return tokens


def write_store(
    documents: Iterable[str], tokenizer: Tokenizer, out: str | Path, total: int | None = None
) -> TokenStore:
    """Tokenise `documents` in batches into a new store at `out`, each followed by the end-of-document id.

    `total`, the number of documents where known, is for the progress display. The store appears under its name when it
    is complete and not before: on any error nothing is left. Raises DataError when `out` exists or nothing was given.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists", "remove it, or choose another place for the store")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        index = _write_parts(documents, tokenizer, partial, total)
        (partial / "index.json").write_text(json.dumps(index, indent=2) + "\n")
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return TokenStore.open(out, tokenizer.digest, verify=False)


def _write_parts(documents, tokenizer, folder, total):
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    files: list[dict] = []
    count, text_bytes, writer = 0, 0, None
    with track("tokenising", total, "documents") as advance:
        for texts in batches_of(documents, BATCH_DOCUMENTS):
            tokens = np.concatenate([(*ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]).astype(dtype)
            writer = writer or _Part(folder / f"part-{len(files):05d}.npy")
            writer.write(tokens)
            if writer.tokens >= TOKENS_PER_FILE:
                files.append(writer.close())
                writer = None
            count += len(texts)
            text_bytes += sum(len(text.encode()) for text in texts)
            advance(len(texts))
    if writer:
        files.append(writer.close())
    if not files:
        raise DataError("there are no documents to tokenise", "check the path, the split and the text field")
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_digest": tokenizer.digest,
        "documents": count,
        "text_bytes": text_bytes,
        "files": files,
    }


class _Part:
    """One token file being written, and what the index says about it."""

    def __init__(self, path):
        self.path, self.file, self.sha256, self.tokens = path, path.open("wb"), hashlib.sha256(), 0

    def write(self, tokens):
        raw = tokens.tobytes()
        self.file.write(raw)
        self.sha256.update(raw)
        self.tokens += len(tokens)

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"name": self.path.name, "tokens": self.tokens, "sha256": self.sha256.hexdigest()}


def batches_of(items: Iterable, size: int):
    """Lists of `size` consecutive items; the last may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_index(path):
    try:
        index = json.loads((path / "index.json").read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} has no index.json", "give a folder made by `flexmoe data build`") from error
    except ValueError as error:
        raise DataError(f"{path / 'index.json'} is not JSON: {error}", "write the store again") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r}, not {FORMAT!r}", "write the store again with this version")
    fields = {"dtype", "eos_id", "vocab_size", "tokenizer_digest", "documents", "text_bytes", "files"}
    missing = sorted(fields - index.keys())
    if missing or not index["files"]:
        raise DataError(f"{path / 'index.json'} lacks {', '.join(missing) or 'files'}", "write the store again")
    for number, file in enumerate(index["files"]):
        if file.get("name") != f"part-{number:05d}.npy":  # nothing outside the folder, nothing out of order
            raise DataError(f"{path}: file {number} is named {file.get('name')!r}", "write the store again")
    return index


def _map_file(path, dtype):
    if dtype not in ("uint16", "uint32"):
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


def _check_file(path, file, part, verify):
    if len(part) != file["tokens"]:
        raise DataError(f"{path} holds {len(part)} tokens, its index says {file['tokens']}", "copy the store again")
    if verify:
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file["sha256"]:
            raise DataError(
                f"{path} is altered: sha256 {found}, its index says {file['sha256']}", "copy the store again"
            )


def _starts(parts):
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
