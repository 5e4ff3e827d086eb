"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a destructor or a callback of a library it
is swallowed, and while a library is being imported it may be, or leave half a module behind.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = False


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Remember Ctrl-C until the end of the block, so that `check_interrupt` can raise what was swallowed.

    Where it is ignored (in the background of a script, under nohup), it stays so.
    """
    global _came
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        _came = False
        signal.signal(signal.SIGINT, before)


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if one came and the work goes on all the same; in the main thread only."""
    if _came and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt
