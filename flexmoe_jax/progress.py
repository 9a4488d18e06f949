"""Progress on stderr: a bar and a table of measurements on a terminal, a plain line every few seconds elsewhere."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PLAIN_INTERVAL_S = 10.0
ROWS = 12  # the newest rows of the table
Advance = Callable[..., None]  # advance(n=1, note=None, row=None)


@contextlib.contextmanager
def track(what: str, total: int | None, unit: str = "", start: int = 0) -> Iterator[Advance]:
    """Yields `advance(n=1, note=None, row=None)`, which counts `n` more units as done and shows `note`.

    `row`, {column: text}, is shown as a row of a table on a terminal, and nowhere else. `total` units (None: unknown),
    of which `start` are done already. A process without stderr shows nothing.
    """
    if sys.stderr is None:
        yield lambda n=1, note=None, row=None: None
        return
    reporter = _bar if sys.stderr.isatty() else _lines
    with reporter(what, total, unit, start) as advance:
        yield advance


@contextlib.contextmanager
def _bar(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bars, rows = Progress(*columns), collections.deque[dict[str, str]](maxlen=ROWS)
    task = bars.add_task(what, total=total, completed=start, note="")
    with Live(bars, console=Console(stderr=True), refresh_per_second=4) as live:

        def advance(n: int = 1, note: str | None = None, row: dict[str, str] | None = None):
            bars.update(task, advance=n)
            if note is not None:
                bars.update(task, note=note)
            if row is not None:
                rows.append(row)
                live.update(Group(_table(rows), bars))

        yield advance


def _table(rows: collections.deque[dict[str, str]]) -> Any:
    """The rows under all their columns."""
    from rich.table import Table

    columns = list(dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row))
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


@contextlib.contextmanager
def _lines(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    done, last_note, started, shown = start, "", time.monotonic(), time.monotonic()

    def show():
        of = "" if total is None else f"/{total}"
        print(f"{what}: {done}{of} {unit} {last_note}".rstrip(), file=sys.stderr, flush=True)

    def advance(n: int = 1, note: str | None = None, row: dict[str, str] | None = None):
        nonlocal done, last_note, shown
        done, last_note = done + n, last_note if note is None else note
        if time.monotonic() - shown >= PLAIN_INTERVAL_S:
            shown = time.monotonic()
            show()

    yield advance
    last_note = f"{last_note} [{time.monotonic() - started:.0f} s]".strip()
    show()
