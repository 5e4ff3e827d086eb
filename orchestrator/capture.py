"""Running calibration tokens through decoder blocks, and recording what their linear layers read.

Batches run beside each other, one thread each; every record takes them in order (see `orchestrator.statistics`), so
sums do not depend on how many threads there are.

Shape legend: N = sequences, B = sequences of a batch, T = tokens of a sequence, D = model width, I = in features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StepError
from orchestrator.folding import PROBE_TOKENS, Fold, folds_of
from orchestrator.hidden import HiddenStates, SpareFiles
from orchestrator.stages import Cut, Layout, layout_of
from orchestrator.statistics import InputMoment, InputMomentBuilder

if TYPE_CHECKING:
    import torch

    from orchestrator.parallel import Workers
    from orchestrator.skeleton import Block, Skeleton

# Tokens that go through a block at a time; fixed, because it decides the order of sums. On a CPU more would only take
# memory and fall out of its caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


# Inputs of a wide layer (the MLP's down projection) are kept on disk up to this size, and computed again beyond it.
KEPT_BYTES = 4 * 2**30


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
        self._probe_arguments: list[dict[str, Any]] = []  # the same for a few tokens
        self._hidden: HiddenStates | None = None
        self._passed: list[HiddenStates] = []
        self._cuts: list[FinishedChild] = []  # of the block that the tokens have come to
        self._spares = SpareFiles(folder)
        self._spares.clear()
        self._current = threading.local()  # which batch a thread is at; hooks are the module's, not the thread's

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
        self._pass(block, {}, keep=True)
        self._forget_cuts()

    def discard_passed(self) -> None:
        """Delete the hidden states that entered earlier blocks; until then a killed run can go on from them."""
        while self._passed:
            self._passed.pop().remove()

    def entering(self, number: int) -> HiddenStates:
        """The hidden states that entered a block which the tokens have passed, until `discard_passed`, or will enter
        next. Raises `ValueError` for others.
        """
        for states in (*self._passed, self._hidden):
            if states is not None and states.number == number:
                return states
        raise ValueError(f"nothing is kept of what entered block {number}")

    def beside(self, name: str) -> HiddenStates:
        """A file of the same form as the hidden states, in their folder."""
        return self._file(name, -1, self.skeleton.width)

    def folds(self, block: Block, leader_of: Mapping[str, str]) -> dict[str, Fold]:
        """Find out where scales of the loaded block's inputs can go (see `orchestrator.folding`)."""
        return folds_of(block, leader_of, partial(self._probe, block), (self._probe_tokens, self.skeleton.width))

    def layout(self, block: Block) -> Layout:
        """Find out by a few tokens how the block's layers share inputs, and where its forward pass can be cut."""
        hidden = self._hidden
        assert hidden is not None
        hidden_BTD = hidden.read(0)[:1, : self._probe_tokens].to(self._device)
        return layout_of(block, lambda: self._probe(block, hidden_BTD))

    def measure(
        self,
        block: Block,
        stage: Sequence[str],
        names: Iterable[str],
        *,
        with_hessian: bool,
        keep: bool,
        cut: Cut | None,
    ) -> dict[str, InputMoment]:
        """Run all batches through a loaded block and return a record of the input of each layer in `names`.

        stage: the layers that the pass is for: it ends at the only one. keep: the tokens go on to the next block
        instead. cut: how the pass can later be taken up behind the stage; for this its input is kept.
        """
        builders = {
            name: InputMomentBuilder(block.linears[name].in_features, with_hessian=with_hessian, device=self._device)
            for name in names
        }
        stop_at = stage[0] if len(stage) == 1 and not keep else None
        self._pass(block, builders, keep=keep, stop_at=stop_at, cut=None if keep else cut)
        records = {name: builder.finish() for name, builder in builders.items()}
        for name, record in records.items():
            if not record.sum_squares_I.isfinite().all():
                raise StepError(
                    f"the inputs of {name} are not finite or too large for float32",
                    remedy="check the model, its embedding and norms too: does it give finite logits on this text?",
                )
        return records

    def close(self) -> None:
        """Close the files; what the hidden states hold stays for a run that goes on from it."""
        self._forget_cuts()
        for states in (self._hidden, *self._passed):
            if states is not None:
                states.close()
        self._spares.clear()

    def _pass(
        self,
        block: Block,
        builders: Mapping[str, InputMomentBuilder],
        *,
        keep: bool,
        stop_at: str | None = None,
        cut: Cut | None = None,
    ) -> None:
        """Run every batch through a block: to the records, and to the next hidden states if they are kept."""
        hidden = self._hidden
        assert hidden is not None
        outgoing = self._states(hidden.number + 1) if keep else None
        inputs = self._kept_inputs(block, cut)
        current = self._current

        def arrive(name: str, x: torch.Tensor) -> None:
            if name in builders:
                builders[name].add(x, current.batch)
            if name == stop_at:
                if inputs is not None:
                    inputs.write(current.batch, x)
                raise _Enough

        def run(index: int) -> torch.Tensor | None:
            current.batch = index
            try:
                output_BTD = self.output(block, hidden.read(index).to(self._device))
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

        watched = dict.fromkeys([*builders, *([stop_at] if stop_at else [])])
        hooks = [
            block.linears[name].register_forward_pre_hook(lambda module, inputs, n=name: arrive(n, inputs[0]))
            for name in watched
        ]
        for finished in self._cuts:
            finished.install(block)
        try:
            flags = self._workers.run([partial(run, index) for index in range(hidden.num_batches)], stop)
        except BaseException:
            for states in (outgoing, inputs):
                if states is not None:
                    states.remove()
            raise
        finally:
            for hook in hooks:
                hook.remove()
            for finished in self._cuts:
                finished.uninstall(block)
        if not all(bool(flag) for flag in flags if flag is not None):
            raise StepError(
                f"the hidden states that {block.name} puts out are not finite",
                remedy="check the model: does it give finite logits on this text?",
            )
        for finished in self._cuts:
            finished.passed()
        if cut is not None and inputs is not None:
            outputs = self._file(f"output-{cut.child}.f32", hidden.number, self.skeleton.width)
            self._cuts.append(FinishedChild(cut, inputs, outputs, self._current, self._device))
        if outgoing is not None:
            self._passed.append(hidden)
            self._hidden = outgoing

    def _kept_inputs(self, block: Block, cut: Cut | None) -> HiddenStates | None:
        """A file for the inputs of a child's last layer; None if they would be too large to be worth it."""
        if cut is None:
            return None
        width = block.linears[cut.layer].in_features
        states = self._file(f"input-{cut.child}.f32", block.index, width)
        if width > self.skeleton.width and states.num_bytes > KEPT_BYTES:
            states.remove()
            return None
        return states

    def _forget_cuts(self) -> None:
        while self._cuts:
            self._cuts.pop().remove()

    def _file(self, name: str, number: int, width: int, *, digested: bool = False) -> HiddenStates:
        shape_NTD = (*self._tokens_NT.shape, width)
        return HiddenStates(self._folder / name, number, shape_NTD, self._batch, self._spares, digested=digested)

    @property
    def _probe_tokens(self) -> int:
        return min(PROBE_TOKENS, self._tokens_NT.shape[1])

    def _probe(self, block: Block, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Run the first tokens of one sequence, to see how a block works."""
        if not self._probe_arguments:
            _, arguments = self.skeleton.capture(self._tokens_NT[:1, : self._probe_tokens], self._embed)
            self._probe_arguments = [_to(one, self._device) for one in arguments]
        return block.run(hidden_BTD, self._probe_arguments[block.index])  # type: ignore[no-any-return]

    def output(self, block: Block, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Run a batch through a loaded block. Raises `StepError` if it puts out no hidden states."""
        import torch

        output = block.run(hidden_BTD, self._arguments[block.index])
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
        return self._file(f"hidden-{number:05d}.f32", number, self.skeleton.width, digested=True)


class FinishedChild:
    """Stands for a child of a block whose layers are all compressed: gives its output without running it again.

    The first pass computes the output from the kept input of the child's last layer, and keeps it for later ones.
    """

    def __init__(
        self, cut: Cut, inputs: HiddenStates, outputs: HiddenStates, current: threading.local, device: str
    ) -> None:
        self._cut = cut
        self._inputs: HiddenStates | None = inputs
        self._outputs = outputs
        self._current = current
        self._device = device

    def install(self, block: Block) -> None:
        """Let the block call this instead of the child."""
        layer = block.linears[self._cut.layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            index = self._current.batch
            if self._inputs is None:
                output_BTD = self._outputs.read(index).to(self._device)
            else:
                output_BTD = layer(self._inputs.read(index).to(self._device))
                self._outputs.write(index, output_BTD)
            return output_BTD if self._cut.rest is None else (output_BTD, *[None] * self._cut.rest)

        block.module.get_submodule(self._cut.child).forward = forward

    def uninstall(self, block: Block) -> None:
        """Let the block call the child again."""
        del block.module.get_submodule(self._cut.child).forward

    def passed(self) -> None:
        """Note that every batch has gone through: the outputs are all there."""
        if self._inputs is not None:
            self._inputs.remove()
            self._inputs = None

    def remove(self) -> None:
        """Delete what was kept."""
        self.passed()
        self._outputs.remove()


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
