"""The same compression on another calibration text or with another seed: what an evaluator asks for, and what it gets.

An `Evaluator` names `Recalibration`s; planning makes the steps of each and refuses what cannot work; `measure` finds a
`Variant` for each in its context, and has the models made one after the other. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.calibration import CalibrationSet
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.method import Method

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Recalibration:
    """The chain that an evaluator measures, on another text and with another seed.

    name: for people, not used twice by one evaluator. field: the evaluator's parameter, dotted, that names the text;
    what is wrong with the text is said there. source: what every calibrate step of the chain reads instead. seed: of
    all steps of the chain, as the specification's would be.
    """

    name: str
    field: str
    source: str
    seed: int


@dataclass(frozen=True)
class Recalibrated:
    """A recalibration, and by index of a calibrate step, its method with the other text and that as parameters."""

    asked: Recalibration
    calibrators: Mapping[int, tuple[Method, Mapping[str, Any]]]


@dataclass(frozen=True)
class Remade:
    """The model of a variant, and the calibration set that it was made on (of several, the last)."""

    model: Checkpoint
    calibration: CalibrationSet


@dataclass(frozen=True)
class Variant:
    """A recalibrated chain, ready to be computed.

    key: names its model and the code of the evaluator, so that what follows from both can be kept in `Context.cache`.
    remade: makes the model, or finds it in the store; once the block is left, what was made is gone. Takes a callable
        for progress as `Context.progress` is one.
    """

    asked: Recalibration
    key: str
    remade: Callable[[Progress], AbstractContextManager[Remade]]
