"""Dividing an accelerator's memory into weights, activations and blocks of a paged KV cache.

Pure integers, no torch, no GPU. How layers share blocks is the engine's own rule: a `Layout`, which the serving plugins
calculate for the versions they know. The rule here, for engines that say nothing else, is the careful one: one block
table, and every layer charged for every token of a sequence, sliding windows too; counting only the window promises
memory that is not there where layers share one pool of equal pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.attention import LayerCache, ModelShape
from orchestrator.cache_dtypes import CacheDtype, cache_dtype
from orchestrator.errors import PreflightError, SpecError

__all__ = ["GIB", "KVGroup", "KVPlan", "Layout", "LayoutRule", "ModelShape", "plan_kv", "state_elements"]

GIB = 2**30
# Beyond these there is no accelerator, no block and no model, and floats would overflow.
MOST_GIB = 100_000
MOST_BLOCK_TOKENS = 2**20
MOST_DEVICES = 1024
EVERY_LAYER_IN_FULL = "every layer charged for every token"


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one block table.

    kind: what they keep (`orchestrator.attention`). block_size: tokens of a block. page_bytes: one layer's share of
    a block. cap_tokens: most tokens of a sequence that are kept; None: all. extra_blocks: beside those for the tokens.
    fixed_blocks: blocks of a sequence however long it is, of a recurrent state.
    """

    kind: str
    layers: int
    block_size: int
    page_bytes: int
    cap_tokens: int | None = None
    extra_blocks: int = 0
    fixed_blocks: int | None = None

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens takes."""
        if self.fixed_blocks is not None:
            return self.fixed_blocks
        kept = tokens if self.cap_tokens is None else min(tokens, self.cap_tokens)
        return -(-kept // self.block_size) + self.extra_blocks


@dataclass(frozen=True)
class Layout:
    """How an engine lays the caches of a model out in one pool of blocks.

    rule: whose it is, for people. bytes_per_block: of one block of the pool, on one device. state_bytes: of one
    sequence, beside the pool. reserved_blocks: that no sequence gets. steps: the arithmetic.
    """

    rule: str
    groups: tuple[KVGroup, ...]
    bytes_per_block: int
    state_bytes: int = 0
    reserved_blocks: int = 0
    steps: tuple[str, ...] = ()


# (shape, element type, tokens of a block, devices that share the heads, longest sequence) -> layout
LayoutRule = Callable[[ModelShape, CacheDtype, int, int, int], Layout]


@dataclass(frozen=True)
class KVPlan:
    """A KV cache that fits. Sizes in bytes, lengths in tokens; `steps` is the arithmetic, line by line, for people.

    All numbers are of one device; with tensor parallelism every device holds the same blocks of its own heads.
    bytes_per_token: of all layers that grow with the sequence. weight_bytes: of the compressed model, on one device.
    memory_bytes: of the accelerator. available_bytes: left to the cache.
    kv_cache_dtype: as asked for; element_dtype: what it means for this model.
    state_bytes: of the recurrent states of one sequence, where they are kept beside the blocks.
    blocks_per_sequence: of one of max_model_len tokens. held_tokens: most tokens that are kept of it, by the policy.
    max_concurrency: how many sequences of max_model_len tokens the blocks hold at once, as engines report it.
    reserved_blocks: that no sequence gets.
    """

    rule: str
    policy: str
    bytes_per_token: int
    block_size: int
    bytes_per_block: int
    weight_bytes: int
    memory_bytes: int
    available_bytes: int
    memory_utilization: float
    tensor_parallel_size: int
    num_blocks: int
    kv_tokens: int
    max_model_len: int
    held_tokens: int
    blocks_per_sequence: int
    max_concurrency: float
    kv_cache_dtype: str
    element_dtype: str
    state_bytes: int
    groups: tuple[KVGroup, ...]
    reserved_blocks: int
    steps: tuple[str, ...]

    @property
    def whole_sequences(self) -> int:
        """How many sequences of max_model_len tokens can really run at once."""
        if self.state_bytes:
            return int(self.max_concurrency)
        return (self.num_blocks - self.reserved_blocks) // self.blocks_per_sequence

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens takes; a policy that forgets keeps no more than `held_tokens`."""
        return sum(group.blocks_for(min(tokens, self.held_tokens)) for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**asdict(self), "steps": list(self.steps), "groups": [asdict(group) for group in self.groups]}


def plan_kv(
    shape: ModelShape,
    *,
    weight_bytes: int,
    gpu_memory_gib: float,
    memory_utilization: float,
    activation_gib: float,
    max_model_len: int,
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
    tensor_parallel_size: int = 1,
    policy: str = "paged",
    held_tokens: int | None = None,
    layout_rule: LayoutRule | None = None,
) -> KVPlan:
    """Divide an accelerator's memory into weights, activations and KV-cache blocks.

    weight_bytes: of the whole model; each of the devices holds an equal part. held_tokens: most tokens of a sequence
    that `policy` keeps; None: all. layout_rule: the engine's; None: `every_layer_in_full`.
    Raises `SpecError` for a dtype or length the model cannot have, `PreflightError` if the memory is too small.
    """
    if max_model_len > shape.max_position_embeddings:
        raise SpecError(
            f"max_model_len is {max_model_len}, but the model has {shape.max_position_embeddings} positions",
            remedy=f"set max_model_len to at most {shape.max_position_embeddings}",
        )
    _check_budget(gpu_memory_gib, memory_utilization, activation_gib, max_model_len, block_size)
    check_tensor_parallel(shape, tensor_parallel_size)
    dtype = _element_dtype(shape, kv_cache_dtype)
    layout = (layout_rule or every_layer_in_full)(shape, dtype, block_size, tensor_parallel_size, max_model_len)
    block_size = max((group.block_size for group in layout.groups if group.fixed_blocks is None), default=block_size)
    memory_bytes, activation_bytes = int(gpu_memory_gib * GIB), int(activation_gib * GIB)
    budget = int(memory_bytes * memory_utilization)
    weights = -(-weight_bytes // tensor_parallel_size)
    available = budget - weights - activation_bytes
    held = max_model_len if held_tokens is None else min(max_model_len, held_tokens)
    per_sequence = sum(group.blocks_for(held) for group in layout.groups)
    sequence_bytes = (per_sequence + layout.reserved_blocks) * layout.bytes_per_block + layout.state_bytes
    if available < layout.bytes_per_block:
        needed = (weights + activation_bytes + sequence_bytes) / memory_utilization / GIB
        raise PreflightError(
            f"the model does not fit: {gib(weights)} weights + {gib(activation_bytes)} activations leave no "
            f"room for a KV cache in {gib(budget)} ({memory_utilization:g} of {gib(memory_bytes)}); "
            f"{gib(sequence_bytes - available)} are missing for one sequence of {max_model_len} tokens",
            remedy=f"serve it on at least {_up(needed)} GiB, or compress it further",
        )
    if available < sequence_bytes:
        fitting = _longest(layout, available, held)
        raise PreflightError(
            f"not one sequence of {max_model_len} tokens fits: it needs {gib(sequence_bytes)} of KV cache, "
            f"{gib(available)} are left, {gib(sequence_bytes - available)} are missing",
            remedy=(f"set max_model_len to at most {fitting}, or " if fitting else "")
            + f"give {_up((budget + sequence_bytes - available) / memory_utilization / GIB)} GiB of memory or a "
            "smaller kv_cache_dtype",
        )
    sequences = available // sequence_bytes  # those whose states are set aside
    pool = available - sequences * layout.state_bytes
    num_blocks = pool // layout.bytes_per_block
    concurrency = available / sequence_bytes if layout.state_bytes else num_blocks / per_sequence
    tokens = num_blocks * block_size if len(layout.groups) == 1 else int(concurrency * max_model_len)
    per_token = sum(heads_bytes(cache, dtype, tensor_parallel_size) for cache in shape.attending)
    sharing = f" / {tensor_parallel_size} devices" if tensor_parallel_size > 1 else ""
    steps = [
        *layout.steps,
        f"{memory_bytes} bytes of memory x {memory_utilization:g} = {budget} bytes for the engine",
        f"{weight_bytes} bytes of weights{sharing} = {weights} bytes on a device",
        f"{budget} - {weights} weights - {activation_bytes} activations = {available} bytes for the KV cache",
        *_state_steps(layout, available, sequences, pool),
        f"{pool} // {layout.bytes_per_block} = {num_blocks} blocks of {block_size} tokens",
        f"{num_blocks} blocks / {per_sequence} blocks for a sequence of {max_model_len} tokens"
        + (f", of which {policy} keeps {held}," if held < max_model_len else "")
        + f" = {concurrency:.2f} sequences",
    ]
    return KVPlan(
        rule=layout.rule,
        policy=policy,
        bytes_per_token=per_token,
        block_size=block_size,
        bytes_per_block=layout.bytes_per_block,
        weight_bytes=weights,
        memory_bytes=memory_bytes,
        available_bytes=available,
        memory_utilization=memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        num_blocks=num_blocks,
        kv_tokens=tokens,
        max_model_len=max_model_len,
        held_tokens=held,
        blocks_per_sequence=per_sequence,
        max_concurrency=concurrency,
        kv_cache_dtype=kv_cache_dtype,
        element_dtype=dtype.name,
        state_bytes=layout.state_bytes,
        groups=layout.groups,
        reserved_blocks=layout.reserved_blocks,
        steps=tuple(steps),
    )


def every_layer_in_full(shape: ModelShape, dtype: CacheDtype, block_size: int, devices: int, length: int) -> Layout:
    """One block table for all layers, every token of a sequence in every layer; states in float32, beside the pool."""
    caches = shape.attending
    if not caches:
        raise SpecError(
            f"no layer of this {shape.model_type} model keeps keys and values", remedy="there is no cache to plan"
        )
    per_token = sum(heads_bytes(cache, dtype, devices) for cache in caches)
    steps = [
        *token_steps(shape, dtype, devices),
        f"{per_token} bytes per token x {block_size} tokens = {per_token * block_size} bytes per block",
    ]
    windowed = sum(cache.window is not None for cache in caches)
    if windowed:
        steps.append(
            f"{windowed} of {len(caches)} layers have a sliding window or a chunk and are charged in full, as engines "
            "allocate one page size for all layers: the concurrency is a lower bound"
        )
    state = 4 * state_elements(shape, devices)
    if state:
        count = sum(cache.kind == "state" for cache in shape.caches)
        steps.append(f"{count} layers with a recurrent state: {state} bytes (float32) for a sequence of any length")
    group = KVGroup("full" if not shape.is_latent else "latent", len(caches), block_size, per_token * block_size)
    return Layout(EVERY_LAYER_IN_FULL, (group,), per_token * block_size, state, steps=tuple(steps))


def heads_on(cache: LayerCache, devices: int) -> int:
    """KV heads of a layer on one device: divided, or kept by several where there are fewer heads than devices."""
    return cache.num_kv_heads if cache.kind == "latent" else -(-cache.num_kv_heads // devices)


def heads_bytes(cache: LayerCache, dtype: CacheDtype, devices: int) -> int:
    """Bytes that one device keeps of one token in one layer."""
    return heads_on(cache, devices) * dtype.pair_bytes(cache.head_dim, cache.head_dim_v)


def state_elements(shape: ModelShape, devices: int = 1) -> int:
    """Elements of all recurrent states of one sequence on one device."""
    return sum(cache.state.elements(devices) for cache in shape.caches if cache.state is not None)


def token_steps(shape: ModelShape, dtype: CacheDtype, devices: int) -> list[str]:
    """The arithmetic of the bytes of a token, a line for each kind of layer."""
    kinds: dict[tuple[int, int, int, bool], int] = {}
    for cache in shape.attending:
        key = (heads_on(cache, devices), cache.head_dim, cache.head_dim_v, cache.kind == "latent")
        kinds[key] = kinds.get(key, 0) + 1
    steps = []
    for (heads, key_dim, value_dim, latent), layers in kinds.items():
        total = layers * heads * dtype.pair_bytes(key_dim, value_dim)
        values = dtype.values or dtype
        if latent:
            text = f"{layers} layers x 1 latent and rotary vector of {dtype.formula(key_dim)}"
        elif key_dim == value_dim and values is dtype:
            text = f"2 (K and V) x {layers} layers x {heads} KV heads x {dtype.formula(key_dim)}"
        else:
            text = f"{layers} layers x {heads} KV heads x ({dtype.formula(key_dim)} + {values.formula(value_dim)})"
        steps.append(f"{text} = {total} bytes per token")
    return steps


def check_tensor_parallel(shape: ModelShape, devices: int) -> None:
    """Raises `SpecError` for a number of devices among which the heads cannot be divided."""
    if devices not in tensor_parallel_sizes(shape):
        fitting = ", ".join(str(size) for size in tensor_parallel_sizes(shape)[:12])
        raise SpecError(
            f"{shape.num_attention_heads} attention heads and {shape.num_kv_heads} KV heads cannot be divided among "
            f"{devices} devices",
            remedy=f"set tensor_parallel_size to one of {fitting}",
        )


def tensor_parallel_sizes(shape: ModelShape) -> list[int]:
    """The numbers of devices among which the heads of every layer can be divided; KV heads may be kept by several."""
    kv_heads = {cache.num_kv_heads for cache in shape.attending if cache.kind != "latent"}
    return [
        size
        for size in range(1, min(shape.num_attention_heads, MOST_DEVICES) + 1)
        if shape.num_attention_heads % size == 0 and all(n % size == 0 or size % n == 0 for n in kv_heads)
    ]


def _longest(layout: Layout, available: int, held: int) -> int:
    """The longest sequence that fits, tokens; 0 if none does."""
    low, high = 0, held
    while low < high:
        middle = (low + high + 1) // 2
        blocks = sum(group.blocks_for(middle) for group in layout.groups)
        if (blocks + layout.reserved_blocks) * layout.bytes_per_block + layout.state_bytes <= available:
            low = middle
        else:
            high = middle - 1
    return low


def _state_steps(layout: Layout, available: int, sequences: int, pool: int) -> list[str]:
    if not layout.state_bytes:
        return []
    return [f"{available} - {sequences} sequences x {layout.state_bytes} bytes of state = {pool} bytes for blocks"]


def _check_budget(
    gpu_memory_gib: float, memory_utilization: float, activation_gib: float, max_model_len: int, block_size: int
) -> None:
    """Raise `SpecError` for a number that is no size; the comparisons are written so that NaN fails them."""
    sizes = f"a number of GiB, at most {MOST_GIB}"
    for name, value, fits, wanted in (
        ("gpu_memory_gib", gpu_memory_gib, 0 < gpu_memory_gib <= MOST_GIB, sizes),
        ("activation_gib", activation_gib, 0 <= activation_gib <= MOST_GIB, sizes),
        ("memory_utilization", memory_utilization, 0 < memory_utilization <= 1, "a share above 0, at most 1"),
        ("max_model_len", max_model_len, max_model_len >= 1, "a positive number of tokens"),
        ("block_size", block_size, 1 <= block_size <= MOST_BLOCK_TOKENS, f"1 to {MOST_BLOCK_TOKENS} tokens"),
    ):
        if not fits:
            shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
            raise SpecError(f"{name} is {shown}, which is no such size", remedy=f"give {wanted}")


def _element_dtype(shape: ModelShape, kv_cache_dtype: str) -> CacheDtype:
    if kv_cache_dtype != "auto":
        return cache_dtype(kv_cache_dtype)
    if shape.kv_scales:
        return cache_dtype("fp8")
    try:
        return cache_dtype(shape.serving_dtype)
    except SpecError:
        raise SpecError(
            f"dtype {shape.dtype!r} of the checkpoint is not known", remedy="save it in bfloat16, float16 or float32"
        ) from None


def gib(size: int) -> str:
    """A size as people read it."""
    return f"{size / GIB:.2f} GiB"


def _up(size_gib: float) -> str:
    """A size in GiB rounded up to two places, so that it does suffice."""
    return f"{-(-size_gib // 0.01) * 0.01:.2f}"
