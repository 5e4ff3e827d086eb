"""Register stage: publishing a release, and the files with which engines serve it."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_serving.compose import Compose
from orchestrator_serving.kserve import KServe
from orchestrator_serving.llm_d import LLMD
from orchestrator_serving.production_stack import ProductionStack
from orchestrator_serving.release import Release
from orchestrator_serving.vllm import VLLM

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    return [Release, VLLM, KServe, LLMD, ProductionStack, Compose]
