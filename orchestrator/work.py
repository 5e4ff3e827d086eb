"""What a step has to do, in terms that follow from shapes alone: the words in which methods estimate themselves.

`ModelFacts` are the sizes of a model, `Work` is what a step does with it: memory, disk, arithmetic. How long that
takes on this machine is `orchestrator.machine`'s business. Estimates are for people and for the decision how much is
worked on at once; no result depends on them. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

FLOAT32 = 4
KEPT_PIECE_BYTES = 8 << 20  # larger pieces of freed memory are given back (`orchestrator.usage.reuse_memory`)


@dataclass(frozen=True)
class Work:
    """What a step, or a part of one, takes.

    memory_bytes: most memory at one time, beside the interpreter and its libraries.
    child_memory_bytes: the same of other processes that the step starts.
    disk_bytes: what the result takes. scratch_bytes: what else lies on the home's disk while the step is at work.
    operations: floating-point operations of matrix products. moved_bytes: what is read and written by everything
    else. calls: operations that torch is asked for one by one.
    """

    memory_bytes: int = 0
    child_memory_bytes: int = 0
    disk_bytes: int = 0
    scratch_bytes: int = 0
    operations: float = 0.0
    moved_bytes: float = 0.0
    calls: float = 0.0

    def then(self, other: Work) -> Work:
        """Both, one after the other: memory is used again, the rest adds up."""
        return Work(
            max(self.memory_bytes, other.memory_bytes),
            max(self.child_memory_bytes, other.child_memory_bytes),
            self.disk_bytes + other.disk_bytes,
            self.scratch_bytes + other.scratch_bytes,
            self.operations + other.operations,
            self.moved_bytes + other.moved_bytes,
            self.calls + other.calls,
        )

    def times(self, count: float) -> Work:
        """The same `count` times over."""
        return replace(
            self,
            operations=self.operations * count,
            moved_bytes=self.moved_bytes * count,
            calls=self.calls * count,
        )


@dataclass(frozen=True)
class InputGroup:
    """Layers of a block that read the same tensor: rows of each, in features, share of the tokens that it sees.

    skipped: whether the step leaves them as they are.
    """

    rows: tuple[int, ...]
    in_features: int
    share: float = 1.0
    skipped: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(self.rows) * self.in_features


@dataclass(frozen=True)
class BlockFacts:
    """A decoder block: its layers by what they read, all its parameters, and those of its largest tensor."""

    groups: tuple[InputGroup, ...]
    parameters: int
    largest: int

    @cached_property
    def active_weights(self) -> float:
        """Weights that one token is multiplied with."""
        return sum(group.weights * group.share for group in self.groups)


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model.

    parameters: stored ones. item_bytes: of one in the dtype that the model is loaded in. stored_bytes: weight files.
    rest_bytes: the other files of the folder. quantized: whether layers are stored as packed integers.
    largest, largest_outside: elements of the largest tensor, of the largest outside of the blocks.
    squares: whether attention scores of all pairs of tokens are held at once.
    positions: how many the model was made for, where its configuration says so.
    """

    parameters: int
    item_bytes: int
    stored_bytes: int
    rest_bytes: int
    quantized: bool
    largest: int
    largest_outside: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    squares: bool
    blocks: tuple[BlockFacts, ...]
    positions: int | None = None

    @property
    def float32_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return self.parameters * FLOAT32

    @property
    def widened_bytes(self) -> int:
        """What a model that was loaded and then widened to float32 takes.

        The allocator keeps what it was loaded into, unless the pieces are so large that glibc gives them back.
        """
        if self.item_bytes >= FLOAT32:
            return self.float32_bytes
        largest = self.largest * self.item_bytes
        kept = self.parameters * self.item_bytes if largest <= KEPT_PIECE_BYTES else largest
        return self.float32_bytes + kept

    @property
    def wide_bytes(self) -> int:
        """What is in float32 at a time where a model computes in float32 and is held in the dtype of its files.

        A matrix; of a mixture all experts of a block, which Transformers holds in one tensor; the copy of it that
        autograd or the allocator still has.
        """
        if self.item_bytes >= FLOAT32:
            return 0
        experts = [block.parameters for block in self.blocks if any(group.share < 1 for group in block.groups)]
        return 2 * FLOAT32 * max([self.largest, *experts])

    def load_bytes(self, *, as_float32: bool) -> int:
        """Most memory while the whole model is loaded, and widened if `as_float32`.

        The files are mapped while they are read: their pages count as memory of the process.
        """
        loaded = self.parameters * self.item_bytes + self.stored_bytes
        if self.quantized:  # a layer is unpacked to integers of 32 bits, and to numbers
            loaded += max((max(group.rows) * group.in_features for group in self._groups), default=0) * 12
        return max(loaded, self.widened_bytes if as_float32 else 0)

    def activation_bytes(self, tokens: int, length: int) -> int:
        """Most memory while `tokens` tokens, in sequences of `length`, pass one block in float32."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 3 * queries + 4 * keys  # q, k, v, and q and k once more with their positions
        if self.squares:
            attention += 3 * self.heads * length
        return FLOAT32 * tokens * (3 * self.hidden + max(attention, 3 * self.intermediate))

    def saved_bytes(self, tokens: int) -> int:
        """What a forward pass through all blocks keeps for the backward pass, float32."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        of_block = 6 * self.hidden + 3 * queries + 4 * keys + 4 * self.intermediate
        return FLOAT32 * tokens * of_block * len(self.blocks)

    def forward(self, tokens: int, length: int, batch_tokens: int, *, head: bool) -> Work:
        """Arithmetic of `tokens` tokens passing all blocks (and the output head), `batch_tokens` at a time."""
        active = sum(block.active_weights for block in self.blocks)
        attended = 4 * self.heads * self.head_dim * (length / 2) * len(self.blocks)
        moved = 40 * (self.hidden + self.intermediate) * len(self.blocks)
        if head:
            active += self.vocabulary * self.hidden
            moved += 8 * self.vocabulary
        batches = -(-tokens // max(batch_tokens, 1))
        return Work(
            operations=tokens * (2 * active + attended),
            moved_bytes=float(tokens * moved),
            calls=batches * len(self.blocks) * 45,
        )

    @property
    def _groups(self) -> tuple[InputGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups)
