"""A fault: one promise of the package broken in one place, and the test that must notice it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """The text `old`, which `file` of the package holds exactly once, becomes `new`; `test` must then fail."""

    what: str
    """What is broken, in plain words. It names the fault."""

    file: str
    """The file, relative to the package."""

    old: str
    """Source text, short: one expression."""

    new: str
    """What replaces it."""

    test: str
    """The pytest node that must fail: `tests/FILE.py::test_name`."""

    def applied(self, source: str) -> str:
        """The file's content with the fault; ValueError unless `old` occurs once, SyntaxError if that is not Python."""
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} times: {self.old}")
        broken = source.replace(self.old, self.new)
        compile(broken, self.file, "exec")
        return broken
