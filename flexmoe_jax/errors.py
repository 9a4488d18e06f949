"""The one family of errors a user can mend.

Every message says what is wrong, with the values that disagree, and what to do about it. The command line prints the
message without a traceback and exits with code 1; anything outside this family is a bug and keeps its traceback.
"""

import dataclasses
from collections.abc import Iterable


class FlexMoEError(ValueError):
    """Something the caller can mend: `what` is wrong (with both values), and the `remedy`."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = ""):
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  remedy: {remedy}" if remedy else what)


class DataError(FlexMoEError):
    """Documents, tokenizers and token stores."""


class ConfigError(FlexMoEError):
    """Configurations and command-line values."""


class ArtifactError(FlexMoEError):
    """Packages, models and run directories: missing, altered, or not belonging together."""


class MachineError(FlexMoEError):
    """Machines, their devices, and how processes were started on them."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check: what was checked, whether it passed, what was found, and what to do about it."""

    subject: str
    ok: bool
    detail: str
    remedy: str = ""

    @property
    def level(self) -> str:
        """ "ok", "bad" for a check that failed, "warn" for one that passed and still has a remedy."""
        return "bad" if not self.ok else "warn" if self.remedy else "ok"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the closest of `known`, else the list of all of them."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(sorted(known))}"
