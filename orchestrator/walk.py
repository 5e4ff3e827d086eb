"""The walk over decoder blocks: a `LayerMethod` compresses a model that is never in memory as a whole.

For a method that needs the weight alone, layer by layer from disk to disk. Otherwise block by block: load the block,
run the calibration tokens through it, keep one record per *distinct* input (q/k/v share one, gate/up share one),
compress each layer, write it, run the tokens through the compressed block, and go on with what comes out. So every
block is calibrated on the inputs that the compressed blocks before it produce.

Numbers: weights are taken in the checkpoint's dtype and upcast; forward passes, statistics and methods work in
float32. The compressed weight is cast to the checkpoint's dtype before it is used further, as it will be stored; a
quantized one is what its packed integers stand for. Methods run on one thread, so that their result does not depend
on how many cores there are; the forward passes use all.

Shape legend: N = sequences, B = sequences of a batch, T = tokens of a sequence, D = model width, O = out features,
I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError, Problem, StepError
from orchestrator.layers import is_skipped
from orchestrator.method import LayerMethod, LayerResult, Needs
from orchestrator.statistics import InputMoment, InputMomentBuilder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orchestrator.calibration import CalibrationSet
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.export import ModelWriter
    from orchestrator.skeleton import Block, Skeleton

BATCH_TOKENS = 4096  # tokens that go through a block at a time; fixed, because it decides the order of sums
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class WalkReport:
    """What the walk found out.

    layers: what the method reported of each layer, by layer name, and `zero_fraction`.
    metrics: of the whole model: `layers`, `weights` (compressed ones), `rank_deficient_layers` (fewer calibration
        tokens than in features, so that H is singular), and the reported numbers: of "damping…" and "max_…" the
        largest, of "relative_…" and "…fraction…" the mean over weights, of "tokens" the smallest, else the sum.
    """

    metrics: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]


def walk(
    checkpoint: Checkpoint,
    method: LayerMethod,
    calibration: CalibrationSet | None,
    writer: ModelWriter,
    *,
    skip: Sequence[str] = (),
    progress: Progress = lambda fraction, message: None,
) -> WalkReport:
    """Compress every linear layer inside the decoder blocks that `skip` does not match; the caller finishes `writer`.

    Raises `StepError` if the calibration set is missing or numbers are not finite (naming the layer), and
    `PreflightError` for an architecture the walk cannot take apart.
    """
    import torch

    from orchestrator.skeleton import Skeleton

    if checkpoint.is_quantized:
        raise StepError(f"{checkpoint.path} is quantized already", remedy="prune before quantizing, quantize once")
    skeleton = Skeleton(checkpoint)
    if not skeleton.is_known:
        from orchestrator.proof import prove

        prove(checkpoint)
    try:
        with torch.no_grad():
            run = _Walk(skeleton, method, writer, skip, progress)
            run.check_ignored()
            if method.needs is Needs.WEIGHT:
                run.without_calibration()
            elif calibration is None:
                raise StepError(
                    f"{method.name} needs calibration data, and no step before it made any",
                    remedy="put a calibrate step before it",
                )
            else:
                run.with_calibration(calibration.tokens_NT)
    finally:
        skeleton.close()
    return run.report()


class _Walk:
    def __init__(
        self, skeleton: Skeleton, method: LayerMethod, writer: ModelWriter, skip: Sequence[str], progress: Progress
    ) -> None:
        self.skeleton = skeleton
        self.method = method
        self.writer = writer
        self.progress = progress
        self.dtype = skeleton.checkpoint.torch_dtype
        self.targets = {
            block.name: [name for name in block.linears if not is_skipped(name, skip)] for block in skeleton.blocks
        }
        self.layers: dict[str, Mapping[str, float]] = {}
        self.sizes: dict[str, int] = {}  # weights of each compressed layer
        self.rank_deficient = 0

    def check_ignored(self) -> None:
        """Every layer that stays dense in a quantized model must be declared so, or nobody could load it."""
        if self.writer.scheme is not None:
            done = {name for names in self.targets.values() for name in names}
            for name in self.skeleton.linear_names():
                if (name in done) == (name in self.writer.ignored):
                    raise StepError(f"{name} would be stored against what quantization_config says of it")

    def without_calibration(self) -> None:
        """Stream the weights; nothing is run."""
        for number, block in enumerate(self.skeleton.blocks):
            for name in self.targets[block.name]:
                self.skeleton.load(name)
                self._compress(name, block.linears[name], None)
                self.skeleton.release(name)
            self._show(number + 1, block)

    def with_calibration(self, tokens_NT: torch.Tensor) -> None:
        """Run the tokens through block after block."""
        hidden, arguments = self._first_inputs(tokens_NT)
        last = max((i for i, block in enumerate(self.skeleton.blocks) if self.targets[block.name]), default=-1)
        for number, block in enumerate(self.skeleton.blocks[: last + 1]):
            self.skeleton.load(block.name)
            if self.targets[block.name]:
                statistics = self._measure(block, hidden, arguments[number])
                for name in self.targets[block.name]:
                    self._compress(name, block.linears[name], statistics[name])
                del statistics
            if number < last:
                for index, hidden_BTD in enumerate(hidden):
                    hidden[index] = self._forward(block, hidden_BTD, arguments[number])
            self.skeleton.release(block.name)
            self._show(number + 1, block)

    def report(self) -> WalkReport:
        """Put together what the layers reported, as `WalkReport` says."""
        metrics: dict[str, float] = {"layers": len(self.layers), "weights": sum(self.sizes.values())}
        if self.method.needs is Needs.INPUT_MOMENT:
            metrics["rank_deficient_layers"] = self.rank_deficient
        for name in sorted({name for values in self.layers.values() for name in values}):
            found = {layer: values[name] for layer, values in self.layers.items() if name in values}
            if name.startswith(("damping", "max_")):
                metrics[name] = max(found.values())
            elif name == "tokens":
                metrics[name] = min(found.values())
            elif name.startswith("relative_") or "fraction" in name:
                weights = sum(self.sizes[layer] for layer in found)
                metrics[name] = sum(value * self.sizes[layer] for layer, value in found.items()) / weights
            else:
                metrics[name] = sum(found.values())
        return WalkReport(metrics, self.layers)

    def _first_inputs(self, tokens_NT: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        """Return the inputs of the first block by batch, and each block's arguments, which hold for any batch."""
        import torch

        embedding = self.skeleton.model.get_input_embeddings()
        (name,) = [name for name, module in self.skeleton.model.named_modules() if module is embedding]
        largest = int(tokens_NT.max())
        if largest >= embedding.num_embeddings:
            raise StepError(
                f"the calibration set holds token {largest}, the model has {embedding.num_embeddings}",
                remedy="calibrate with the model's own tokenizer",
            )
        self.skeleton.load(name)
        _, arguments = self.skeleton.capture(tokens_NT[:1], embedding)
        for other in tokens_NT[1:2]:
            _, again = self.skeleton.capture(other[None], embedding)
            if not _same(arguments, again):
                raise StepError(
                    "the blocks of this model get arguments that depend on the tokens; the walk supports only models"
                    " whose blocks pass hidden states on",
                    where=self.skeleton.checkpoint.config["model_type"],
                )
        size = max(1, BATCH_TOKENS // tokens_NT.shape[1])
        hidden = [self.skeleton.capture(tokens_BT, embedding)[0] for tokens_BT in torch.split(tokens_NT, size)]
        self.skeleton.release(name)
        return hidden, arguments

    def _forward(self, block: Block, hidden_BTD: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        import torch

        output = block.run(hidden_BTD, arguments)
        if not isinstance(output, torch.Tensor):
            raise StepError(f"{block.name} returns a {type(output).__name__}, not hidden states")
        if not output.isfinite().all():
            raise StepError(
                f"the hidden states that {block.name} puts out are not finite",
                remedy="check the model: does it give finite logits on this text?",
            )
        return output

    def _measure(
        self, block: Block, hidden: Sequence[torch.Tensor], arguments: Mapping[str, Any]
    ) -> dict[str, InputMoment]:
        """Run all batches and return the record of every target layer; layers with one input share one record."""
        wanted = {name: block.linears[name] for name in self.targets[block.name]}
        leader_of = self._leaders(block, wanted, hidden[0], arguments)
        with_hessian = self.method.needs is Needs.INPUT_MOMENT
        builders = {
            name: InputMomentBuilder(wanted[name].in_features, with_hessian=with_hessian)
            for name in dict.fromkeys(leader_of.values())
        }
        hooks = [
            wanted[name].register_forward_pre_hook(lambda module, inputs, b=builder: b.add(inputs[0]))
            for name, builder in builders.items()
        ]
        try:
            for hidden_BTD in hidden:
                self._forward(block, hidden_BTD, arguments)
        finally:
            for hook in hooks:
                hook.remove()
        records = {}
        for name, builder in builders.items():
            records[name] = builder.finish()
            if not records[name].sum_squares_I.isfinite().all():
                raise StepError(f"the inputs of {name} are not finite or too large for float32")
        return {name: records[leader] for name, leader in leader_of.items()}

    def _leaders(
        self, block: Block, wanted: Mapping[str, nn.Linear], hidden_BTD: torch.Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, str]:
        """Return for each layer the first layer that reads the very same tensor, found by running one sequence."""
        seen: list[tuple[torch.Tensor, str]] = []  # holds the tensors, so that none's identity is used twice
        leader_of: dict[str, str] = {}

        def note(name: str, tensor: torch.Tensor) -> None:
            for other, leader in seen:
                if other is tensor:
                    leader_of[name] = leader
                    return
            seen.append((tensor, name))
            leader_of[name] = name

        for group in block.same_input:  # of experts: whether they see any of one sequence's tokens is chance
            members = [name for name in group if name in wanted]
            leader_of.update((name, members[0]) for name in members)
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs, n=name: note(n, inputs[0]))
            for name, module in wanted.items()
            if name not in block.experts
        ]
        try:
            self._forward(block, hidden_BTD[:1], arguments)
        finally:
            for hook in hooks:
                hook.remove()
        idle = sorted(wanted.keys() - leader_of.keys())
        if idle:
            raise StepError(f"{idle[0]} takes no part in the forward pass of {block.name}")
        return leader_of

    def _compress(self, name: str, layer: nn.Linear, statistic: InputMoment | None) -> None:
        """Compress one layer, hand it to the writer, and leave the result in the module."""
        weight_OI = layer.weight.data
        if not weight_OI.isfinite().all():
            raise StepError(f"the weight of {name} is not finite", remedy="check the model")
        with one_thread():
            try:
                result = self.method.compress(weight_OI, statistic)
            except OrchestratorError as error:
                raise type(error)(
                    [Problem(f"{p.what} (layer {name})", p.where, p.remedy) for p in error.problems]
                ) from error
            except Exception as error:
                error.add_note(f"while {self.method.name} compressed {name}")
                raise
        stored_OI = self._store(name, result, weight_OI)
        self.sizes[name] = stored_OI.numel()
        if statistic is not None and statistic.num_tokens < layer.in_features:
            self.rank_deficient += 1
        zero_fraction = int((stored_OI == 0).sum()) / stored_OI.numel()
        self.layers[name] = {**result.metrics, "zero_fraction": zero_fraction}
        layer.weight.data = stored_OI.float()

    def _store(self, name: str, result: LayerResult, weight_OI: torch.Tensor) -> torch.Tensor:
        """Write the result and return the weight [O, I] as it will be loaded, in the checkpoint's dtype."""
        expected = self.writer.scheme is not None
        if (result.encoding is not None) != expected:
            raise StepError(f"{self.method.name} returned {'no' if expected else 'an'} encoding for {name}")
        if result.weight_OI.shape != weight_OI.shape:
            shapes = f"{tuple(result.weight_OI.shape)} instead of {tuple(weight_OI.shape)}"
            raise StepError(f"{self.method.name} returned shape {shapes} for {name}")
        if result.encoding is None:
            stored_OI = result.weight_OI.to(self.dtype)
        else:
            stored_OI = result.encoding.dequantize(self.dtype)
        if not stored_OI.isfinite().all():
            raise StepError(f"{self.method.name} made {name} not finite")
        if result.encoding is None:
            self.writer.add(f"{name}.weight", self.skeleton.as_stored(name, stored_OI))
        else:
            self.writer.add_quantized(name, result.encoding)
        return stored_OI

    def _show(self, done: int, block: Block) -> None:
        self.progress(done / len(self.skeleton.blocks), f"{self.method.name}: {block.name} done")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, so that sums are made in one order on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
