"""Errors that the user can fix.

Every message says what is wrong, with the values that disagree, and what to do about it. The command line prints the
message without a traceback and exits with `exit_code`; any other exception is a bug and keeps its traceback.
"""

import dataclasses
import unicodedata
from collections.abc import Iterable

_LONGEST = 10_000  # characters of what a message says: it may quote a stranger
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: controls, surrogates, ends of lines and paragraphs
LINE_ENDS = "\n\t"
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class FlexMoEError(ValueError):
    """An error that the caller can fix: `what` is wrong (with both values), and the `remedy`."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = ""):
        what = what if len(what) <= _LONGEST else f"{what[: _LONGEST // 2]} ... {what[-_LONGEST // 2 :]}"
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  remedy: {remedy}" if remedy else what)


class DataError(FlexMoEError):
    """Wrong documents, tokenizers, token stores or token ids."""


class DivergedError(DataError):
    """Training whose loss or gradients do not stay finite."""


class ConfigError(FlexMoEError):
    """Wrong configurations and command-line values."""


class ArtifactError(FlexMoEError):
    """Packages, models and run directories that are missing, altered, or do not belong together."""


class BusyError(ArtifactError):
    """A directory that another process is using."""


class MachineError(FlexMoEError):
    """Machines, devices or processes that cannot do the work."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check: what was checked, whether it passed, what was found, and the remedy if there is one."""

    subject: str
    ok: bool
    detail: str
    remedy: str = ""

    @property
    def level(self) -> str:
        """ "ok"; "bad": the check failed; "warn": it passed, and there is a remedy all the same."""
        return "bad" if not self.ok else "warn" if self.remedy else "ok"


def printable(text: str, keep: str = "") -> str:
    """`text` with everything that acts in a terminal written as an escape: controls, ends of lines, text direction.

    `keep` are characters that stay, such as the ends of lines of a text of several.
    """
    if text.isprintable():
        return text
    acts = (c not in keep and (unicodedata.category(c) in _CONTROL or c in _BIDIRECTIONAL) for c in text)
    return "".join(ascii(c)[1:-1] if bad else c for c, bad in zip(text, acts, strict=True))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelled `name`: the closest of `known`, else the list of all of them."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(sorted(known))}"
