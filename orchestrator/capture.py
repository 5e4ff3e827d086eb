"""Running calibration tokens through decoder blocks, and recording what their linear layers read.

Batches run beside each other, one thread each; every record takes them in order (see `orchestrator.statistics`), so
sums do not depend on how many threads there are.

Shape legend: N = sequences, B = sequences of a batch, T = tokens of a sequence, D = model width, I = in features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StepError
from orchestrator.hidden import HiddenStates
from orchestrator.statistics import InputMoment, InputMomentBuilder

if TYPE_CHECKING:
    import torch

    from orchestrator.parallel import Workers
    from orchestrator.skeleton import Block, Skeleton

# Tokens that go through a block at a time; fixed, because it decides the order of sums. On a CPU more would only take
# memory and fall out of its caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Stops a forward pass once everything that is wanted has been seen."""


class Stream:
    """The calibration tokens on their way through the blocks: the hidden states that enter one of them.

    Raises `StepError` for tokens that the model does not know, and for numbers that are not finite.
    """

    def __init__(self, skeleton: Skeleton, tokens_NT: torch.Tensor, folder: Path, workers: Workers, device: str):
        self.skeleton = skeleton
        self._tokens_NT = tokens_NT
        self._folder = folder
        self._workers = workers
        self._device = device
        self._batch = max(1, BATCH_TOKENS[device.partition(":")[0]] // tokens_NT.shape[1])
        self._arguments: list[dict[str, Any]] = []  # of each block; they hold for any batch
        self._hidden: HiddenStates | None = None
        self._passed: list[HiddenStates] = []

    @property
    def position(self) -> tuple[int, str] | None:
        """Number of the block that is entered next, and the digest of what enters it; None before the first."""
        return (self._hidden.number, self._hidden.sha256) if self._hidden else None

    def take_up(self, number: int, sha256: str) -> bool:
        """Go on from hidden states that an earlier, killed run left in the folder; False if they are not those."""
        self._prepare()
        hidden = self._states(number)
        if not hidden.verify(sha256):
            hidden.remove()
            return False
        self._hidden = hidden
        return True

    def go_to(self, number: int) -> None:
        """Bring the tokens to the block `number`, through blocks as they are stored."""
        if self._hidden is None:
            self._prepare()
            self._hidden = self._states(0)
            for index in range(self._hidden.num_batches):
                tokens_BT = self._tokens_NT[index * self._batch : (index + 1) * self._batch]
                self._hidden.write(index, self.skeleton.capture(tokens_BT, self._embed)[0])
        while self._hidden.number < number:
            block = self.skeleton.blocks[self._hidden.number]
            self.skeleton.load(block.name, self._device)
            self.forward(block)
            self.skeleton.release(block.name)
            while len(self._passed) > 1:  # progress speaks of the first at most; the others would fill the disk
                self._passed.pop().remove()

    def forward(self, block: Block) -> None:
        """Run the tokens, which have come to this block, through it as its module is now."""
        self._pass(block, {}, keep=True, stop_after=None)

    def discard_passed(self) -> None:
        """Delete the hidden states that entered earlier blocks; until then a killed run can go on from them."""
        while self._passed:
            self._passed.pop().remove()

    def leaders(self, block: Block) -> dict[str, str]:
        """Return for each linear layer the first one that reads the very same tensor, by running one sequence."""
        assert self._hidden is not None
        seen: list[tuple[torch.Tensor, str]] = []  # holds the tensors, so that none's identity is used twice
        # Of experts it is known from the start: whether they see any of one sequence's tokens is chance.
        leader_of = {name: group[0] for group in block.same_input for name in group}

        def note(name: str, tensor: torch.Tensor) -> None:
            for other, leader in seen:
                if other is tensor:
                    leader_of[name] = leader
                    return
            seen.append((tensor, name))
            leader_of[name] = name

        hooks = [
            module.register_forward_pre_hook(lambda module, inputs, n=name: note(n, inputs[0]))
            for name, module in block.linears.items()
            if name not in block.experts
        ]
        try:
            self._output(block, self._hidden.read(0)[:1].to(self._device))
        finally:
            for hook in hooks:
                hook.remove()
        idle = sorted(block.linears.keys() - leader_of.keys())
        if idle:
            raise StepError(f"{idle[0]} takes no part in the forward pass of {block.name}")
        return leader_of

    def measure(self, block: Block, names: Iterable[str], *, with_hessian: bool, keep: bool) -> dict[str, InputMoment]:
        """Run all batches through a loaded block and return a record of the input of each layer in `names`.

        keep: whether the tokens go on to the next block. If not, a pass ends at the last of the layers.
        """
        builders = {
            name: InputMomentBuilder(block.linears[name].in_features, with_hessian=with_hessian, device=self._device)
            for name in names
        }
        self._pass(block, builders, keep=keep, stop_after=None if keep or block.experts else len(builders))
        records = {name: builder.finish() for name, builder in builders.items()}
        for name, record in records.items():
            if not record.sum_squares_I.isfinite().all():
                raise StepError(f"the inputs of {name} are not finite or too large for float32")
        return records

    def close(self) -> None:
        """Close the files; what they hold stays for a run that goes on from it."""
        for states in (self._hidden, *self._passed):
            if states is not None:
                states.close()

    def _pass(
        self, block: Block, builders: Mapping[str, InputMomentBuilder], *, keep: bool, stop_after: int | None
    ) -> None:
        """Run every batch through a block: to the records, and to the next hidden states if they are kept."""
        hidden = self._hidden
        assert hidden is not None
        outgoing = self._states(hidden.number + 1) if keep else None
        current = threading.local()  # which batch a thread is at; hooks are the module's, not the thread's

        def record(name: str, x: torch.Tensor) -> None:
            builders[name].add(x, current.batch)
            current.seen += 1
            if current.seen == stop_after:
                raise _Enough

        def run(index: int) -> torch.Tensor | None:
            current.batch, current.seen = index, 0
            try:
                output_BTD = self._output(block, hidden.read(index).to(self._device))
            except _Enough:
                return None
            for builder in builders.values():
                builder.pass_over(index)
            if outgoing is not None:
                outgoing.write(index, output_BTD)
            return output_BTD.isfinite().all()

        def stop() -> None:
            for builder in builders.values():
                builder.turns.abort()

        hooks = [
            block.linears[name].register_forward_pre_hook(lambda module, inputs, n=name: record(n, inputs[0]))
            for name in builders
        ]
        try:
            finite = self._workers.run([partial(run, index) for index in range(hidden.num_batches)], stop)
        except BaseException:
            if outgoing is not None:
                outgoing.remove()
            raise
        finally:
            for hook in hooks:
                hook.remove()
        if not all(bool(flag) for flag in finite if flag is not None):
            raise StepError(
                f"the hidden states that {block.name} puts out are not finite",
                remedy="check the model: does it give finite logits on this text?",
            )
        if outgoing is not None:
            self._passed.append(hidden)
            self._hidden = outgoing

    def _output(self, block: Block, hidden_BTD: torch.Tensor) -> torch.Tensor:
        import torch

        output = block.module(hidden_BTD, **self._arguments[block.index])
        if isinstance(output, tuple) and output:
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise StepError(f"{block.name} returns a {type(output).__name__}, not hidden states")
        return output

    def _prepare(self) -> None:
        """Find out what arguments each block gets, and that they do not depend on the tokens."""
        if self._arguments:
            return
        known = self.skeleton.model.get_input_embeddings().num_embeddings
        largest = int(self._tokens_NT.max())
        if largest >= known:
            raise StepError(
                f"the calibration set holds token {largest}, the model has {known}",
                remedy="calibrate with the model's own tokenizer",
            )
        _, arguments = self.skeleton.capture(self._tokens_NT[:1], self._embed)
        for other in self._tokens_NT[1:2]:
            _, again = self.skeleton.capture(other[None], self._embed)
            if not _same(arguments, again):
                raise StepError(
                    "the blocks of this model get arguments that depend on the tokens; the walk supports only models"
                    " whose blocks pass hidden states on",
                    where=self.skeleton.checkpoint.config["model_type"],
                )
        self._arguments = [_to(one, self._device) for one in arguments]

    def _embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        import torch

        ids, places_BT = torch.unique(tokens_BT, return_inverse=True)
        with self.skeleton.embedding_rows(ids.tolist()) as embedding:
            return embedding(places_BT)  # type: ignore[no-any-return]

    def _states(self, number: int) -> HiddenStates:
        num_sequences, num_tokens = self._tokens_NT.shape
        width = self.skeleton.width
        return HiddenStates(self._folder, number, (num_sequences, num_tokens, width), self._batch)


def _to(one: Any, device: str) -> Any:
    """A tree of tensors and plain values on a device."""
    import torch

    if isinstance(one, torch.Tensor):
        return one.to(device)
    if isinstance(one, Mapping):
        return {key: _to(value, device) for key, value in one.items()}
    if isinstance(one, list | tuple):
        return type(one)(_to(value, device) for value in one)
    return one


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and plain values are equal."""
    import torch

    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
