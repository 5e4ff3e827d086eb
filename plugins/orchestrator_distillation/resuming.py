"""Where a training run is, on disk: a killed one goes on from there and ends in the same bytes.

Everything that decides what comes next is kept: parameters, both moments of the optimizer, the state of every random
generator, what students wrote and may be read again. A state is written beside the last one, then made the valid one
by one rename; its digest is checked before it is believed. How often it is written changes no byte of the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A state is written this often at most, and so rarely that it takes a twentieth of the time.
SAVE_SECONDS = 30.0
_SHARE = 20.0
_POINTER = "training.json"


class TrainingState:
    """The states of one training run in a folder; without a folder nothing is kept.

    identity: JSON-able facts beside those of the step on which the bytes of the result depend (threads).
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._saved_at = time.monotonic()
        self._took = 0.0

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        waited = time.monotonic() - self._saved_at
        return self._folder is not None and waited >= max(SAVE_SECONDS, _SHARE * self._took)

    def save(self, update: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the state after `update` updates. facts: JSON-able."""
        if self._folder is None:
            return
        started = time.monotonic()
        name = f"training-{update:09d}.safetensors"
        _write_tensors(self._folder / name, tensors)
        pointer = {
            "identity": self._identity,
            "update": update,
            "file": name,
            "sha256": _sha256(self._folder / name),
            "facts": dict(facts),
        }
        unfinished = self._folder / f"{_POINTER}.part"
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(pointer, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._folder / _POINTER)
        for old in self._folder.glob("training-*.safetensors"):
            if old.name != name:
                old.unlink()
        self._saved_at = time.monotonic()
        self._took = self._saved_at - started

    def load(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return what `save` kept last, or None if there is nothing, or nothing that can be believed."""
        from safetensors.torch import load_file

        if self._folder is None:
            return None
        try:
            pointer = json.loads((self._folder / _POINTER).read_text(encoding="utf-8"))
            path = self._folder / str(pointer["file"])
            if pointer["identity"] != self._identity or _sha256(path) != pointer["sha256"]:
                return None
            return int(pointer["update"]), load_file(path), dict(pointer["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Best:
    """The parameters with the lowest loss so far, on disk, because memory is dear."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.update, self.loss = 0, float("inf")
        self._named: int | None = None  # the update whose parameters the last state speaks of

    def offer(self, update: int, loss: float, parameters: Mapping[str, torch.Tensor]) -> None:
        """Keep the parameters if their loss is lower than that of any others before."""
        if loss < self.loss:
            old = self._path()
            self.update, self.loss = update, loss
            _write_tensors(self._path(), parameters)
            if old != self._path() and old != self._path(self._named):
                old.unlink(missing_ok=True)

    def named(self) -> None:
        """Take notice that the state on disk speaks of these parameters; earlier ones may go now."""
        self._named = self.update
        for path in self._folder.glob("best-*.safetensors"):
            if path != self._path():
                path.unlink()

    def facts(self) -> dict[str, Any]:
        """Return which update it was, for a state."""
        return {"update": self.update, "loss": self.loss, "sha256": _sha256(self._path())}

    def restore(self, facts: Mapping[str, Any]) -> bool:
        """Go back to what `facts` says; False if those parameters are not there whole."""
        self.update, self.loss = int(facts["update"]), float(facts["loss"])
        self._named = self.update
        try:
            return _sha256(self._path()) == str(facts["sha256"])
        except OSError:
            return False

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the best ones."""
        from safetensors.torch import load_file

        return load_file(self._path())

    def forget(self) -> None:
        """Begin anew."""
        self.update, self.loss, self._named = 0, float("inf"), None

    def _path(self, update: int | None = None) -> Path:
        return self._folder / f"best-{self.update if update is None else update:09d}.safetensors"


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    unfinished = path.with_suffix(".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
