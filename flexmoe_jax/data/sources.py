"""Documents from files: JSON lines (plain or compressed), Parquet, and text files (which files: data/corpus.py).

Everything streams: no file is held in memory as a whole. A line is a JSON object with a `text`; the other fields of a
`Document` are optional and get defaults. Documents of white space only are skipped. A text file is one document, or,
where it is longer than `records.TEXT_BYTES`, several of one group, cut at line ends.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flexmoe_jax.data.chat import check_turns
from flexmoe_jax.data.corpus import SPLITS, TRAIN, Corpus, split_of_field, survey
from flexmoe_jax.data.records import DEFAULT, MESSAGES, Fields, records
from flexmoe_jax.errors import DataError, did_you_mean, printable
from flexmoe_jax.files import write_bytes

log = logging.getLogger(__name__)

MAX_SHOWN = 5  # files named in the log


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its origin. Documents of one `group` (play, paper, file, day, thread) share a split.

    `domain` is the closed domain that a document was taken from; it identifies the look-alikes in the public split. A
    conversation has `messages`, its turns; its `text` is the text of these. `where` is its place, for messages.
    """

    text: str
    source: str
    license: str
    group: str
    split: str
    id: str
    domain: str
    messages: tuple[Mapping[str, Any], ...] = ()
    where: str = dataclasses.field(default="", compare=False)


def document_id(text: str) -> str:
    """The first 16 hex digits of the text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_documents(path: str | pathlib.Path, split: str = TRAIN, fields: Fields = DEFAULT) -> Iterator[Document]:
    """The documents of one split in `path`: a file, or a folder, read recursively in sorted order without hidden files.

    A file's name, or its folder's, decides its split (`corpus.split_of`); where no name does, the field "split" does,
    and documents without one are for training. A missing id is the hash of the text, a missing group the id. What is
    read and passed over is logged, once per process. Raises DataError immediately for a path or split that does not
    exist, and while reading for a broken line (with file and line), for a field that contradicts the file's name, and
    for no document at all.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r}", did_you_mean(split, SPLITS))
    corpus = survey(path)
    if not corpus.of(split):
        other = _other(split)
        raise DataError(
            f"{path} has no document of the split {split!r}, only files named for {other}", f"ask for {other!r}"
        )
    return read_corpus(corpus, split, fields)


def content_digest(path: str | pathlib.Path, split: str = TRAIN, fields: Fields = DEFAULT) -> str:
    """sha256 (hex) over all fields of the split's documents in reading order; independent of how files are packed."""
    digest = hashlib.sha256()
    for document in read_documents(path, split, fields):
        digest.update(json.dumps([*_texts(document).values(), *document.messages]).encode() + b"\n")
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
    """A document as one line of a `.jsonl` file, in UTF-8; of a conversation the text of its turns."""
    return (json.dumps(_texts(document), ensure_ascii=False) + "\n").encode()


def _texts(document: Document) -> dict[str, str]:
    """The fields that every document has."""
    return {name: value for name, value in vars(document).items() if name not in ("messages", "where")}


def _first_documents(folder: pathlib.Path, max_bytes: int) -> Iterator[Document]:
    left = max_bytes
    for document in read_documents(folder):
        left -= len(document.text.encode())
        if left < 0:
            return
        yield document


def _other(split: str) -> str:
    return SPLITS[split == TRAIN]


_told: set[tuple] = set()


def _tell(corpus: Corpus, split: str, counts: Mapping[str, int]) -> None:
    """Logs once per process what was read of the corpus."""
    lines = [f"{corpus.path}: {sum(counts.values())} documents for {split} from {len(counts)} file(s)"]
    if corpus.path.is_dir():
        shown = [f"{name} {count}" for name, count in list(counts.items())[:MAX_SHOWN]]
        lines[0] += f": {', '.join(shown)}" + (", ..." if len(counts) > MAX_SHOWN else "")
        lines += [f"{corpus.path}: {corpus.passed_over_text()}"] if corpus.passed_over else []
    _tell_once(*lines)


def _tell_once(*lines: str) -> None:
    if lines not in _told:
        _told.add(lines)
        for line in lines:
            log.info(printable(line))  # names of files may hold anything


def read_corpus(corpus: Corpus, split: str, fields: Fields = DEFAULT) -> Iterator[Document]:
    """The documents of one split in the files of `corpus`; DataError while reading, as of `read_documents`."""
    seen = 0
    counts: dict[str, int] = {}
    for file, named in corpus.of(split):
        name = str(file.relative_to(corpus.path)) if file != corpus.path else file.name
        for where, record in records(file, fields):
            messages = _messages(record, fields, where)
            joined = {fields.text: "\n\n".join(turn["content"] for turn in messages)} if messages else record
            text = _text(joined, fields.text, where)
            if not text.strip():
                continue
            seen += 1
            document = _document(record, text, messages, fields, named, where)
            if document.split == split:
                counts[name] = counts.get(name, 0) + 1
                yield document
    if not seen:
        raise DataError(
            f"{corpus.path} is empty: no documents in {len(corpus.of(split))} file(s)", "give files with documents"
        )
    if not counts:
        raise DataError(
            f"{corpus.path} has no document of the split {split!r}; its {seen} documents are all {_other(split)!r}",
            f'ask for {_other(split)!r}, or mark documents with the field "split"',
        )
    _tell(corpus, split, counts)


def _messages(record: Mapping[str, Any], fields: Fields, where: str) -> tuple[dict[str, Any], ...]:
    """The turns of a conversation; () of a text."""
    turns = record.get(fields.text)
    if fields == DEFAULT and MESSAGES in record:
        if turns is None:
            turns = record[MESSAGES]
        else:
            _tell_once(f"{where.rpartition(', ')[0]}: has texts and {MESSAGES}; the texts are read")
    if not isinstance(turns, list):
        return ()
    if record.get("tools"):
        raise DataError(f"{where} has tools, which are not supported", "leave such conversations out")
    # Parquet fills the keys that other turns have with nulls.
    plain = tuple({k: v for k, v in t.items() if v is not None} if isinstance(t, dict) else t for t in turns)
    check_turns(plain, where)
    return plain


def _document(
    record: Mapping[str, Any],
    text: str,
    messages: tuple[dict[str, Any], ...],
    fields: Fields,
    named: str | None,
    where: str,
) -> Document:
    field = {name: str(value) for name, value in record.items() if value is not None}
    identity = field.get(fields.id) or document_id(text)
    said = split_of_field(field["split"], where) if field.get("split") else None
    if None not in (named, said) and named != said:
        raise DataError(
            f'{where}: its field "split" is {field["split"]!r}, the file is named for {named}',
            "rename the file, or correct the field",
        )
    return Document(
        text=text,
        source=field.get("source", ""),
        license=field.get("license", "unknown"),
        group=field.get("group") or identity,
        split=named or said or TRAIN,
        id=identity,
        domain=field.get("domain", ""),
        messages=messages,
        where=where,
    )


def _text(record: Mapping[str, Any], text_field: str, where: str) -> str:
    text = record.get(text_field)
    if not isinstance(text, str):
        found = f"has no {text_field!r}" if text is None else f"has {text_field!r} of type {type(text).__name__}"
        raise DataError(
            f"{where} {found}; its fields are {', '.join(map(str, record)) or 'none'}",
            "every document needs its text as a string; name its field with --text-field NAME or config.text_field (a "
            f'conversation has its turns there, or in {MESSAGES!r}: [{{"role": "user", "content": "text"}}, ..])',
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text_field!r} has a lone surrogate at character {error.start}", "repair it"
        ) from error
    return text
