"""The tensor types of a GGUF file: which there are, and which one each matrix gets.

The mixtures (`q4_k_m`: mostly Q4_K, some matrices in Q6_K) and the fallbacks for rows that are no multiple of a
type's block are those of ``llama-quantize`` (src/llama-quant.cpp of llama.cpp, MIT), so that a file here has the types
that llama.cpp would have given it. The quantization itself is llama.cpp's (`llama_cpp.quantize`).

Types that need an importance matrix (iq1, iq2, iq3, q2_k_s) are not offered. Imports neither torch nor gguf.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FileType = Literal[
    "auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1",
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip
PLAIN = ("f32", "f16", "bf16")
# What llama.cpp calls the file (enum llama_ftype).
FILE_TYPE_NUMBERS: Mapping[str, int] = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
    "bf16": 32,
}  # fmt: skip
# Their blocks have a minimum beside the scale, so that no code stands for zero exactly; IQ4's table holds no zero.
NO_ZERO = frozenset({"q4_1", "q5_1", "q2_k", "q4_k", "q5_k", "iq4_nl", "iq4_xs"})
WIDEST_BLOCK = 256
_BLOCKS_OF_256 = frozenset({"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"})
_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_NEVER = ("ffn_gate_inp", "position_embd", "rope_freqs", "_norm")  # stay float32


@dataclass(frozen=True)
class ModelFigures:
    """What llama.cpp's mixtures look at. tied: whether the embeddings are the output matrix too."""

    layers: int
    heads: int
    kv_heads: int
    experts: int
    tied: bool


def default_type(file_type: str) -> str:
    """The tensor type that most matrices of a file have."""
    return file_type.removesuffix("_s").removesuffix("_m").removesuffix("_l")


def block_width(tensor_type: str) -> int:
    """Number of neighbouring weights of a row that share a block."""
    return 1 if tensor_type in PLAIN else WIDEST_BLOCK if tensor_type in _BLOCKS_OF_256 else 32


def is_matrix(name: str, dimensions: int) -> bool:
    """Whether llama.cpp quantizes a tensor at all; others are kept in float32."""
    return dimensions > 1 and name.endswith(".weight") and not any(part in name for part in _NEVER)


def matrix_type(name: str, in_features: int, file_type: str, model: ModelFigures) -> str:
    """Return the tensor type of a matrix in a file of `file_type`, as ``llama-quantize`` chooses it."""
    if file_type in PLAIN:
        return file_type
    chosen = _mixed(name, in_features, file_type, model)
    if in_features % block_width(chosen):
        chosen = _FALLBACKS.get(chosen, "f16")
        if in_features % block_width(chosen):
            chosen = "f16"
    return chosen


def _mixed(name: str, in_features: int, file_type: str, model: ModelFigures) -> str:
    usual = default_type(file_type)
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return "q8_0" if usual == "q8_0" or in_features % block_width(usual) else "q6_k"
    match = _LAYER.fullmatch(name)
    if match is None:
        return usual
    layer, part = int(match[1]), match[2]
    if part in ("attn_v", "attn_qkv"):
        return _values(layer, file_type, usual, model)
    if part == "attn_k" and model.experts == 8:
        return "q8_0"
    if part in ("ffn_down", "ffn_down_exps"):
        return _down(layer, file_type, usual, model.layers)
    if part == "attn_output":
        if model.experts == 8:
            raised = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
            return "q5_k" if file_type in raised else usual
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(file_type, usual)
    return usual


def _values(layer: int, file_type: str, usual: str, model: ModelFigures) -> str:
    """The value projection, which grouped-query attention makes small and important."""
    grouped = model.heads // max(1, model.kv_heads) >= 4
    chosen = usual
    if file_type == "q2_k":
        chosen = "q4_k" if grouped else "q3_k"
    elif file_type == "q3_k_m":
        chosen = "q5_k" if layer < 2 else "q4_k"
    elif file_type == "q3_k_l" or (file_type in ("iq4_nl", "iq4_xs") and grouped):
        chosen = "q5_k"
    elif file_type in ("q4_k_m", "q5_k_m") and _more_bits(layer, model.layers):
        chosen = "q6_k"
    elif file_type == "q4_k_s" and layer < 4:
        chosen = "q5_k"
    if model.layers == 80 and model.heads != model.kv_heads and chosen in ("q3_k", "q4_k"):  # Llama 70B
        chosen = "q5_k"
    return "q8_0" if model.experts == 8 else chosen


def _down(layer: int, file_type: str, usual: str, layers: int) -> str:
    if file_type == "q2_k":
        return "q3_k"
    if file_type == "q3_k_m":
        return "q5_k" if layer < layers // 16 else "q4_k"
    if file_type == "q3_k_l":
        return "q5_k"
    if file_type in ("q4_k_m", "q5_k_m") and _more_bits(layer, layers):
        return "q6_k"
    if file_type in ("q4_k_s", "iq4_nl", "iq4_xs") and layer < layers // 8:
        return "q5_k"
    return usual


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
