"""The weights of a checkpoint by name, dense or on a grid, as arrays.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.api import Checkpoint, QuantizedWeight, QuantScheme, TensorReader, read_scheme, unpack

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator_export.architectures import Target

_PACKED = ".weight_packed"
_PARTS = (_PACKED, ".weight_scale", ".weight_shape", ".weight_zero_point")


class Weights:
    """Reads tensors one at a time. Raises `PreflightError` for a quantization that this project does not read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stored = checkpoint.tensors
        self._stack = ExitStack()
        self._read = self._stack.enter_context(TensorReader(checkpoint))
        self.scheme: QuantScheme | None = read_scheme(checkpoint.config) if checkpoint.is_quantized else None
        packed = [name.removesuffix(_PACKED) for name in self._stored if name.endswith(_PACKED)]
        parts = {f"{layer}{part}" for layer in packed for part in _PARTS}
        self.shapes = {name: info.shape for name, info in self._stored.items() if name not in parts}
        for layer in packed:
            self.shapes[f"{layer}.weight"] = tuple(self._read(f"{layer}.weight_shape").tolist())
        self._packed = {f"{layer}.weight": layer for layer in packed}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def on_grid(self, target: Target) -> bool:
        """Whether all that the target is made of is stored as packed integers."""
        return all(name in self._packed for name in target.sources)

    def dense(self, name: str, target: Target) -> NDArray[np.float32]:
        """A stored tensor as float32, arranged as the file wants it; a packed layer as engines compute it."""
        if name in self._packed:
            assert self.scheme is not None
            weight = unpack(self._read, self._packed[name], self.scheme)
            tensor: Any = weight.dequantize(weight.scale_OG.dtype).float()
        else:
            tensor = self._read(name).float()
        array: NDArray[np.float32] = _arranged(tensor, target).contiguous().numpy()
        return array

    def grid(self, name: str, target: Target) -> QuantizedWeight:
        """A packed layer as integers and scales, rows in the file's order."""
        assert self.scheme is not None
        weight = unpack(self._read, self._packed[name], self.scheme)
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
