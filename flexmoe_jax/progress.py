"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PLAIN_INTERVAL_S = 10.0
Advance = Callable[..., None]  # advance(n=1, note=None)


@contextlib.contextmanager
def track(what: str, total: int | None, unit: str = "", start: int = 0) -> Iterator[Advance]:
    """Yields `advance(n=1, note=None)`, which counts `n` more units as done and shows `note`.

    `total` units (None: unknown), of which `start` are done already. A process without stderr shows nothing.
    """
    if sys.stderr is None:
        yield lambda n=1, note=None: None
        return
    reporter = _bar if sys.stderr.isatty() else _lines
    with reporter(what, total, unit, start) as advance:
        yield advance


@contextlib.contextmanager
def _bar(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=total, completed=start, note="")

        def advance(n: int = 1, note: str | None = None):
            bars.update(task, advance=n)
            if note is not None:
                bars.update(task, note=note)

        yield advance


@contextlib.contextmanager
def _lines(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    done, last_note, started, shown = start, "", time.monotonic(), time.monotonic()

    def show():
        of = "" if total is None else f"/{total}"
        print(f"{what}: {done}{of} {unit} {last_note}".rstrip(), file=sys.stderr, flush=True)

    def advance(n: int = 1, note: str | None = None):
        nonlocal done, last_note, shown
        done, last_note = done + n, last_note if note is None else note
        if time.monotonic() - shown >= PLAIN_INTERVAL_S:
            shown = time.monotonic()
            show()

    yield advance
    last_note = f"{last_note} [{time.monotonic() - started:.0f} s]".strip()
    show()
