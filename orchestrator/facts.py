"""The sizes of a model on disk, from its configuration and the headers of its files. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.checkpoint import Checkpoint, LayerShape, TensorInfo
from orchestrator.layers import FUSED_SETS, is_skipped
from orchestrator.work import BlockFacts, InputGroup, ModelFacts

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK = re.compile(r"^(?P<block>(?:.+\.)?(?:layers|h|blocks)\.\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Layers that read the same tensor: those that engines fuse, and the two projections into an expert of Mixtral.
_SHARED_INPUTS = (*FUSED_SETS, ("w1", "w3"))


def facts_of(checkpoint: Checkpoint, skip: Sequence[str] = ()) -> ModelFacts:
    """Return the sizes; what config.json does not say is taken from the shapes of the layers.

    skip: patterns of layers that stay as they are.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    by_block: dict[str, list[LayerShape]] = {}
    for layer in checkpoint.block_layers():
        match = _BLOCK.match(layer.name)
        if match:
            by_block.setdefault(match["block"], []).append(layer)
    stored: dict[str, list[int]] = {name: [] for name in by_block}
    outside = [0]
    for name, info in tensors.items():
        match = _BLOCK.match(name)
        (stored.get(match["block"], outside) if match else outside).append(math.prod(info.shape))
    share = _expert_share(config)
    blocks = tuple(
        BlockFacts(_groups(layers, share, skip), sum(stored[name]), max(stored[name]))
        for name, layers in by_block.items()
    )
    layers = [layer for found in by_block.values() for layer in found]
    hidden = _count(config, "hidden_size", "n_embd") or min((layer.in_features for layer in layers), default=0)
    widest = max((layer.in_features for layer in layers), default=hidden)
    heads = _count(config, "num_attention_heads", "n_head") or 1
    return ModelFacts(
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        item_bytes=ITEM_BYTES.get(checkpoint.dtype_name, 4),
        stored_bytes=checkpoint.weight_bytes(),
        rest_bytes=sum((checkpoint.path / name).stat().st_size for name in checkpoint.companion_files()),
        quantized=checkpoint.is_quantized,
        largest=max((math.prod(info.shape) for info in tensors.values()), default=0),
        largest_outside=max(outside),
        hidden=hidden,
        intermediate=widest * (_count(config, "num_experts_per_tok") or 1 if share < 1 else 1),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads") or heads,
        head_dim=_count(config, "head_dim") or max(1, hidden // heads),
        vocabulary=_vocabulary(config, tensors),
        squares=bool(config.get("attn_logit_softcapping")),
        blocks=blocks,
        positions=_count(config, "max_position_embeddings", "n_positions"),
    )


def _groups(layers: list[LayerShape], expert_share: float, skip: Sequence[str]) -> tuple[InputGroup, ...]:
    """The layers of one block by what they read, in the order of the block."""
    groups: dict[tuple[str, str, bool], list[LayerShape]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        shared = next((members[0] for members in _SHARED_INPUTS if leaf in members), leaf)
        groups.setdefault((parent, shared, is_skipped(layer.name, skip)), []).append(layer)
    return tuple(
        InputGroup(
            tuple(layer.out_features for layer in group),
            group[0].in_features,
            expert_share if _EXPERT.search(group[0].name) else 1.0,
            skipped,
        )
        for (_, _, skipped), group in groups.items()
    )


def _expert_share(config: Mapping[str, Any]) -> float:
    """The share of the tokens that one expert sees on average."""
    experts = _count(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _count(config, "num_experts_per_tok")
    return min(1.0, chosen / experts) if experts and chosen else 1.0


def _vocabulary(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int:
    largest = max((info.shape[0] for info in tensors.values() if len(info.shape) == 2), default=0)
    return _count(config, "vocab_size") or largest


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        if type(config.get(name)) is int:
            return int(config[name])
    return None
