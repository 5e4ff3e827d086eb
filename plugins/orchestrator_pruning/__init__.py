"""Pruning methods: which weights become zero, or which layers, heads and channels go.

| method      | score                       | what it needs to know of the inputs |
|-------------|-----------------------------|-------------------------------------|
| `magnitude` | absolute weight             | nothing                             |
| `wanda`     | absolute weight x input norm| the norm of each input feature      |
| `sparsegpt` | w^2 / [H^-1]_ii, as updated | H = X^T X                           |
| `depth`     | of a decoder layer: how far it turns hidden states, or the loss without it | the tokens |

`llm_pruner` removes whole attention heads and MLP channels instead, and makes a smaller dense model; it scores them by
what the loss would miss, and recovers with low-rank updates (extra `lora`).
"""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_pruning.depth import Depth
from orchestrator_pruning.llm_pruner import LLMPruner
from orchestrator_pruning.magnitude import Magnitude
from orchestrator_pruning.sparsegpt import SparseGPT
from orchestrator_pruning.wanda import Wanda

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """The methods of this package."""
    return [Depth, LLMPruner, Magnitude, SparseGPT, Wanda]
