"""Element types of KV caches: bits of an element, and what scales take beside it.

Names are those of the engines that have them; a name that several have means the same in all, or has another entry.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import SpecError


@dataclass(frozen=True)
class CacheDtype:
    """How the elements of a key or a value are stored.

    bits: of an element. group: how many elements of one head's vector share a scale; 0: all of them; None: there is no
    scale in the cache. scale_bytes: of one group's scale, and zero point if it has one. values: how values are stored,
    where it is otherwise than keys. even: a key and its value together take an even number of bytes.
    """

    name: str
    bits: int
    group: int | None = None
    scale_bytes: int = 0
    values: CacheDtype | None = None
    even: bool = False

    def pair_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Bytes of the key and the value of one head."""
        total = self.bytes_of(head_dim) + (self.values or self).bytes_of(head_dim_v)
        return total + total % 2 if self.even else total

    def bytes_of(self, head_dim: int) -> int:
        """Bytes that the vector of one head takes, scales included; 0 for a head of no elements."""
        if not head_dim:
            return 0
        groups = 0 if self.group is None else 1 if self.group == 0 else -(-head_dim // self.group)
        return -(-head_dim * self.bits // 8) + groups * self.scale_bytes

    def formula(self, head_dim: int) -> str:
        """The arithmetic of `bytes_of`, for people."""
        size = self.bits // 8 if self.bits % 8 == 0 else f"{self.bits}/8"
        text = f"{head_dim} x {size} bytes ({self.name})"
        if self.group is None:
            return text
        groups = 1 if self.group == 0 else -(-head_dim // self.group)
        return f"({text} + {groups} x {self.scale_bytes} bytes of scales)"


_ALL = (
    CacheDtype("float32", 32),
    CacheDtype("float16", 16),
    CacheDtype("bfloat16", 16),
    CacheDtype("fp8", 8),
    CacheDtype("fp8_e4m3", 8),
    CacheDtype("fp8_e5m2", 8),
    # One float32 scale for each token and head (vLLM).
    CacheDtype("int8_per_token_head", 8, 0, 4),
    CacheDtype("fp8_per_token_head", 8, 0, 4),
    CacheDtype("int4_per_token_head", 4, 0, 4),
    CacheDtype("nvfp4", 4, 16, 1),
    # Rotated, rounded to a code book; a norm for a key, scale and zero point for a value (vLLM).
    CacheDtype("turboquant_k8v4", 8, values=CacheDtype("4 bits", 4, 0, 4), even=True),
    CacheDtype("turboquant_4bit_nc", 4, 0, 2, values=CacheDtype("4 bits", 4, 0, 4), even=True),
    CacheDtype("turboquant_k3v4_nc", 3, 0, 2, values=CacheDtype("4 bits", 4, 0, 4), even=True),
    CacheDtype("turboquant_3bit_nc", 3, 0, 2, values=CacheDtype("3 bits", 3, 0, 4), even=True),
    # Blocks of 32 elements with a float16 scale, and a minimum in the types that end in 1 (llama.cpp).
    CacheDtype("q8_0", 8, 32, 2),
    CacheDtype("q5_1", 5, 32, 4),
    CacheDtype("q5_0", 5, 32, 2),
    CacheDtype("q4_1", 4, 32, 4),
    CacheDtype("q4_0", 4, 32, 2),
    CacheDtype("iq4_nl", 4, 32, 2),
    # A float32 scale and zero point for each token and head (OpenVINO's CPU plugin).
    CacheDtype("u8", 8, 0, 8),
    CacheDtype("u4", 4, 0, 8),
    CacheDtype("int8", 8),  # one scale for a whole tensor, beside the cache (TensorRT-LLM)
)
CACHE_DTYPES: Mapping[str, CacheDtype] = {dtype.name: dtype for dtype in _ALL}


def cache_dtype(name: str) -> CacheDtype:
    """Return the element type called `name`. Raises `SpecError` with what is closest to it."""
    if name not in CACHE_DTYPES:
        close = difflib.get_close_matches(name, CACHE_DTYPES, n=1)
        raise SpecError(
            f"kv_cache_dtype {name[:40]!r} is not known",
            remedy=(f"did you mean {close[0]!r}? " if close else "") + f"One of: auto, {', '.join(CACHE_DTYPES)}",
        )
    return CACHE_DTYPES[name]
