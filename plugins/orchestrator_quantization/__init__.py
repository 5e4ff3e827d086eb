"""Weight-only integer quantization.

| method | what it does                                        | what it needs to know of the inputs |
|--------|-----------------------------------------------------|-------------------------------------|
| `rtn`  | round every weight to the nearest grid point        | nothing                             |
| `gptq` | round column by column, later columns make up for it| H = X^T X                           |
| `awq`  | scale salient inputs up, round in clipped ranges    | H = X^T X, mean absolute value      |
"""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_quantization.awq import AWQ
from orchestrator_quantization.gptq import GPTQ
from orchestrator_quantization.rtn import RTN

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """The methods of this package."""
    return [RTN, GPTQ, AWQ]
