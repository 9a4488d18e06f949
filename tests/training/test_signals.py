"""Signals that stop a training: which ones, and what a second one does."""

import os
import signal

import pytest

from flexmoe_jax.training.signals import STOPPING, StopSignals


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_noted_and_a_second_ctrl_c_interrupts(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert (stop.received, stop.name) == (number, number.name)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler repeats itself
        assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) == before


def test_a_signal_that_the_process_ignores_remains_ignored(monkeypatch):
    """`nohup flexmoe train` outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
