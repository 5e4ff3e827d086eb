"""What the commands write: results go to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import typer

_results: list[int] = []  # descriptor of the real stdout, while a command runs
Command = TypeVar("Command", bound=Callable[..., None])


def results_only(command: Command) -> Command:
    """While the command runs, let only `print_text` and `print_json` reach stdout.

    What libraries, plugins and child processes print goes to stderr.
    """

    @functools.wraps(command)
    def run_it(*arguments: Any, **options: Any) -> None:
        sys.stdout.flush()
        real = os.dup(1)
        os.dup2(2, 1)
        _results.append(real)
        try:
            command(*arguments, **options)
        finally:
            _results.pop()
            sys.stdout.flush()
            os.dup2(real, 1)
            os.close(real)

    return cast("Command", run_it)


def print_text(text: str) -> None:
    """Write a result."""
    with os.fdopen(os.dup(_results[-1] if _results else 1), "w", encoding="utf-8") as stdout:
        stdout.write(text + "\n")


def print_json(document: Mapping[str, Any]) -> None:
    """Write a result for machines."""
    print_text(json.dumps(document, indent=2, allow_nan=False))


def say(text: str) -> None:
    """Write anything that is no result."""
    typer.echo(text, err=True)
