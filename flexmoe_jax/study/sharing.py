"""Several processes that work on one study: each makes what no other is making, and finds what the others have made."""

import logging
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from flexmoe_jax.errors import BusyError
from flexmoe_jax.files import lock_directory

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE = 1.0  # seconds before what another process was making is looked for again


def once(path: pathlib.Path, make: Callable[[pathlib.Path], object]) -> None:
    """Has `make` write `path`, whole or not at all, unless it exists. BusyError while another process does."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock_directory(path.parent, f".{path.name}.lock"):
            if not path.exists():
                make(path)


def every(calls: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all calls. Those that are busy do not keep the next from being done: BusyError at the end.

    A KeyError after a busy one is for want of it.
    """
    results: list[T] = []
    busy: BusyError | None = None
    for call in calls:
        try:
            results.append(call())
        except BusyError as error:
            busy = error
        except KeyError:
            if busy is None:
                raise
    if busy is not None:
        raise busy
    return results


def until_free(call: Callable[[], T]) -> T:
    """The result of `call`, which is made again until nothing that it needs is busy; the log says what it waits for."""
    said = ""
    while True:
        try:
            return call()
        except BusyError as error:
            if error.what != said:
                said = error.what
                log.info(f"waiting: {said}")
            time.sleep(PAUSE)
