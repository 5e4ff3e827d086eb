"""The method kind `ExportFormat`: the model in another file format, listed under `formats:` of a register step.

Imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.checkpoint import Checkpoint
from orchestrator.method import Context, Invariant, Method
from orchestrator.scheme import QuantScheme


@dataclass(frozen=True)
class ExportFacts:
    """What planning knows of the model that a format will be asked to carry.

    model: configuration and dense shapes as they are foreseen, and the companions of the source.
    held: what the steps before have established.
    schemes: by layer that is on a grid, the schemes that it may have (several where a method chooses among them). Empty
        although a grid is held: a `ModelMethod` makes one, which is not known before.
    """

    model: Checkpoint
    held: frozenset[Invariant]
    schemes: Mapping[str, tuple[QuantScheme, ...]]


class ExportFormat(Method):
    """Writes the compressed model in another file format, into a folder of the release that is the format's own."""

    libraries: ClassVar[tuple[str, ...]] = ()  # distributions whose versions decide the bytes; part of the fingerprint

    @abstractmethod
    def check(self, facts: ExportFacts) -> None:
        """Raise `SpecError` or `PreflightError` for what the format cannot carry, as far as planning knows it."""

    @abstractmethod
    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        """Write the model's files into `folder` and return numbers worth recording, e.g. sizes in bytes on disk.

        invariants: of the model, as its manifest has them. The bytes follow from the model alone, and a file that
        was not shown to be right is not left there. Raise `StepError` for what cannot be carried.
        """
