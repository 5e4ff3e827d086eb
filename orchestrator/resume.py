"""What a walk has finished, so that a run after ``kill -9`` goes on at the block where the first one died.

The folder holds ``progress.jsonl`` (append-only, each line flushed to disk: first who this is, then one line for each
finished block) and the hidden states that enter the next block. A line is written after everything that it speaks of,
and is believed only if it has the digest that it ends with, and the bytes that it speaks of those that it names: the
kernel may have lost what it had not yet written out, if the machine went down with the process.

Progress belongs to one identity: model, data, parameters, code, libraries, instruction set and threads of an
operation. The progress of any other is thrown away, never continued.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.canonical import canonical_json, digest_of

_PROGRESS = "progress.jsonl"


@dataclass(frozen=True)
class FinishedBlock:
    """One block that is written.

    layers: what the method reported of each layer. written: digest of the stored bytes of each layer.
    hidden: number of the block that the hidden states on disk enter, and their digest; None if none were needed.
    passed: digest of all compressed layers that the tokens have passed; None if they passed none.
    """

    number: int
    layers: Mapping[str, Mapping[str, float]]
    written: Mapping[str, str]
    scale_dtype: str | None
    hidden: tuple[int, str] | None
    passed: str | None


class WalkProgress:
    """The progress in one folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._path = folder / _PROGRESS
        lines = self._lines()
        if not lines or lines[0] != json.loads(canonical_json(identity)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._append(identity)
            lines = []
        self.blocks = [_block(line) for line in lines[1:]]

    def finish(self, block: FinishedBlock) -> None:
        """Remember that a block is written."""
        self._append(asdict(block))
        self.blocks.append(block)

    def keep_first(self, count: int) -> None:
        """Take back all but the first `count` blocks: their bytes are not what they should be."""
        if count == len(self.blocks):
            return
        kept = self._path.read_bytes().splitlines(keepends=True)[: 1 + count]
        os.truncate(self._path, sum(map(len, kept)))
        del self.blocks[count:]

    def _append(self, value: Any) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            line = canonical_json({"sha256": digest_of(value), "value": value}) + b"\n"
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _lines(self) -> list[Any]:
        """All whole lines; one that was torn by a crash or has changed ends them."""
        try:
            text = self._path.read_bytes()
        except OSError:
            return []
        lines = []
        for line in text.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n") or entry["sha256"] != digest_of(entry["value"]):
                    raise ValueError("torn or changed")
                lines.append(entry["value"])
            except (ValueError, KeyError, TypeError, RecursionError):
                whole = sum(map(len, text.splitlines(keepends=True)[: len(lines)]))
                os.truncate(self._path, whole)
                break
        return lines


def _block(line: Mapping[str, Any]) -> FinishedBlock:
    hidden = line["hidden"]
    return FinishedBlock(**{**line, "hidden": tuple(hidden) if hidden else None})
