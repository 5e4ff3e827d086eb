"""A calibration set: token windows and where they came from.

Shape legend: N = sequences, T = tokens of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKENS_FILE = "tokens.safetensors"
PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids and their provenance.

    tokens_NT: int64 [N, T], no padding.
    provenance: JSON-able facts: source, its sha256, how windows were drawn, how many tokens the source held.
    """

    tokens_NT: torch.Tensor
    provenance: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write the set into `folder`; the same set gives the same bytes."""
        from safetensors.torch import save_file

        save_file({"tokens": self.tokens_NT.contiguous()}, folder / TOKENS_FILE)
        text = json.dumps(dict(self.provenance), indent=2, sort_keys=True)
        (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CalibrationSet:
        """Read a set that `save` wrote."""
        from safetensors.torch import load_file

        provenance = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        return cls(load_file(folder / TOKENS_FILE)["tokens"], provenance)
