"""Errors that the user can fix.

Every message says what is wrong, with the values that disagree, and what to do about it. The command line prints the
message without a traceback and exits with `exit_code`; any other exception is a bug and keeps its traceback.
"""

import dataclasses
from collections.abc import Iterable


class FlexMoEError(ValueError):
    """An error that the caller can fix: `what` is wrong (with both values), and the `remedy`."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = ""):
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  remedy: {remedy}" if remedy else what)


class DataError(FlexMoEError):
    """Wrong documents, tokenizers, token stores or token ids."""


class ConfigError(FlexMoEError):
    """Wrong configurations and command-line values."""


class ArtifactError(FlexMoEError):
    """Packages, models and run directories that are missing, altered, or do not belong together."""


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelled `name`: the closest of `known`, else the list of all of them."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(sorted(known))}"
