"""Signals that stop a training between two steps, so that its state can be saved."""

import logging
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)

# A scheduler's end of a job, a closed terminal, the warning that Slurm is asked for, and Ctrl-C.
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
EX_TEMPFAIL = 75  # of sysexits.h: try again
EX_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports Ctrl-C


class StopSignals:
    """While active, the first of the signals `STOPPING` only sets `received`; Ctrl-C after it is a KeyboardInterrupt.

    Signals that the process ignores (`nohup`) remain ignored. Only the main thread can receive signals: in another
    thread nothing changes, and a line of the log says so.
    """

    received: signal.Signals | None = None

    @property
    def name(self) -> str:
        """The signal's name, for messages."""
        return "another process" if self.received is None else self.received.name

    def __enter__(self) -> "StopSignals":
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            log.info("training outside the main thread: no signal saves the state, config.save_minutes does")
            return self
        for number in STOPPING:
            if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):  # None: not Python's
                self._previous[number] = handler
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
