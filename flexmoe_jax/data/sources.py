"""Documents from files: JSON lines (plain, gzip, zstandard), Parquet, and folders of text files.

Everything streams: no file is ever held whole. A line is a JSON object with a `text`; what else a `Document` has may be
missing and is then filled in. Documents of nothing but white space are passed over.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from flexmoe_jax.errors import DataError, did_you_mean

SPLITS = ("train", "heldout")
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
CHUNK_BYTES = 1 << 18
MAX_LINE_BYTES = 256 << 20  # a longer "line" is a JSON array that somebody named .jsonl
PARQUET_ROWS = 64
BYTE_ORDER_MARK = "\ufeff"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it is from. Documents of one `group` (play, paper, file, day, thread) share a split.

    `domain` is the closed domain a document was taken from, so that public look-alikes can be told apart.
    """

    text: str
    source: str
    license: str
    group: str
    split: str
    id: str
    domain: str


def document_id(text: str) -> str:
    """The first 16 hex digits of the text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_documents(path: str | Path, split: str = "train", text_field: str = "text") -> Iterator[Document]:
    """The documents of one split in `path`: a file, or a folder, read recursively in sorted order without hidden files.

    A folder that holds files named `<split>.*`, as our domain folders do, is read from these alone. Otherwise all files
    not named after the other split are read, and the field "split" decides: "heldout" documents are the held-out ones,
    all others are for training. A missing id is the hash of the text, a missing group the id, a missing split "train".
    Raises DataError at once for a path or split that does not exist, and while reading, with file and line, for a
    broken line or for no document at all.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r}", did_you_mean(split, SPLITS))
    files, named = _choose_files(Path(path), split)
    return _documents(Path(path), files, split, named, text_field)


def content_digest(path: str | Path, split: str = "train", text_field: str = "text") -> str:
    """sha256 (hex) over the split's documents in reading order, all fields: the same however the files are packed."""
    digest = hashlib.sha256()
    for document in read_documents(path, split, text_field):
        digest.update(json.dumps(dataclasses.astuple(document)).encode() + b"\n")
    return digest.hexdigest()


def blend(folders: Collection[Path], out: Path) -> None:
    """The file `out` of training documents: every folder's first ones, as many bytes of each as the smallest has.

    Nothing is done if the file is there.
    """
    if out.exists():
        return
    smallest = min(sum(len(document.text.encode()) for document in read_documents(folder)) for folder in folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for folder in folders:
            left = smallest
            for document in read_documents(folder):
                left -= len(document.text.encode())
                if left < 0:
                    break
                file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")
    os.replace(partial, out)


def _choose_files(path, split):
    """The files to read, and whether their name, not the field in them, says which split they are."""
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise DataError(f"{path} has an ending that is not understood", f"give one of {', '.join(ENDINGS)}")
        return [path], False
    if not path.is_dir():
        raise DataError(f"{path} does not exist", "give a file of documents or a folder of such files")
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk enters what is left here
        files += [Path(folder, name) for name in names if name.endswith(ENDINGS) and not name.startswith(".")]
    files.sort(key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise DataError(f"{path} holds no file of documents", f"the endings understood are {', '.join(ENDINGS)}")
    named = [file for file in files if _stem(file) == split]
    chosen = named or [file for file in files if _stem(file) not in SPLITS]
    if not chosen:
        other = _other(split)
        raise DataError(
            f"{path} has no document of the split {split!r}, only files named {other}.*", f"ask for {other!r}"
        )
    return chosen, bool(named)


def _stem(file):
    return file.name.partition(".")[0]


def _other(split):
    return SPLITS[split == "train"]


def _documents(path, files, split, named, text_field):
    seen = given = 0
    for file in files:
        for where, record in _records(file, text_field):
            text = _text(record, text_field, where)
            if not text.strip():
                continue
            seen += 1
            document = _document(record, text)
            if named or (document.split == "heldout") == (split == "heldout"):
                given += 1
                yield document if document.split == split else dataclasses.replace(document, split=split)
    if not seen:
        raise DataError(f"{path} is empty: no documents in {len(files)} file(s)", "give files with documents")
    if not given:
        raise DataError(
            f"{path} has no document of the split {split!r}; its {seen} documents are all {_other(split)!r}",
            f'ask for {_other(split)!r}, or mark documents with the field "split"',
        )


def _document(record, text):
    field = {name: str(value) for name, value in record.items() if value is not None}
    identity = field.get("id") or document_id(text)
    return Document(
        text=text,
        source=field.get("source", ""),
        license=field.get("license", "unknown"),
        group=field.get("group") or identity,
        split=field.get("split", "train"),
        id=identity,
        domain=field.get("domain", ""),
    )


def _text(record, text_field, where):
    text = record.get(text_field)
    if not isinstance(text, str):
        found = f"has no {text_field!r}" if text is None else f"has {text_field!r} of type {type(text).__name__}"
        raise DataError(
            f"{where} {found}; its fields are {', '.join(map(str, record)) or 'none'}",
            "every document needs its text as a string; name the field that holds it",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text_field!r} has a lone surrogate at character {error.start}", "repair it"
        ) from error
    return text


def _records(file, text_field):
    """(place for messages, JSON object) of every document in `file`; what the file system refuses is a DataError."""
    try:
        if file.name.endswith(".parquet"):
            yield from _parquet_records(file, text_field)
        elif file.name.endswith(".txt"):
            yield str(file), {text_field: _decode(file.read_bytes(), str(file), 0, file)}
        else:
            yield from _json_records(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}", "repair the file or its permissions") from error


def _json_records(file):
    offset = 0
    for number, line in enumerate(_lines(_chunks(file), file), start=1):
        where = f"{file}, line {number}"
        text = _decode(line, where, offset, file)
        offset += len(line) + 1
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}", "write one JSON object per line") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is a JSON {type(record).__name__}, not an object", "write one object per line")
        yield where, record


def _decode(content, where, offset, file):
    """The text of `content`, which begins at byte `offset` of the file, without the file's byte order mark."""
    try:
        return content.decode().removeprefix("" if offset else BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start} of the file",
            f"re-encode it, for example: iconv -f ISO-8859-1 -t UTF-8 {file.name} (with its true encoding after -f)",
        ) from error


def _lines(chunks, file):
    rest: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        size += len(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest, size = [others[-1]], len(others[-1])
        if size > MAX_LINE_BYTES:
            raise DataError(f"{file} has a line of over {MAX_LINE_BYTES >> 20} MiB", "write one JSON object per line")
    if size:
        yield b"".join(rest)


def _chunks(file):
    """The file's bytes, decompressed, piece by piece; DataError when the compressed data is cut short or altered."""
    if file.name.endswith(".zst"):
        yield from _zst_chunks(file)
    elif file.name.endswith(".gz"):
        try:
            with gzip.open(file) as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(file, error) from error
    else:
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                yield chunk


def _zst_chunks(file):
    # Not `stream_reader`: it takes the end of a truncated file for the end of the data.
    import zstandard

    frame = None
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise _damaged(file, error) from error
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame:
        raise _damaged(file, "it ends in the middle of a frame")


def _damaged(file, reason):
    return DataError(f"{file} is truncated or damaged: {reason}", "copy or compress the file again")


def _parquet_records(file, text_field):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if text_field not in names:
                raise DataError(f"{file} has no column {text_field!r}", did_you_mean(text_field, names))
            wanted = {text_field, *(field.name for field in dataclasses.fields(Document))}
            number = 0
            for rows in opened.iter_batches(PARQUET_ROWS, columns=[name for name in names if name in wanted]):
                for record in rows.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a whole Parquet file: {error}", "copy or write the file again") from error
