"""How vLLM 0.33 lays KV caches out: which layers share a block table, and what a block of the pool takes.

After v1/kv_cache_interface.py, v1/core/kv_cache_planning.py and platforms/interface.py of vLLM 0.33.0 (Apache-2.0), and
compared with what they return in tests/golden/vllm_0_33_kv.json. All layers draw block numbers from one pool, whose
block is as wide as the widest group of layers; a sequence takes blocks of every group, and one block is nobody's.

* Layers of one kind make groups of equal length: of the rarest kind's number of layers, or of the most frequent one's
  if that is less than 1.5 times as many. The last group of a kind may lack some, whose room is lost.
* A sliding window keeps window - 1 tokens and those in flight, and one block more: it need not begin with a block.
  Attention in chunks keeps a chunk and those in flight.
* Beside recurrent states the block is made long enough for a state to fit into one layer's page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.api import CacheDtype, KVGroup, LayerCache, Layout, ModelShape, SpecError, heads_bytes, token_steps

BATCHES_IN_FLIGHT = 2  # asynchronous scheduling, vLLM's default on one pipeline stage
_UNEVEN = 1.5
_LATENT_ALIGNMENT = 128  # tokens; kernels of latent attention beside recurrent states
# Tokens; of gated delta nets' prefill kernel on Hopper and later devices, whose states prefix caching keeps.
_DELTA_ALIGNMENT = 64
_CHECKPOINTED = ("gated_delta_net", "mamba2")
_NATIVE_ENDS = 2  # layers at either end that TurboQuant leaves in the model's dtype, where there are no states
_ELEMENT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_LEAVE_OUT = "leave the vllm engine out of the specification"


@dataclass(frozen=True)
class VLLMLayout:
    """The rule, for one way of running the engine.

    max_num_batched_tokens: of one step. prefix_caching: states of recurrent layers are then kept at block ends too.
    """

    max_num_batched_tokens: int
    prefix_caching: bool = True

    def __call__(self, shape: ModelShape, dtype: CacheDtype, block_size: int, devices: int, length: int) -> Layout:
        """Return the layout on one of `devices`. Raises `SpecError` for what vLLM 0.33 refuses."""
        attending = shape.attending
        states = [cache for cache in shape.caches if cache.state is not None]
        if not attending:
            raise SpecError("a model without attention has no KV cache to plan", remedy=_LEAVE_OUT)
        token = [_token_bytes(shape, index, dtype, devices) for index in range(len(attending))]
        steps = token_steps(shape, dtype, devices)
        if states:
            largest = max(_state_bytes(cache, shape, devices) for cache in states)
            unit = max(block_size, _LATENT_ALIGNMENT) if shape.is_latent else block_size
            if self.prefix_caching and any(_is_delta(cache) for cache in states):
                unit = math.lcm(unit, _DELTA_ALIGNMENT)
            block_size = unit * -(-largest // (unit * token[0]))
            steps.append(
                f"a state takes {largest} bytes: vLLM makes the block {block_size} tokens long, so that it fits into a "
                "layer's page"
            )
        kinds: list[tuple[str, int | None]] = [(cache.kind, cache.window) for cache in attending]
        pages = [size * block_size for size in token]
        if not states and set(kinds) == {("full", None)} and len(set(pages)) > 1:
            whole = sum(pages)  # layers of one kind are one group, whatever each takes
            steps.append(f"{len(set(pages))} sizes of layers, together {whole} bytes per block of {block_size} tokens")
            group = KVGroup("full", len(pages), block_size, whole // len(pages))
            return Layout(RULE, (group,), whole, reserved_blocks=1, steps=tuple(steps))
        if len(set(pages)) > 1:
            raise SpecError(
                "a mixture of layers whose tokens take different bytes is laid out by vLLM in a way that is not known "
                "here",
                remedy=_LEAVE_OUT,
            )
        layers: dict[tuple[str, int | None], int] = {}
        for kind in [*kinds, *(("state", None) for _ in states)]:
            layers[kind] = layers.get(kind, 0) + 1
        groups = self._groups(layers, pages[0], block_size, states)
        width = max(group.layers for group in groups) * pages[0]
        return Layout(RULE, groups, width, reserved_blocks=1, steps=(*steps, *_group_steps(groups, width)))

    def _groups(
        self, layers: Mapping[tuple[str, int | None], int], page: int, block_size: int, states: list[LayerCache]
    ) -> tuple[KVGroup, ...]:
        fewest, most = min(layers.values()), max(layers.values())
        size = most if most < fewest * _UNEVEN else fewest
        groups = []
        for (kind, window), count in layers.items():
            parts = -(-count // size)
            for part in range(parts):
                members = -(-(count - part) // parts)  # every parts-th layer, beginning with this one
                in_flight = BATCHES_IN_FLIGHT * self.max_num_batched_tokens
                if kind == "sliding" and window is not None:
                    groups.append(KVGroup(kind, members, block_size, page, window - 1 + in_flight, extra_blocks=1))
                elif kind == "chunked" and window is not None:
                    groups.append(KVGroup(kind, members, block_size, page, window + in_flight))
                elif kind == "state":
                    groups.append(KVGroup(kind, members, block_size, page, fixed_blocks=self._blocks_of_state(states)))
                else:
                    groups.append(KVGroup(kind, members, block_size, page))
        return tuple(groups)

    def _blocks_of_state(self, states: list[LayerCache]) -> int:
        """The state at the end; with prefix caching also the one before and, but for Mamba 1, a checkpoint."""
        checkpoint = any(cache.state is not None and cache.state.kind in _CHECKPOINTED for cache in states)
        return 2 + checkpoint if self.prefix_caching else 1


RULE = "vLLM 0.33, v1/core/kv_cache_planning.py"


def _token_bytes(shape: ModelShape, index: int, dtype: CacheDtype, devices: int) -> int:
    """Bytes of one token in the attending layer `index`."""
    cache, last = shape.attending[index], len(shape.attending) - 1
    at_an_end = min(index, last - index) < _NATIVE_ENDS
    if dtype.name.startswith("turboquant") and at_an_end and all(other.state is None for other in shape.caches):
        return heads_bytes(cache, CacheDtype("native", 8 * _ELEMENT_BYTES[shape.serving_dtype]), devices)
    return heads_bytes(cache, dtype, devices)


def _is_delta(cache: LayerCache) -> bool:
    return cache.state is not None and cache.state.kind == "gated_delta_net"


def _state_bytes(cache: LayerCache, shape: ModelShape, devices: int) -> int:
    state = cache.state
    if state is None:
        return 0
    element = _ELEMENT_BYTES[shape.serving_dtype]
    recurrent = -(-state.recurrent // devices)
    return state.convolution(devices) * element + recurrent * (4 if state.float32 else element)


def _group_steps(groups: tuple[KVGroup, ...], width: int) -> list[str]:
    widest = max(groups, key=lambda group: group.layers)
    steps = [
        f"{widest.layers} layers x {widest.page_bytes} bytes for {widest.block_size} tokens of a layer = {width} bytes "
        "per block"
    ]
    if len(groups) > 1:
        for group in groups:
            if group.fixed_blocks is not None:
                what = f"{group.fixed_blocks} blocks for its states"
            elif group.cap_tokens is not None:
                more = f", and {group.extra_blocks} more" if group.extra_blocks else ""
                what = f"blocks for {group.cap_tokens} tokens at most{more}"
            else:
                what = "blocks for every token"
            steps.append(f"a sequence takes, of the group of {group.layers} {group.kind} layers, {what}")
    return steps
