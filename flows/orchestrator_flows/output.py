"""A run of a worker outlives the worker: its output goes nowhere, and it goes on.

A process worker reads what its runs print from a pipe. Once the worker is killed, whoever prints there fails, in the
middle of a step; and the console of Prefect's log answers a broken pipe with `SystemExit`. The log is in the API too.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import threading
from functools import cache

from prefect.logging.handlers import PrefectConsoleHandler

_OUTPUTS = (1, 2)


@cache
def outlive_reader() -> None:
    """From now on, lead stdout and stderr to /dev/null as soon as nobody reads them any more."""
    poller = select.poll()
    watched = [output for output in _OUTPUTS if _is_read_by_another(output)]
    for output in watched:
        poller.register(output, 0)  # asks for errors only: that the other end is closed

    def silence() -> None:
        for output in watched:
            _silence(output)

    def watch() -> None:
        left = len(watched)
        while left:
            for output, _ in poller.poll():
                _silence(output)
                poller.unregister(output)
                left -= 1

    for handler in _consoles():  # it may print before the thread gets its turn
        handler.console.on_broken_pipe = silence  # type: ignore[method-assign]
    threading.Thread(target=watch, name="output", daemon=True).start()


def _is_read_by_another(output: int) -> bool:
    try:
        mode = os.fstat(output).st_mode
    except OSError:  # it was closed by whoever started us
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _silence(output: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)


def _consoles() -> list[PrefectConsoleHandler]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    return [handler for handler in handlers if isinstance(handler, PrefectConsoleHandler)]
