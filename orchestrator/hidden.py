"""Hidden states between two blocks, and inputs of layers within one, on disk.

They are read and written a batch at a time, so memory does not grow with the number of samples. The kernel's page
cache keeps in memory what fits and writes the rest out when it must; what a killed run has written is still there.
Files that nobody needs any more are written over: giving a new file its pages takes longer than filling them.

Shape legend: B = sequences of a batch, N = sequences, T = tokens of a sequence, D = model width.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.canonical import digest_of
from orchestrator.reader import bytes_of, read_into, write_from

if TYPE_CHECKING:
    import torch


class HiddenStates:
    """A file of float32 [N, T, D], in batches of `batch` sequences.

    number: the block that they enter. digested: whether they are to be recognized by a later run. spares: where
    `remove` leaves the file, and where one of the same size may be found; what it holds is then meaningless.
    """

    def __init__(
        self,
        path: Path,
        number: int,
        shape_NTD: tuple[int, int, int],
        batch: int,
        spares: SpareFiles,
        *,
        digested: bool = False,
    ) -> None:
        self.number = number
        self._spares = spares
        self.path = path
        self.shape_NTD = shape_NTD
        self._batch = batch
        self._digested = digested
        self._digests: dict[int, str] = {}
        if not path.exists():
            spares.give(path, self.num_bytes)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def num_batches(self) -> int:
        """Number of batches; the last may be smaller."""
        return -(-self.shape_NTD[0] // self._batch)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        sequences, tokens, width = self.shape_NTD
        return sequences * tokens * width * 4

    def read(self, index: int) -> torch.Tensor:
        """Return one batch [B, T, D]. May be called from several threads."""
        import torch

        sequences, tokens, width = self.shape_NTD
        first = index * self._batch
        hidden_BTD = torch.empty(min(self._batch, sequences - first), tokens, width)
        if not read_into(self._descriptor, hidden_BTD, first * tokens * width * 4):
            raise OSError(f"{self.path} is shorter than it was written")
        return hidden_BTD

    def write(self, index: int, hidden_BTD: torch.Tensor) -> None:
        """Store one batch. May be called from several threads."""
        _, tokens, width = self.shape_NTD
        stored_BTD = hidden_BTD.float().cpu().contiguous()
        write_from(self._descriptor, stored_BTD, index * self._batch * tokens * width * 4)
        if self._digested:
            self._digests[index] = hashlib.sha256(bytes_of(stored_BTD)).hexdigest()

    @property
    def sha256(self) -> str:
        """Digest of everything that was written, by batch."""
        return digest_of([self._digests.get(index) for index in range(self.num_batches)])

    def verify(self, sha256: str) -> bool:
        """Read everything; whether it is what was once written under this digest."""
        try:
            for index in range(self.num_batches):
                self._digests[index] = hashlib.sha256(bytes_of(self.read(index))).hexdigest()
        except OSError:
            return False
        return self.sha256 == sha256

    def close(self) -> None:
        """Close the file and leave it where it is."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Close the file, and leave it to others."""
        self.close()
        self._spares.take(self.path)


class SpareFiles:
    """Files of a folder that may be written over. A run that goes on there deletes them: see `clear`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free: list[Path] = []
        self._taken = 0

    def clear(self) -> None:
        """Delete them, and those that an earlier, killed run left."""
        self._free.clear()
        for path in self._folder.glob("spare-*.f32"):
            path.unlink(missing_ok=True)

    def take(self, path: Path) -> None:
        """Keep a file, if it is there, for whoever needs one of its size."""
        spare = self._folder / f"spare-{self._taken}.f32"
        self._taken += 1
        with contextlib.suppress(FileNotFoundError):
            path.rename(spare)
            self._free.append(spare)

    def give(self, path: Path, num_bytes: int) -> None:
        """Put one of this size in the place of `path`, if there is one."""
        for spare in self._free:
            if spare.stat().st_size == num_bytes:
                self._free.remove(spare)
                spare.rename(path)
                return
