"""Quantization of weights, of weights and inputs, and of the KV cache.

| method | what it does                                        | what it needs to know of the inputs |
|--------|-----------------------------------------------------|-------------------------------------|
| `rtn`  | round every weight to the nearest grid point        | nothing                             |
| `hqq`  | round to a grid that is robust against outliers     | nothing                             |
| `gptq` | round column by column, later columns make up for it| H = X^T X                           |
| `sparse_gptq` | remove and round in one such pass            | H = X^T X                           |
| `awq`  | scale salient inputs up, round in clipped ranges    | H = X^T X, mean absolute value      |
| `smoothquant` | move spread of inputs into weights, round both to int8 | largest absolute value    |
| `fp8`  | round weights and inputs to float8                  | nothing                             |
| `mixed` | choose each layer's bits within a budget of bytes  | H = X^T X                           |
| `kv_scales` | scales of an fp8 cache; weights stay as they are | keys and values of every attention |
"""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_quantization.awq import AWQ
from orchestrator_quantization.fp8 import FP8
from orchestrator_quantization.gptq import GPTQ
from orchestrator_quantization.hqq import HQQ
from orchestrator_quantization.kv_scales import KVScales
from orchestrator_quantization.mixed import Mixed
from orchestrator_quantization.rtn import RTN
from orchestrator_quantization.smoothquant import SmoothQuant
from orchestrator_quantization.sparse_gptq import SparseGPTQ

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """The methods of this package."""
    return [RTN, HQQ, GPTQ, SparseGPTQ, AWQ, SmoothQuant, FP8, Mixed, KVScales]
