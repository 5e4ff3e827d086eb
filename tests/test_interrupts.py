"""Ctrl-C takes effect also where Python would lose it.

Each case is a process of its own: libraries that other tests load (llama.cpp, Prefect) put handlers of signals of their
own in the place of Python's, and an interrupt that misses its mark would end the tests.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

PREAMBLE = """
import os, signal, time
from orchestrator.interrupts import check_interrupt, interruptible, interrupts_later

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background starts with it ignored

def press():
    os.kill(os.getpid(), signal.SIGINT)
"""


def run(case: str) -> str:
    """What the case printed; it must end well."""
    code = PREAMBLE + textwrap.dedent(case)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_interrupt_that_is_swallowed_takes_effect_at_the_next_sign_of_progress() -> None:
    printed = run("""
        class Swallows:
            def __del__(self):
                press()
                end = time.monotonic() + 5
                while time.monotonic() < end:  # until the interrupt is there
                    pass

        before = signal.getsignal(signal.SIGINT)
        with interruptible():
            check_interrupt()
            swallows = Swallows()
            del swallows
            print("swallowed")
            try:
                check_interrupt()
            except KeyboardInterrupt:
                print("raised")
        check_interrupt()
        print(signal.getsignal(signal.SIGINT) is before)
    """)
    assert printed.split() == ["swallowed", "raised", "True"]


def test_where_it_is_ignored_it_stays_so() -> None:
    printed = run("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible(), interrupts_later():
            press()
            print("ignored")
        check_interrupt()
        print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
    """)
    assert printed.split() == ["ignored", "True"]


def test_an_interrupt_waits_for_the_end_of_an_import() -> None:
    printed = run("""
        before = signal.getsignal(signal.SIGINT)
        try:
            with interrupts_later():
                press()
                print("end")
        except KeyboardInterrupt:
            print("raised")
        print(signal.getsignal(signal.SIGINT) is before)
    """)
    assert printed.split() == ["end", "raised", "True"]
