"""The global state that a method must leave as it found it, and seeding it differently to see who reads it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.conformance.findings import Findings


@contextmanager
def left_alone(findings: Findings, doing: str, *, seed: int) -> Iterator[None]:
    """Seed the global generators, run the block, note what it changed of the global state, and put all of it back."""
    import numpy
    import torch

    before = _state()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    expected = _state()
    try:
        yield
    finally:
        actual = _state()
        for name, remedy in _REMEDIES.items():
            findings.expect("C7 surroundings", actual[name] == expected[name], f"{doing} changed {name}; {remedy}")
        _restore(before)


_REMEDIES = {
    "torch's global random state": "draw from a torch.Generator of your own, or inside torch.random.fork_rng()",
    "Python's global random state": "draw from a random.Random of your own",
    "numpy's global random state": "draw from a numpy.random.default_rng of your own",
    "the grad mode": "use `with torch.no_grad():` instead of setting it",
    "the default dtype": "pass dtype= to the calls that need it",
    "the number of threads": "leave it to the orchestrator",
    "the use of deterministic algorithms": "put back what was set before",
    "the working folder": "use absolute paths",
}


def _state() -> dict[str, Any]:
    import numpy
    import torch

    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "torch's global random state": torch.get_rng_state().numpy().tobytes(),
        "Python's global random state": random.getstate(),
        "numpy's global random state": (name, numpy.asarray(keys).tobytes(), *rest),
        "the grad mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the use of deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the working folder": os.getcwd(),  # noqa: PTH109
    }


def _restore(state: dict[str, Any]) -> None:
    import numpy
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray(state["torch's global random state"]), dtype=torch.uint8))
    random.setstate(state["Python's global random state"])
    name, keys, *rest = state["numpy's global random state"]
    numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
    torch.set_grad_enabled(state["the grad mode"])
    torch.set_default_dtype(state["the default dtype"])
    torch.set_num_threads(state["the number of threads"])
    torch.use_deterministic_algorithms(state["the use of deterministic algorithms"])
    os.chdir(state["the working folder"])
