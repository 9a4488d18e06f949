"""Token stores are written here: documents as texts, or conversations with marks on the assistant's turns."""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from flexmoe_jax.data.chat import encode_conversations
from flexmoe_jax.data.sources import Document
from flexmoe_jax.data.store import COUNTS, FORMAT, FORMAT_2, STARTS, TokenStore, batches_of, marks_of
from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.files import new_directory, write_json
from flexmoe_jax.progress import track

TOKENS_PER_FILE = 1 << 28  # the batch that reaches this ends the file
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 2 << 20  # encoding takes about 110 bytes of memory per byte of text
_WORD_ENDS, _SEARCHED = re.compile(r"(?<=\S)(\n|(?= ))(?=\S| \S)"), 1 << 16  # where no byte-level BPE merges across


def write_store(
    documents: Iterable[str | Document],
    tokenizer: Tokenizer,
    out: str | pathlib.Path,
    total: int | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Tokenizes `documents` in batches into a new store at `out`, each followed by the end-of-document id.

    Conversations are rendered with the tokenizer's chat template; only the assistant's turns count in a loss. `total`,
    the number of documents if known, is for the progress display; `made_of`, if given, is a JSON object that the index
    keeps: what the caller says of the documents. The store appears under its name only when it is
    complete; an error leaves nothing. Raises DataError when there are no documents, for conversations mixed with texts
    and those that cannot be rendered, ArtifactError when `out` exists or cannot be written.
    """
    with new_directory(pathlib.Path(out)) as folder:
        index = _write_parts(documents, tokenizer, folder, total)
        write_json(folder / "index.json", index if made_of is None else index | {"made_of": made_of})
    return TokenStore.open(out, tokenizer, digest_of=None)


def _write_parts(
    documents: Iterable[str | Document], tokenizer: Tokenizer, folder: pathlib.Path, total: int | None
) -> dict[str, Any]:
    """Writes the token files; returns the content of `index.json`."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    bos_id = None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id
    files: list[dict[str, Any]] = []
    count, text_bytes, writer, marked = 0, 0, None, None
    read = (document if isinstance(document, Document) else _of_text(document) for document in documents)
    with track("tokenizing", total, "documents") as advance:
        for batch in batches_of(read, BATCH_DOCUMENTS, lambda document: len(document.text), BATCH_CHARACTERS):
            kinds = {bool(document.messages) for document in batch}
            if len(kinds | {marked} - {None}) > 1:
                other = next(
                    d for d in batch if bool(d.messages) != (bool(batch[0].messages) if marked is None else marked)
                )
                what = (
                    f"{other.where or 'a document'} is a {'conversation' if other.messages else 'text'}, others are not"
                )
                raise DataError(what, "put conversations and texts into folders of their own, and make a run of each")
            (marked,) = kinds
            tokens, marks = _conversations(tokenizer, batch) if marked else _texts(tokenizer, batch, bos_id)
            writer = writer or _Part(folder / f"part-{len(files):05d}.npy")
            writer.write(tokens.astype(dtype), marks)
            if writer.tokens >= TOKENS_PER_FILE:
                files.append(writer.close())
                writer = None
            count += len(batch)
            text_bytes += sum(len(document.text.encode()) for document in batch)
            advance(len(batch))
    if writer:
        files.append(writer.close())
    if not files:
        raise DataError("there are no documents to tokenize", "check the path, the split and the text field")
    return {
        "format": FORMAT if bos_id is None and not marked else FORMAT_2,
        "dtype": dtype.name,
        "eos_id": tokenizer.eos_id,
        **({} if bos_id is None else {"bos_id": bos_id}),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_digest": tokenizer.digest,
        "documents": count,
        "text_bytes": text_bytes,
        "files": files,
    }


class _Part:
    """One token file being written, its marks if there are any, and its entry in the index."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.tokens = path, 0
        self.files: dict[str, tuple[BinaryIO, Any]] = {}

    def write(self, tokens: np.ndarray, marks: np.ndarray | None) -> None:
        for key, path, array in (("sha256", self.path, tokens), ("marks", marks_of(self.path), marks)):
            if array is not None:
                if key not in self.files:
                    self.files[key] = (path.open("wb"), hashlib.sha256())
                file, digest = self.files[key]
                file.write(array.tobytes())
                digest.update(array.tobytes())
        self.tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        for file, _ in self.files.values():
            file.close()
        digests = {key: digest.hexdigest() for key, (_, digest) in self.files.items()}
        return {"name": self.path.name, "tokens": self.tokens, **digests}


def _of_text(text: str) -> Document:
    return Document(text, *("",) * 6)


def _texts(tokenizer: Tokenizer, batch: list[Document], bos_id: int | None) -> tuple[np.ndarray, None]:
    """The tokens of texts, one after the other."""
    before = () if bos_id is None else (bos_id,)
    try:
        encoded = _encode(tokenizer, [document.text for document in batch])
    except DataError:
        for document in batch:  # name the one
            try:
                _encode(tokenizer, [document.text])
            except DataError as error:
                raise DataError(f"{document.where or 'a document'}: {error.what}", error.remedy) from error
        raise
    return np.concatenate([(*before, *ids, tokenizer.eos_id) for ids in encoded]), None


def _conversations(tokenizer: Tokenizer, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of conversations, one after the other, and their marks."""
    encoded = encode_conversations(tokenizer, [(d.where or "a conversation", d.messages) for d in batch])
    marks = [np.array(one.assistant, np.uint8) * COUNTS for one in encoded]
    for array in marks:
        array[0] = STARTS  # nothing predicts the first token
    return np.concatenate([one.ids for one in encoded]), np.concatenate(marks)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text; a long one is encoded in parts, cut between two words."""
    parts = [(number, part) for number, text in enumerate(texts) for part in _parts(text)]
    ids: list[list[int]] = [[] for _ in texts]
    for some in batches_of(parts, BATCH_DOCUMENTS, lambda item: len(item[1]), BATCH_CHARACTERS):
        for (number, _), found in zip(some, tokenizer.encode_batch([part for _, part in some]), strict=True):
            ids[number] += found
    return ids


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        limit = start + BATCH_CHARACTERS
        found = [m.end() for m in _WORD_ENDS.finditer(text, limit - _SEARCHED, limit)]
        cut = found[-1] if found else limit
        yield text[start:cut]
        start = cut
    yield text[start:]
