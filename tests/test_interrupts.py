"""Ctrl-C takes effect also where Python would lose it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from orchestrator.interrupts import check_interrupt, interruptible, interrupts_later


@pytest.fixture(autouse=True)
def pythons_own_handler() -> None:
    """Libraries that other tests of this process load (llama.cpp) put a handler of their own in its place."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Swallows:
    """Its destructor is interrupted."""

    def __del__(self) -> None:
        press()
        end = time.monotonic() + 5
        while time.monotonic() < end:  # until the interrupt is there: another thread may have got the signal
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_swallowed_takes_effect_at_the_next_sign_of_progress() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        check_interrupt()
        swallows = Swallows()
        del swallows
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    check_interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_where_it_is_ignored_it_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible(), interrupts_later():
            press()
        check_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_an_import() -> None:
    reached = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_later():
        press()
        reached.append("end")
    assert reached == ["end"] and signal.getsignal(signal.SIGINT) is before
