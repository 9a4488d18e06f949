"""Which files under a path hold documents, and of which split; what is passed over is named.

Corpora come in many layouts. A file's split is that of the nearest name with such a word, its own or a folder's:
`data/validation-00000-of-00001.parquet`, `test/a.jsonl.gz`, `heldout.jsonl`. Every kind of validation and test text is
held out here. Nothing is guessed: a name with words of both splits is refused.
"""

import dataclasses
import os
import pathlib
import re
from collections import Counter

from flexmoe_jax.errors import DataError

TRAIN, HELDOUT = SPLITS = ("train", "heldout")
_WORDS = {
    TRAIN: r"train|training",
    HELDOUT: r"held[-_ .]?out|validation|valid|val|dev|eval|evaluation|test|testing",
}
_PATTERNS = {split: re.compile(rf"(?<![a-z])({words})(?![a-z])") for split, words in _WORDS.items()}
_LINES = ("jsonl", "ndjson", "json.gz", "json.zst", "json.zstd", "json.bz2", "json.xz")
_RECORDS = re.compile(
    r"\.(parquet|((jsonl|ndjson)(\.(gz|zst|zstd|bz2|xz))?)|json\.(gz|zst|zstd|bz2|xz))", re.IGNORECASE
)
ENDINGS = ".jsonl and .ndjson (also .gz, .zst, .bz2, .xz), .json.gz (and so on), .parquet, .txt"
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of documents under `path`, in reading order, each with the split that its name says, or None.

    `passed_over` are the other files, relative to `path`, but for hidden ones.
    """

    path: pathlib.Path
    files: tuple[tuple[pathlib.Path, str | None], ...]
    passed_over: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[tuple[pathlib.Path, str | None], ...]:
        """The files that may hold documents of `split`."""
        return tuple((file, named) for file, named in self.files if named in (None, split))

    def passed_over_text(self) -> str:
        """The number of files passed over and their endings, for a message; empty if there are none."""
        if not self.passed_over:
            return ""
        endings = Counter("".join(pathlib.PurePath(name).suffixes[-2:]) or "no ending" for name in self.passed_over)
        kinds = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(_SHOWN))
        first = ", ".join(self.passed_over[:_SHOWN]) + (", ..." if len(self.passed_over) > _SHOWN else "")
        return f"passed over: {len(self.passed_over)} file(s) ({kinds}): {first}"


def survey(path: str | pathlib.Path) -> Corpus:
    """The documents' files at `path`: a file, or a folder, read recursively in sorted order without hidden files.

    Links to files and folders are followed. Text files beside files of records are passed over: they are licenses and
    notes. Raises DataError for a path that does not exist, without such files, or with a name of both splits.
    """
    path = pathlib.Path(path)
    if path.is_file():
        if not is_documents(path.name):
            raise DataError(f"{path} has an unknown ending", f"give one of {ENDINGS}")
        return Corpus(path, ((path, split_of(path.name)),))
    if not path.is_dir():
        raise DataError(f"{path} does not exist", "give a file of documents or a folder of such files")
    every = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
    chosen = [file for file in every if is_documents(file.name)]
    records = [file for file in chosen if _RECORDS.search(file.name)]
    chosen = records or chosen
    if not chosen:
        found = Corpus(path, (), tuple(file.relative_to(path).as_posix() for file in every)).passed_over_text()
        raise DataError(f"{path} holds no file of documents" + (f"; {found}" if found else ""), f"known are {ENDINGS}")
    taken = set(chosen)
    rest = tuple(file.relative_to(path).as_posix() for file in every if file not in taken)
    return Corpus(path, tuple((file, split_of(file.relative_to(path).as_posix())) for file in chosen), rest)


def is_documents(name: str) -> bool:
    """Whether a file of this name holds documents."""
    return name.lower().endswith(".txt") or _RECORDS.search(name) is not None


def split_of(name: str) -> str | None:
    """The split that a relative path says by its nearest word for one, or None. DataError for words of both."""
    for part in reversed(pathlib.PurePosixPath(name).parts):
        found = [split for split, pattern in _PATTERNS.items() if pattern.search(part.lower())]
        if len(found) > 1:
            what = f"{name}: {part!r} has words of both splits"
            raise DataError(what, f"rename it: {TRAIN} for training, {HELDOUT} (or validation, test) for held-out text")
        if found:
            return found[0]
    return None


def split_of_field(value: str, where: str) -> str:
    """The split that the field "split" of a document says. DataError for a word that is not known."""
    found = [split for split, pattern in _PATTERNS.items() if pattern.fullmatch(value.strip().lower())]
    if len(found) != 1:
        words = " | ".join(_WORDS.values()).replace("|", ", ").replace("[-_ .]?", "-")
        raise DataError(f'{where}: its field "split" is {value!r}', f"give one of: {words}; or rename the field")
    return found[0]


def _walk(path: pathlib.Path) -> list[pathlib.Path]:
    """Regular files under `path`, without hidden ones; a folder that is reached twice is read once."""
    files, seen = [], set[str]()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            files += [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return [file for file in files if file.is_file()]
