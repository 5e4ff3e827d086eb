"""Let vLLM plan for an accelerator that is not there.

vLLM chooses attention backends, block sizes and batch sizes by the device, so its planner is only itself on CUDA. Here
it is told that the machine has H100s; its compiled kernels, which need a driver, are replaced by names that raise when
called. Models are built on the meta device: their layers exist, with the sizes that the engine gives them, and hold
nothing. Runs in vLLM's own environment, before anything else imports vLLM.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# No visible device at all makes vLLM keep Triton, as in a worker that gets its device later.
os.environ.update(CUDA_VISIBLE_DEVICES="", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_PLUGINS="")

GIB = 2**30
ABSENT = {
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    # which image processors import
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
}
NAMESPACES = {"_C", "_moe_C", "_C_cache_ops", "_flashmla_C", "_vllm_fa2_C", "_vllm_fa3_C"}


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not there, without their content."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name in ABSENT else None

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        pass


class _Kernel:
    """A kernel that is not there. Whether a kernel supports something is answered as an H100 does: yes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args, **kwargs):
        if "support" in self._name:
            return True
        raise RuntimeError(f"{self._name} does not run without a GPU")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel(f"{self._name}.{name}")


def pretend(gib: int = 80, capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3") -> None:
    """Make vLLM believe in eight such devices."""
    import torch
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # remembered: no, though its modules are found from here on
    sys.meta_path.insert(0, _Empty())
    import vllm.platforms as platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Device(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id=0):
            return name

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return gib * GIB

        @classmethod
        def is_fully_connected(cls, device_ids):
            return True

        @classmethod
        def device_count(cls):
            return 8

        @classmethod
        def num_compute_units(cls, device_id=0):
            return 132

        @classmethod
        def import_kernels(cls) -> None:
            pass

    platforms._current_platform = Device()
    # It registers a fake of each operator that it finds: there must be none yet.
    importlib.import_module("vllm._custom_ops")

    found = torch._ops._OpNamespace.__getattr__

    def find(namespace, operator: str):
        try:
            return found(namespace, operator)
        except AttributeError:
            if namespace.name in NAMESPACES:
                return _Kernel(f"{namespace.name}.{operator}")
            raise

    torch._ops._OpNamespace.__getattr__ = find
    torch.cuda.Stream = type("Stream", (), {"__init__": lambda self, *args, **kwargs: None})
    torch.cuda.Event = type("Event", (), {"__init__": lambda self, *args, **kwargs: None})
    torch.cuda.current_device = lambda: torch.device("meta")
    torch.accelerator.current_device_index = lambda: torch.device("meta")
    torch.accelerator.empty_cache = lambda: None
    import vllm.model_executor.models.registry as registry
    import vllm.utils.import_utils as installed

    installed.has_deep_gemm = lambda: True  # it comes with vLLM, and asks for a driver when it is imported
    registry._run_in_subprocess = lambda inspect: inspect()  # another process would not pretend


def on_meta():
    """A context in which tensors are made on the meta device, those that ask for CUDA too."""
    import contextlib

    import torch
    from torch.overrides import TorchFunctionMode

    class OnMeta(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    stack = contextlib.ExitStack()
    stack.enter_context(torch.device("meta"))
    stack.enter_context(OnMeta())
    return stack
