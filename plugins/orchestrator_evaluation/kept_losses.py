"""What was measured of a variant, kept for a killed step and for the next grid that holds the same variant."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.api import Variant

if TYPE_CHECKING:
    import torch

Losses = dict[str, list[float]]  # by text, the negative log-likelihood of every window, nats


@dataclass(frozen=True)
class KeptLosses:
    """One file of the cache, named by all that decides what is in it. folder: None where there is no cache."""

    folder: Path | None
    identity: str

    @classmethod
    def of(cls, cache: Path | None, variant: Variant, texts: Mapping[str, torch.Tensor], batch: int) -> KeptLosses:
        """The file of a variant measured on these windows, so many at a time."""
        tokens = {
            suffix: [list(tokens_NT.shape), hashlib.sha256(tokens_NT.contiguous().numpy().tobytes()).hexdigest()]
            for suffix, tokens_NT in texts.items()
        }
        facts = json.dumps([variant.key, tokens, batch], sort_keys=True)
        identity = hashlib.sha256(facts.encode()).hexdigest()
        return cls(cache and cache / f"robustness-{identity[:32]}", identity)

    def read(self) -> tuple[Losses, dict[str, float]] | None:
        """Return losses and overlaps; None if there are none, or what is there is not whole."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / "measured.json").read_text(encoding="utf-8"))
            if found["sha256"] != self._digest(found["losses"], found["overlaps"]):
                return None
            with contextlib.suppress(OSError):
                os.utime(self.folder)  # what is in use is not swept away
            return found["losses"], found["overlaps"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, losses: Losses, overlaps: Mapping[str, float]) -> None:
        """Keep them; a disk that takes nothing costs no more than measuring again."""
        if self.folder is None:
            return
        content = {"losses": losses, "overlaps": dict(overlaps), "sha256": self._digest(losses, overlaps)}
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            passing = self.folder / f"measured.{os.getpid()}.part"
            with passing.open("w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            passing.replace(self.folder / "measured.json")

    def _digest(self, losses: Losses, overlaps: Mapping[str, float]) -> str:
        """Torn, changed and foreign content has another one."""
        return hashlib.sha256(json.dumps([self.identity, losses, overlaps], sort_keys=True).encode()).hexdigest()
