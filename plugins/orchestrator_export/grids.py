"""Integers of a quantization grid as blocks of a GGUF type that stands for the very same numbers.

| grid (compressed-tensors)         | GGUF type | a block of 32 weights stands for              |
|-----------------------------------|-----------|-----------------------------------------------|
| symmetric, 2 to 4 bits            | Q4_0      | d * (u - 8), u = q + 8, d = scale             |
| symmetric, 5 bits                 | Q5_0      | d * (u - 16), u = q + 16                      |
| symmetric, 6 to 8 bits            | Q8_0      | d * q                                         |
| asymmetric, 2 to 4 bits           | Q4_1      | d * u + m, u = q + 8, m = -(zero point + 8) d |

The same integers, and scales that float16 holds exactly: nothing is quantized here. What the table cannot carry is
refused by name. Scales in bfloat16 are float16 too unless they are smaller than 2**-17 or so; the minimum is a product
and often is not (8 and 4 significant bits make 12, float16 has 11), so that Q4_1 is tried only when it is asked for.

Layouts: ggml-common.h of llama.cpp (block_q4_0, block_q4_1, block_q5_0, block_q8_0).

Shape legend: O = out features, I = in features, G = groups, B = blocks of 32 along I, W = 32 weights of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.api import QuantizedWeight, QuantScheme, StepError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 32
PLAIN_REMEDY = "export it as type f16 or bf16, which hold the points of the grid, or export before quantizing"


def carriers(scheme: QuantScheme) -> tuple[str, ...]:
    """The GGUF types that can stand for the same numbers, the smallest first. Imports no torch."""
    if scheme.type != "int" or scheme.num_bits > (8 if scheme.symmetric else 4):
        return ()
    if not scheme.symmetric:
        return ("q4_1",)
    return ("q4_0", "q5_0", "q8_0")[max(0, min(scheme.num_bits - 4, 2)) :]


def misfit(scheme: QuantScheme, in_features: int) -> str | None:
    """Return why groups of a layer of this width do not fall on blocks of 32, or None. Imports no torch."""
    width = scheme.group_width(in_features)
    if in_features % BLOCK:
        return f"rows of {in_features} weights are no whole number of blocks of {BLOCK}"
    if width % BLOCK:
        return f"groups of {width} weights are no whole number of blocks of {BLOCK}"
    return None


def as_blocks(weight: QuantizedWeight, tensor_type: str, layer: str) -> NDArray[np.uint8]:
    """Return the bytes [O, bytes of a row] of a layer. Raises `StepError` if a number would not stay what it is."""
    import numpy as np

    num_out, num_in = weight.q_OI.shape
    fault = misfit(weight.scheme, num_in)
    if fault:
        raise StepError(f"GGUF type {tensor_type} cannot carry {layer}: {fault}", remedy=PLAIN_REMEDY)
    q_OBW = weight.q_OI.numpy().reshape(num_out, -1, BLOCK)
    repeat = weight.scheme.group_width(num_in) // BLOCK
    scale_OB = _half(weight.scale_OG.float().numpy(), tensor_type, layer, "scale").repeat(repeat, axis=1)
    parts: list[NDArray[Any]] = [scale_OB[..., None].view(np.uint8)]
    if tensor_type == "q8_0":
        parts.append(q_OBW.view(np.uint8))
    else:
        if weight.zero_point_OG is not None:
            shift_OG = -(weight.zero_point_OG.float().numpy() + 8) * weight.scale_OG.float().numpy()
            minimum_OB = _half(shift_OG, tensor_type, layer, "minimum").repeat(repeat, axis=1)
            parts.append(minimum_OB[..., None].view(np.uint8))
        code_OBW = (q_OBW + np.int8(16 if tensor_type == "q5_0" else 8)).view(np.uint8)
        if tensor_type == "q5_0":  # the fifth bits come first, one after the other
            parts.append(np.packbits(code_OBW >> 4, axis=-1, bitorder="little"))
        low_OBW = code_OBW & 0x0F
        parts.append(low_OBW[..., : BLOCK // 2] | (low_OBW[..., BLOCK // 2 :] << 4))
    packed: NDArray[np.uint8] = np.concatenate(parts, axis=-1).reshape(num_out, -1)
    return packed


def _half(value_OG: NDArray[np.float32], tensor_type: str, layer: str, what: str) -> NDArray[np.float16]:
    """Return the numbers as float16. Raises `StepError` unless that is exact."""
    import numpy as np

    with np.errstate(over="ignore", under="ignore"):
        half_OG = value_OG.astype(np.float16)
    wrong = half_OG.astype(np.float32) != value_OG
    if wrong.any():
        raise StepError(
            f"GGUF type {tensor_type} cannot carry {layer}: float16 does not hold the {what} {value_OG[wrong][0]:.9g}"
            f" of a group exactly (nor {int(wrong.sum()) - 1} others of {wrong.size})",
            remedy=PLAIN_REMEDY,
        )
    return np.ascontiguousarray(half_OG)
