"""What a step will take: memory by the number of workers, bytes on disk, arithmetic. Pure; imports no torch.

The walk (`orchestrator.walk`) holds one block's weights in float32, one record for each distinct input (H is I x I),
and for each worker one batch's activations while it measures, or what solving one group of layers takes while it
compresses. Weight-only methods hold one layer for each worker. The number of workers changes the memory and no bit of
the result, so it is what `max_memory_gib` decides. How the terms were checked: `benchmarks/preflight.py`.

Shape legend: I = in features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.capture import BATCH_TOKENS, KEPT_BYTES
from orchestrator.checkpoint import Checkpoint
from orchestrator.export import (
    Schemes,
    config_text,
    ignored_in,
    result_config,
    result_specs,
    schemes_by_layer,
)
from orchestrator.gates import base_of
from orchestrator.layer_method import InputMode, LayerMethod, MixedMethod, Needs, ScalingMethod
from orchestrator.method import Evaluator
from orchestrator.scheme import QuantScheme
from orchestrator.sensitivity import LOGITS_AT_ONCE
from orchestrator.shards import Shards
from orchestrator.work import FLOAT32, KEPT_PIECE_BYTES, BlockFacts, InputGroup, ModelFacts, Work

_LAYER_REPORT_BYTES = 330  # of layers.json, for each layer
_SAMPLE_BYTES = 60  # of samples.json, for each unit: three numbers or so
_CHUNK_BYTES = 1 << 26  # `TensorReader.chunks`: what is copied or checked at a time
_FACTOR_BYTES = 4  # for each of the I x I entries of a factor, kept as long as its record


@dataclass(frozen=True)
class WalkSize:
    """The walk of one step: over which model, by what, on how much.

    calibration: sequences, and tokens of each; None for a method that needs none. recorded: whether the records are
    there from an earlier step.
    """

    model: ModelFacts
    method: LayerMethod
    calibration: tuple[int, int] | None
    inputs: InputMode = "propagated"
    device: str = "cpu"
    recorded: bool = False

    @property
    def batch_tokens(self) -> int:
        """Tokens that one worker sends through a block at a time."""
        if self.calibration is None:
            return 0
        return max(1, BATCH_TOKENS[self.device] // self.calibration[1]) * self.calibration[1]

    @property
    def tokens(self) -> int:
        """Tokens of the calibration set."""
        return self.calibration[0] * self.calibration[1] if self.calibration else 0

    @property
    def with_hessian(self) -> bool:
        """Whether the records hold H."""
        return self.method.needs is Needs.INPUT_MOMENT

    @property
    def together(self) -> bool:
        """Whether layers that share an input are compressed as one."""
        parts = self.method.options() if isinstance(self.method, MixedMethod) else [self.method]
        return any(type(part).compress_together is not LayerMethod.compress_together for part in parts)


def walk_memory(size: WalkSize, workers: int) -> int:
    """Most bytes of a walk beside the interpreter and its libraries."""
    over_blocks = max((_block_memory(size, block, workers) for block in size.model.blocks), default=0)
    if isinstance(size.method, MixedMethod):
        over_blocks = max(over_blocks, _gradient_memory(size, workers))
    return max(over_blocks, _ending_memory(size.model)) + 8 * size.tokens


def _gradient_memory(size: WalkSize, workers: int) -> int:
    """Of `orchestrator.sensitivity`: the head and some logits, or a block and what it keeps for its backward pass."""
    model = size.model
    tokens = min(size.batch_tokens, size.tokens)
    logits = 4 * FLOAT32 * min(LOGITS_AT_ONCE, tokens * model.vocabulary)
    head = model.vocabulary * model.hidden * (FLOAT32 + model.item_bytes)
    block = max((block.parameters for block in model.blocks), default=0) * FLOAT32
    kept = 2 * model.saved_bytes(tokens) // max(1, len(model.blocks))
    return max(head + workers * logits, block + workers * kept)


def _block_memory(size: WalkSize, block: BlockFacts, workers: int) -> int:
    groups = [group for group in block.groups if not group.skipped]
    # A finished layer is written from a copy in the stored dtype, and widened again for the blocks to come.
    if size.calibration is None:
        layers = sorted((rows * group.in_features for group in groups for rows in group.rows), reverse=True)
        working = sorted(
            (size.method.working_bytes(rows, group.in_features) for group in groups for rows in group.rows),
            reverse=True,
        )
        return sum(layers[:workers]) * (FLOAT32 + size.model.item_bytes) + sum(working[:workers])
    weights = block.parameters * FLOAT32
    batch = size.model.activation_bytes(size.batch_tokens, size.calibration[1])
    passing = workers * batch + _slack_bytes(size, batch)
    loading = weights + block.largest * size.model.item_bytes
    solving = sorted((_solving_bytes(size, group) for group in groups), reverse=True)
    records = [_record_bytes(group, with_hessian=size.with_hessian) for group in groups]
    if _in_stages(size, block):  # one record at a time
        together = [record + _solving_bytes(size, group) for record, group in zip(records, groups, strict=True)]
        return max(loading, weights + max(records, default=0) + passing, weights + max(together, default=0))
    # All records at once; a group that is being solved counts its own factor.
    kept = sorted((_FACTOR_BYTES * group.in_features**2 for group in groups), reverse=True)
    waiting = sum(kept[workers:]) if size.with_hessian else 0
    compressing = weights + sum(records) + waiting + sum(solving[:workers])
    return max(loading, weights + sum(records) + passing, compressing)


def _slack_bytes(size: WalkSize, batch_bytes: int) -> int:
    """What the allocator keeps of freed activations: measured, about two batches, whatever the number of workers.

    Large pieces are given back at once; then only those as wide as the model are kept.
    """
    pieces = (size.model.intermediate, size.model.hidden)
    wide, narrow = (size.batch_tokens * width * FLOAT32 <= KEPT_PIECE_BYTES for width in pieces)
    return 2 * (batch_bytes if wide else 3 * FLOAT32 * size.batch_tokens * size.model.hidden if narrow else 0)


def _in_stages(size: WalkSize, block: BlockFacts) -> bool:
    """Whether the layers of a block are measured and compressed one input after the other."""
    at_once = size.inputs == "dense" or isinstance(size.method, MixedMethod | ScalingMethod)
    return not at_once and all(group.share == 1.0 for group in block.groups)


def _record_bytes(group: InputGroup, *, with_hessian: bool) -> int:
    return FLOAT32 * (group.in_features**2 if with_hessian else 0) + 4 * FLOAT32 * group.in_features


def _solving_bytes(size: WalkSize, group: InputGroup) -> int:
    rows = sum(group.rows) if size.together else max(group.rows)
    working = size.method.working_bytes(rows, group.in_features)
    return working + max(group.rows) * group.in_features * size.model.item_bytes


def _ending_memory(model: ModelFacts) -> int:
    """Copying what no step touched, and checking the result: a piece of a tensor at a time."""
    piece = min(model.largest * model.item_bytes, _CHUNK_BYTES)
    widened = piece * (1 + FLOAT32 // model.item_bytes) if model.item_bytes < FLOAT32 else piece
    layers = [max(group.rows) * group.in_features for block in model.blocks for group in block.groups]
    return max(widened + piece // model.item_bytes, max(layers, default=0) * 12)


# Of what is allowed, the share that the estimate may fill: two workers took up to a fifth more (`benchmarks.bounded`).
HEADROOM = 0.75


def most_workers(size: WalkSize, threads: int, allowed_bytes: int | None) -> int:
    """The largest number of workers, 1 to `threads`, whose memory is allowed; 1 also if not even that is."""
    room = None if allowed_bytes is None else HEADROOM * allowed_bytes
    fitting = [n for n in range(2, threads + 1) if room is None or walk_memory(size, n) <= room]
    return max(fitting, default=1)


def walk_work(size: WalkSize, workers: int) -> Work:
    """All of a walk but its result on disk; arithmetic is that of one worker's share."""
    model = size.model
    total = Work(memory_bytes=walk_memory(size, workers), moved_bytes=20.0 * model.stored_bytes)
    for block in model.blocks:
        groups = [group for group in block.groups if not group.skipped]
        for group in groups:
            total = total.then(_group_effort(size, group).times(1 / min(workers, len(groups))))
    if size.calibration is not None:
        total = total.then(_measuring(size).times(1 / workers))
        # Before and behind the block; in stages also what enters and leaves the last layers of its two halves.
        kept = 2 * model.hidden
        if any(_in_stages(size, block) for block in model.blocks):
            wide = model.intermediate if size.tokens * model.intermediate * FLOAT32 <= KEPT_BYTES else 0
            kept += 2 * model.hidden + max(model.hidden, model.heads * model.head_dim) + wide
        total = replace(total, scratch_bytes=size.tokens * kept * FLOAT32)
    return total


def record_bytes(size: WalkSize) -> int:
    """Bytes of the records and factors that the walk keeps on disk: triangles."""
    if size.calibration is None or (size.inputs == "dense" and size.recorded):
        return 0
    groups = [group for block in size.model.blocks for group in block.groups if not group.skipped]
    squares = 2 * FLOAT32 // 2 if size.with_hessian else 0
    return sum(squares * group.in_features**2 + 4 * FLOAT32 * group.in_features for group in groups)


def _group_effort(size: WalkSize, group: InputGroup) -> Work:
    if size.together:
        return size.method.effort(sum(group.rows), group.in_features)
    whole = Work()
    for rows in group.rows:
        whole = whole.then(size.method.effort(rows, group.in_features))
    return whole


def _measuring(size: WalkSize) -> Work:
    """Passing all tokens through the blocks and adding up what their layers read."""
    assert size.calibration is not None
    if size.inputs == "dense" and size.recorded:
        return Work()
    model, tokens = size.model, size.tokens
    staged = any(_in_stages(size, block) for block in model.blocks)
    passes = 1.1 if staged else 1.0 if size.inputs == "dense" else 2.0
    total = model.forward(tokens, size.calibration[1], size.batch_tokens, head=False).times(passes)
    batches = -(-tokens // size.batch_tokens)
    for block in model.blocks:
        for group in block.groups:
            if group.skipped:
                continue
            seen, width = tokens * group.share, group.in_features
            strips = -(-width // 128) if size.with_hessian else 0
            total = total.then(
                Work(
                    operations=seen * width * (width + 128) if size.with_hessian else 0.0,
                    moved_bytes=24 * seen * width + batches * strips * FLOAT32 * 64 * width,
                    calls=batches * (12 + 3 * strips),
                )
            )
    hidden = float(tokens * model.hidden * FLOAT32 * len(model.blocks))
    return total.then(Work(moved_bytes=hidden * (2 + 3 * passes)))


def result_bytes(checkpoint: Checkpoint, scheme: Schemes, skip: Sequence[str]) -> int:
    """Bytes of the artifact that a layer method gives: exact but for the numbers that are reported of each layer."""
    schemes = schemes_by_layer(checkpoint, scheme, skip)
    config = result_config(checkpoint, schemes, ignored_in(checkpoint, skip))
    report = sum(len(layer.name) + _LAYER_REPORT_BYTES for layer in checkpoint.block_layers())
    return model_bytes(checkpoint, schemes, config) + report


def model_bytes(
    checkpoint: Checkpoint,
    schemes: Mapping[str, QuantScheme] | None = None,
    config: dict[str, object] | None = None,
) -> int:
    """Bytes of a model folder with the tensors, or their packed successors, and the companions of `checkpoint`."""
    shards = Shards(checkpoint.path, result_specs(checkpoint, schemes or {}))
    companions = sum((checkpoint.path / name).stat().st_size for name in checkpoint.companion_files())
    text = config_text(checkpoint, checkpoint.config if config is None else config)
    return shards.num_bytes + shards.index_bytes + companions + len(text.encode())


def packed_weight_bytes(checkpoint: Checkpoint, scheme: Schemes, skip: Sequence[str]) -> int:
    """Bytes of the weight files alone."""
    return Shards(checkpoint.path, result_specs(checkpoint, schemes_by_layer(checkpoint, scheme, skip))).num_bytes


def report_bytes(evaluator: Evaluator) -> int:
    """Bytes of an evaluator's report, with numbers as long as most are."""
    number = 0.1234567890123456
    table = len(json.dumps(dict.fromkeys(evaluator.declared(), number), indent=2)) + 1
    intervals = sum(len(name) + 45 for name in evaluator.declared() if base_of(name) in evaluator.sampled)
    return table + intervals + _SAMPLE_BYTES * evaluator.expected_units()
