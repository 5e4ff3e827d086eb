"""The layouts of compressed-tensors: what stands for a quantized weight in a checkpoint.

A layer NAME with weight [O, I] on a grid is stored as
    "pack-quantized", for integers whose layer's inputs are not quantized:
        NAME.weight_packed      int32 [O, ceil(I * num_bits / 32)]  integers, offset to unsigned, packed without gaps
        NAME.weight_scale       float [O, G]
        NAME.weight_zero_point  int32 [ceil(O * num_bits / 32), G]  the same packing along O; asymmetric schemes only
        NAME.weight_shape       int64 [2]                           O, I
    "int-quantized" and "float-quantized":
        NAME.weight             int8 or float8_e4m3fn [O, I]
        NAME.weight_scale       float [O, 1]
        NAME.input_scale        float [1]                           static inputs only

Shape legend: O = out features, I = in features, G = groups along I (1 for strategy 'channel').
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.scheme import QuantizedWeight, QuantScheme

if TYPE_CHECKING:
    import torch

PACKED = "pack-quantized"
SCALE_SUFFIX = ".weight_scale"
PACKED_BITS = range(2, 9)


def check_scheme(scheme: QuantScheme) -> str | None:
    """Return why no layout can carry `scheme`, or None if one can. Imports no torch."""
    if scheme.strategy == "group" and (scheme.group_size is None or scheme.group_size < 1):
        return f"group_size: {scheme.group_size} is no group; strategy 'group' needs a positive one"
    if scheme.strategy == "channel" and scheme.group_size is not None:
        return f"group_size: {scheme.group_size} has no meaning with strategy 'channel'"
    if scheme.format == PACKED:
        if scheme.num_bits not in PACKED_BITS:
            return f"num_bits: {scheme.num_bits} cannot be packed; {PACKED_BITS[0]} to {PACKED_BITS[-1]} can"
        return None
    if (scheme.num_bits, scheme.symmetric, scheme.strategy) != (8, True, "channel"):
        return f"the layout {scheme.format!r} takes symmetric weights of 8 bits with one scale per output channel"
    if scheme.input_activations and scheme.input_activations.type != scheme.type:
        return f"weights are {scheme.type}, inputs {scheme.input_activations.type}: engines multiply one kind"
    return None


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Return the stored tensors of one layer by the last part of their names."""
    import torch

    bits = weight.scheme.num_bits
    if weight.scheme.format != PACKED:
        tensors = {"weight": weight.q_OI.contiguous(), "weight_scale": weight.scale_OG.contiguous()}
        return tensors if weight.input_scale_1 is None else {**tensors, "input_scale": weight.input_scale_1}
    tensors = {
        "weight_packed": pack_integers(weight.q_OI, bits),
        "weight_scale": weight.scale_OG.contiguous(),
        "weight_shape": torch.tensor(tuple(weight.q_OI.shape), dtype=torch.int64),
    }
    if weight.zero_point_OG is not None:
        tensors["weight_zero_point"] = pack_integers(weight.zero_point_OG.T, bits).T.contiguous()
    return tensors


def pack_integers(q_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int32 [R, ceil(C * bits / 32)]: integers made unsigned, put bit after bit from the lowest on.

    The layout is that of compressed-tensors' ``pack_to_int32``, which the tests compare with; importing it costs 2 s
    and 150 MB, because it imports Transformers. Shape legend: R = rows, C = columns.
    """
    import torch

    num_rows, num_columns = q_RC.shape
    groups = -(-num_columns // 32)  # 32 integers fill `bits` words exactly
    value_RC = torch.nn.functional.pad(q_RC, (0, groups * 32 - num_columns), value=-(1 << (bits - 1)))
    value_XV = value_RC.reshape(-1, 32)
    words_XW = torch.zeros(len(value_XV), bits, dtype=torch.int32, device=q_RC.device)
    for index in range(32):
        value_X = value_XV[:, index].int() + (1 << (bits - 1))
        word, shift = divmod(index * bits, 32)
        words_XW[:, word] |= value_X << shift
        if shift + bits > 32:
            words_XW[:, word + 1] |= value_X >> (32 - shift)
    return words_XW.view(num_rows, groups * bits)[:, : math.ceil(num_columns * bits / 32)].contiguous()


def unpack_integers(packed_RW: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Undo `pack_integers`: int8 [R, C]."""
    import torch

    num_rows, num_words = packed_RW.shape
    groups = -(-num_columns // 32)
    words_XW = torch.nn.functional.pad(packed_RW, (0, groups * bits - num_words)).reshape(-1, bits)
    value_XV = torch.empty(len(words_XW), 32, dtype=torch.int8, device=packed_RW.device)
    mask = (1 << bits) - 1
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        value_X = (words_XW[:, word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)  # the shift is arithmetic
        if shift + bits > 32:
            value_X = (value_X | (words_XW[:, word + 1] << (32 - shift))) & mask
        value_XV[:, index] = (value_X - (1 << (bits - 1))).to(torch.int8)
    return value_XV.view(num_rows, groups * 32)[:, :num_columns].contiguous()


def packed_specs(num_out: int, num_in: int, scheme: QuantScheme) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Return dtype (None: that of the scales) and shape of what `pack` returns for a layer. Imports no torch."""
    bits, groups = scheme.num_bits, num_in // scheme.group_width(num_in)
    if scheme.format != PACKED:
        stored = "float8_e4m3fn" if scheme.type == "float" else "int8"
        plain: dict[str, tuple[str | None, tuple[int, ...]]] = {
            "weight": (stored, (num_out, num_in)),
            "weight_scale": (None, (num_out, groups)),
        }
        return plain if not _is_static(scheme) else {**plain, "input_scale": (None, (1,))}
    specs: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "weight_packed": ("int32", (num_out, math.ceil(num_in * bits / 32))),
        "weight_scale": (None, (num_out, groups)),
        "weight_shape": ("int64", (2,)),
    }
    if not scheme.symmetric:
        specs["weight_zero_point"] = ("int32", (math.ceil(num_out * bits / 32), groups))
    return specs


def unpack(tensor: Callable[[str], torch.Tensor], layer: str, scheme: QuantScheme) -> QuantizedWeight:
    """Read a layer back; `tensor` returns a stored tensor by its full name."""
    scale_OG = tensor(f"{layer}{SCALE_SUFFIX}")
    if scheme.format != PACKED:
        input_scale_1 = tensor(f"{layer}.input_scale") if _is_static(scheme) else None
        return QuantizedWeight(tensor(f"{layer}.weight"), scale_OG, None, scheme, input_scale_1)
    num_out, num_in = tensor(f"{layer}.weight_shape").tolist()
    q_OI = unpack_integers(tensor(f"{layer}.weight_packed"), scheme.num_bits, num_in)
    zero_point_OG = None
    if not scheme.symmetric:
        packed = tensor(f"{layer}.weight_zero_point")
        zero_point_OG = unpack_integers(packed.T, scheme.num_bits, num_out).T.contiguous()
    return QuantizedWeight(q_OI, scale_OG, zero_point_OG, scheme)


def _is_static(scheme: QuantScheme) -> bool:
    return scheme.input_activations is not None and not scheme.input_activations.dynamic
