"""Cache policies: what is kept of past tokens while a model reads and writes. Each is a real cache of Transformers."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_kvcache.fp8 import FP8
from orchestrator_kvcache.h2o import H2O
from orchestrator_kvcache.int8 import Int8
from orchestrator_kvcache.kivi import KIVI
from orchestrator_kvcache.paged import Paged
from orchestrator_kvcache.streaming_llm import StreamingLLM
from orchestrator_kvcache.window import Window

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the methods of this family."""
    return [Paged, StreamingLLM, Window, H2O, Int8, KIVI, FP8]
