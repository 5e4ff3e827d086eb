"""Recurrent states: what a layer keeps of one sequence that is no cache of keys and values, as config.json tells.

Mamba 1 and 2, gated delta nets and short convolutions, in the sizes that Transformers and vLLM give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config_entries import count


@dataclass(frozen=True)
class RecurrentState:
    """What a layer with a recurrent state keeps of one sequence, elements.

    taps: inputs that the convolution looks back on. channels: of the convolution, beside the grouped ones.
    grouped: channels of one group (keys and queries of Mamba 2, which all heads of a group share). recurrent: of the
    recurrent state itself, heads x head dimension x state dimension. float32: whether the recurrent state is kept in
    float32 even where the model computes in 16 bits.
    """

    kind: Literal["gated_delta_net", "mamba", "mamba2", "short_conv"]
    taps: int
    channels: int
    recurrent: int
    groups: int = 0
    grouped: int = 0
    float32: bool = False

    def convolution(self, devices: int = 1) -> int:
        """Elements of the convolution's state on one device; a group that several devices need is on all of them."""
        groups = self.groups if self.groups % devices == 0 else devices
        return -(-(self.channels + groups * self.grouped) // devices) * self.taps

    def elements(self, devices: int = 1) -> int:
        """Elements of both on one device."""
        return self.convolution(devices) - (-self.recurrent // devices)


def _gated_delta_net(config: Mapping[str, Any]) -> RecurrentState:
    key_heads, value_heads = count(config, "linear_num_key_heads"), count(config, "linear_num_value_heads")
    key_dim, value_dim = count(config, "linear_key_head_dim"), count(config, "linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    taps = count(config, "linear_conv_kernel_dim") - 1
    wide = config["model_type"] != "qwen3_next" and config.get("mamba_ssm_dtype", "float32") == "float32"
    return RecurrentState("gated_delta_net", taps, channels, value_heads * value_dim * key_dim, float32=wide)


def _mamba1(config: Mapping[str, Any]) -> RecurrentState:
    inner = count(config, "mamba_expand") * count(config, "hidden_size")
    return RecurrentState("mamba", count(config, "mamba_d_conv") - 1, inner, inner * count(config, "mamba_d_state"))


def _mamba2(
    heads: str = "mamba_n_heads",
    head_dim: str = "mamba_d_head",
    groups: str = "mamba_n_groups",
    state: str = "mamba_d_state",
    kernel: str = "mamba_d_conv",
    default: str | None = None,
) -> Callable[[Mapping[str, Any]], RecurrentState]:
    def read(config: Mapping[str, Any]) -> RecurrentState:
        inner, size = count(config, heads) * count(config, head_dim), count(config, state)
        taps = count(config, kernel) - 1
        wide = (config.get("mamba_ssm_cache_dtype") or default) == "float32"
        return RecurrentState("mamba2", taps, inner, inner * size, count(config, groups), 2 * size, wide)

    return read


def _short_convolution(config: Mapping[str, Any]) -> RecurrentState:
    return RecurrentState("short_conv", count(config, "conv_L_cache") - 1, count(config, "hidden_size"), 0)


STATES: Mapping[str, Callable[[Mapping[str, Any]], RecurrentState]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _gated_delta_net),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid"), _mamba2()),
    "nemotron_h": _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "float32"),
    "jamba": _mamba1,
    "lfm2": _short_convolution,
}
