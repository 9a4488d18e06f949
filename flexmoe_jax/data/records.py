"""Records of files: JSON lines (plain or compressed), Parquet and text, as streams, with their place for messages."""

import bz2
import codecs
import dataclasses
import gzip
import hashlib
import json
import logging
import lzma
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from flexmoe_jax.errors import DataError, did_you_mean
from flexmoe_jax.foreign import refuse_pointer

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18
TEXT_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20  # a longer "line" is a JSON array in a file misnamed .jsonl
PARQUET_ROWS = 64
BYTE_ORDER_MARK = "\ufeff"
MESSAGES = "messages"  # the field of a conversation's turns, where no other is named
# Columns that are read from Parquet.
FIELDS = ("text", "source", "license", "group", "split", "id", "domain", MESSAGES, "tools")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the fields, or columns, that hold a document's text (or its turns) and id."""

    text: str = "text"
    id: str = "id"


DEFAULT = Fields()


def records(file: pathlib.Path, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, JSON object) of every document in `file`; errors of the file system are DataErrors."""
    name = file.name.lower()
    try:
        with file.open("rb") as opened:
            refuse_pointer(opened.read(64), file, DataError)
        if name.endswith(".parquet"):
            yield from _parquet_records(file, fields)
        elif name.endswith(".txt"):
            yield from _text_records(file, fields)
        else:
            yield from _json_records(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}", "repair the file or its permissions") from error


def _text_records(file: pathlib.Path, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file as one record, or as several of one group where it is longer than `TEXT_BYTES`."""
    parts, offset, group, content = 0, 0, None, b""
    with file.open("rb") as opened:
        while more := opened.read(TEXT_BYTES):
            content += more
            if len(content) > TEXT_BYTES:
                cut = _cut(content)
                text = _decode(content[:cut], str(file), offset, file)
                group = group or hashlib.sha256(text.encode()).hexdigest()[:16]
                yield f"{file}, byte {offset}", {fields.text: text, "group": group}
                parts, offset, content = parts + 1, offset + cut, content[cut:]
    rest = {fields.text: _decode(content, str(file), offset, file)}
    yield str(file), rest if group is None else {**rest, "group": group}
    if parts:
        log.info(f"{file}: {offset + len(content)} bytes are read as {parts + 1} documents of one group")


def _cut(content: bytes) -> int:
    """Where a long text is divided: after its last line end or space within `TEXT_BYTES`, else after a character."""
    for separator in (b"\n", b" "):
        if (at := content.rfind(separator, 0, TEXT_BYTES)) >= 0:
            return at + 1
    cut = TEXT_BYTES
    while cut > 1 and content[cut] & 0xC0 == 0x80:  # within a character of UTF-8
        cut -= 1
    return cut


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
        if not offset and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{where} is UTF-16", f"re-encode it: iconv -f UTF-16 -t UTF-8 {file.name}") from error
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
    ending = file.suffix.lower()
    if ending in (".zst", ".zstd"):
        yield from _zst_chunks(file)
        return
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending, open)
    try:
        with opener(file, "rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno is not None or ending != ".bz2":
            raise
        raise _damaged(file, error) from error  # bz2 has no error class of its own


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


def _parquet_records(file: pathlib.Path, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if fields.text not in names and not (fields == DEFAULT and MESSAGES in names):
                raise DataError(f"{file} has no column {fields.text!r}", did_you_mean(fields.text, names))
            wanted = {fields.text, fields.id, *FIELDS}
            number = 0
            for rows in opened.iter_batches(PARQUET_ROWS, columns=[name for name in names if name in wanted]):
                for record in _to_pylist(rows, file, number):
                    number += 1
                    yield f"{file}, row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a complete Parquet file: {error}", "copy or write the file again") from error


def _to_pylist(rows: Any, file: pathlib.Path, before: int) -> list[dict[str, Any]]:
    try:
        return rows.to_pylist()
    except UnicodeDecodeError as error:  # some writers put bytes that are not UTF-8 into string columns
        row = next(i for i in range(len(rows)) if not _is_text(rows.slice(i, 1)))
        raise DataError(
            f"{file}, row {before + row + 1} is not UTF-8: {error.reason}", "write its texts as UTF-8"
        ) from error


def _is_text(row: Any) -> bool:
    try:
        row.to_pylist()
    except UnicodeDecodeError:
        return False
    return True
