"""The weights of a checkpoint by name, dense or on a grid, as arrays.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.api import Checkpoint, QuantizedWeight, QuantScheme, TensorReader, kv_scale_names, unpack

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator_export.architectures import Target

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")


class Weights:
    """Reads tensors one at a time. Raises `PreflightError` for a quantization that this project does not read.

    Scales of an fp8 KV cache are left out: GGUF has no place for them, and llama.cpp no such cache.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stack = ExitStack()
        self._read = self._stack.enter_context(TensorReader(checkpoint))
        layers = checkpoint.schemes()
        parts = {f"{layer}.{part}" for layer in layers for part in _PARTS} | kv_scale_names(checkpoint)
        self.shapes = {name: info.shape for name, info in checkpoint.tensors.items() if name not in parts}
        for layer in layers:
            if f"{layer}.weight_shape" in checkpoint.tensors:
                self.shapes[f"{layer}.weight"] = tuple(self._read(f"{layer}.weight_shape").tolist())
        self.schemes: dict[str, QuantScheme] = {f"{layer}.weight": scheme for layer, scheme in layers.items()}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def scheme(self, target: Target) -> QuantScheme | None:
        """The grid on which all lies that the target is made of; None for other tensors."""
        found = {self.schemes.get(name) for name in target.sources}
        return found.pop() if len(found) == 1 else None

    def dense(self, name: str, target: Target) -> NDArray[np.float32]:
        """A stored tensor as float32, arranged as the file wants it; a packed layer as engines compute it."""
        if name in self.schemes:
            weight = unpack(self._read, name.removesuffix(".weight"), self.schemes[name])
            tensor: Any = weight.dequantize(weight.scale_OG.dtype).float()
        else:
            tensor = self._read(name).float()
        array: NDArray[np.float32] = _arranged(tensor, target).contiguous().numpy()
        return array

    def grid(self, name: str, target: Target) -> QuantizedWeight:
        """A packed layer as integers and scales, rows in the file's order."""
        weight = unpack(self._read, name.removesuffix(".weight"), self.schemes[name])
        zero = weight.zero_point_OG
        return replace(
            weight,
            q_OI=_arranged(weight.q_OI, target).contiguous(),
            scale_OG=_arranged(weight.scale_OG, target).contiguous(),
            zero_point_OG=None if zero is None else _arranged(zero, target).contiguous(),
        )


def _arranged(tensor: Any, target: Target) -> Any:
    """Rows, or numbers, as the file wants them; packed layers only ever have rows moved.

    "rotary": the two halves of a head, which Transformers rotates against each other, as neighbours. "by kind":
    queries, keys and values of each head (GPT-NeoX) as all queries, all keys, all values.
    """
    if target.arrangement == "rotary":
        parts = tensor.reshape(target.heads, 2, tensor.shape[0] // target.heads // 2, *tensor.shape[1:])
        return parts.transpose(1, 2).reshape(tensor.shape)
    if target.arrangement == "by kind":
        parts = tensor.reshape(target.heads, 3, tensor.shape[0] // target.heads // 3, *tensor.shape[1:])
        return parts.transpose(0, 1).reshape(tensor.shape)
    if target.arrangement == "transposed":
        return tensor.T
    if target.arrangement == "plus one":
        return tensor + 1
    if target.arrangement == "flat":
        return tensor.reshape(-1)
    return tensor
