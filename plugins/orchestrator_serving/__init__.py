"""Register stage: publishing a release, and the files with which engines serve it."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_serving.compose import Compose
from orchestrator_serving.kserve import KServe
from orchestrator_serving.llama_cpp import LlamaCpp
from orchestrator_serving.llm_d import LLMD
from orchestrator_serving.openvino_genai import OpenVINOGenAI
from orchestrator_serving.production_stack import ProductionStack
from orchestrator_serving.release import Release
from orchestrator_serving.sglang import SGLang
from orchestrator_serving.tensorrt_llm import TensorRTLLM
from orchestrator_serving.vllm import VLLM

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    return [Release, VLLM, SGLang, OpenVINOGenAI, LlamaCpp, TensorRTLLM, KServe, LLMD, ProductionStack, Compose]
