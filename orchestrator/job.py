"""What a walk is to do, and what its statistics and results follow from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.canonical import digest_of
from orchestrator.layer_method import InputMode, LayerMethod
from orchestrator.reader import bytes_of
from orchestrator.records import RecordStore

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint import Checkpoint
    from orchestrator.export import ModelWriter

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class WalkSettings:
    """How to walk; nothing here but `inputs` and `device` changes the result.

    inputs: what blocks are calibrated on. device: "cpu" or "cuda".
    workers: threads; None: as many as torch would use.
    state: folder for progress and hidden states, from which a killed run goes on; None: nothing is kept.
    records: where statistics are kept and found; None: nowhere.
    identity: what beside model, tokens and method decides the result: digests of the model's bytes and of the code,
        versions of the libraries.
    """

    inputs: InputMode = "propagated"
    device: str = "cpu"
    workers: int | None = None
    state: Path | None = None
    records: RecordStore | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is to be done.

    facts: what statistics follow from, whatever the method does with them. methods: by layer, where `method` is mixed.
    """

    method: LayerMethod
    writer: ModelWriter
    skip: Sequence[str]
    progress: Progress
    settings: WalkSettings
    tokens_NT: torch.Tensor | None
    facts: Mapping[str, Any]
    methods: Mapping[str, LayerMethod] = field(default_factory=dict)

    def method_of(self, layer: str) -> LayerMethod:
        """Return what compresses a layer."""
        return self.methods.get(layer, self.method)

    def key(self, block: str, leader: str | None = None, passed: str | None = None) -> str:
        """The name of a block's record of one input, or of its list of inputs.

        passed: digest of the compressed layers that the tokens have passed; None for dense inputs.
        """
        return digest_of({**self.facts, "passed": passed, "block": block, "input": leader})


def facts_of_walk(checkpoint: Checkpoint, settings: WalkSettings, tokens_NT: torch.Tensor | None) -> dict[str, Any]:
    return {
        **settings.identity,
        "dtype": checkpoint.dtype_name,
        "tokens": None if tokens_NT is None else _tokens_digest(tokens_NT),
        "machine": machine_facts(settings.device),
    }


def machine_facts(device: str) -> dict[str, Any]:
    """What of the machine decides the bits of a sum: the instruction set or the accelerator, and the threads."""
    import torch

    if device == "cpu":
        return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads_of_an_operation": 1}
    return {"accelerator": torch.cuda.get_device_name(device)}


def _tokens_digest(tokens_NT: torch.Tensor) -> str:
    """The same tokens in longer windows are other data: more of them are seen together."""
    return digest_of([list(tokens_NT.shape), hashlib.sha256(bytes_of(tokens_NT.contiguous())).hexdigest()])
