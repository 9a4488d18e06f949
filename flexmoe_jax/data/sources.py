"""Documents from files: JSON lines (plain, gzip, zstandard), Parquet, and folders of text files.

Everything streams: no file is held in memory as a whole, except single text files. A line is a JSON object with a
`text`; the other fields of a `Document` are optional and get defaults. Documents of white space only are skipped.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from flexmoe_jax.errors import DataError, did_you_mean
from flexmoe_jax.files import write_bytes

SPLITS = ("train", "heldout")
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
CHUNK_BYTES = 1 << 18
MAX_LINE_BYTES = 256 << 20  # a longer "line" is a JSON array in a file misnamed .jsonl
PARQUET_ROWS = 64
BYTE_ORDER_MARK = "\ufeff"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its origin. Documents of one `group` (play, paper, file, day, thread) share a split.

    `domain` is the closed domain that a document was taken from; it identifies the look-alikes in the public split.
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


def read_documents(path: str | pathlib.Path, split: str = "train", text_field: str = "text") -> Iterator[Document]:
    """The documents of one split in `path`: a file, or a folder, read recursively in sorted order without hidden files.

    If a folder holds files named `<split>.*`, as the folders of a mix do, only these are read. Otherwise all files not
    named after the other split are read, and the field "split" decides: "heldout" documents are held out, all others
    are for training. A missing id is the hash of the text, a missing group the id, a missing split "train".
    Raises DataError immediately for a path or split that does not exist, and while reading for a broken line (with file
    and line) and for no document at all.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r}", did_you_mean(split, SPLITS))
    files, named = _choose_files(pathlib.Path(path), split)
    return _documents(pathlib.Path(path), files, split, named, text_field)


def content_digest(path: str | pathlib.Path, split: str = "train", text_field: str = "text") -> str:
    """sha256 (hex) over all fields of the split's documents in reading order; independent of how files are packed."""
    digest = hashlib.sha256()
    for document in read_documents(path, split, text_field):
        digest.update(json.dumps(dataclasses.astuple(document)).encode() + b"\n")
    return digest.hexdigest()


def blend(folders: Collection[pathlib.Path], out: pathlib.Path) -> None:
    """Writes the file `out` with the first training documents of every folder, as many bytes of each as the smallest.

    Does nothing if `out` exists.
    """
    if out.exists():
        return
    smallest = min(sum(len(document.text.encode()) for document in read_documents(folder)) for folder in folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, (json_line(document) for folder in folders for document in _first_documents(folder, smallest)))


def json_line(document: Document) -> bytes:
    """A document as one line of a `.jsonl` file, in UTF-8."""
    return (json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n").encode()


def _first_documents(folder: pathlib.Path, max_bytes: int) -> Iterator[Document]:
    left = max_bytes
    for document in read_documents(folder):
        left -= len(document.text.encode())
        if left < 0:
            return
        yield document


def _choose_files(path: pathlib.Path, split: str) -> tuple[list[pathlib.Path], bool]:
    """The files to read, and whether their names, not the field in them, decide the split."""
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise DataError(f"{path} has an unknown ending", f"give one of {', '.join(ENDINGS)}")
        return [path], False
    if not path.is_dir():
        raise DataError(f"{path} does not exist", "give a file of documents or a folder of such files")
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk enters only these
        files += [pathlib.Path(folder, name) for name in names if name.endswith(ENDINGS) and not name.startswith(".")]
    files.sort(key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise DataError(f"{path} holds no file of documents", f"known endings are {', '.join(ENDINGS)}")
    named = [file for file in files if _stem(file) == split]
    chosen = named or [file for file in files if _stem(file) not in SPLITS]
    if not chosen:
        other = _other(split)
        raise DataError(
            f"{path} has no document of the split {split!r}, only files named {other}.*", f"ask for {other!r}"
        )
    return chosen, bool(named)


def _stem(file: pathlib.Path) -> str:
    return file.name.partition(".")[0]


def _other(split: str) -> str:
    return SPLITS[split == "train"]


def _documents(
    path: pathlib.Path, files: list[pathlib.Path], split: str, named: bool, text_field: str
) -> Iterator[Document]:
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


def _document(record: Mapping[str, Any], text: str) -> Document:
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


def _text(record: Mapping[str, Any], text_field: str, where: str) -> str:
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


def _records(file: pathlib.Path, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, JSON object) of every document in `file`; errors of the file system are DataErrors."""
    try:
        if file.name.endswith(".parquet"):
            yield from _parquet_records(file, text_field)
        elif file.name.endswith(".txt"):
            yield str(file), {text_field: _decode(file.read_bytes(), str(file), 0, file)}
        else:
            yield from _json_records(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}", "repair the file or its permissions") from error


def _json_records(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _decode(content: bytes, where: str, offset: int, file: pathlib.Path) -> str:
    """The text of `content`, which starts at byte `offset` of the file, without the file's byte order mark."""
    try:
        return content.decode().removeprefix("" if offset else BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start} of the file",
            f"re-encode it, for example: iconv -f ISO-8859-1 -t UTF-8 {file.name} (with its true encoding after -f)",
        ) from error


def _lines(chunks: Iterable[bytes], file: pathlib.Path) -> Iterator[bytes]:
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


def _chunks(file: pathlib.Path) -> Iterator[bytes]:
    """The file's bytes, decompressed, as a stream; DataError when the compressed data is truncated or altered."""
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


def _zst_chunks(file: pathlib.Path) -> Iterator[bytes]:
    # Not `stream_reader`: it accepts a truncated file as complete.
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


def _damaged(file: pathlib.Path, reason: object) -> DataError:
    return DataError(f"{file} is truncated or damaged: {reason}", "copy or compress the file again")


def _parquet_records(file: pathlib.Path, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
        raise DataError(f"{file} is not a complete Parquet file: {error}", "copy or write the file again") from error
