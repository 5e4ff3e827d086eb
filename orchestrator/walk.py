"""The walk over decoder blocks: a `LayerMethod` compresses a model that is never in memory as a whole.

For a method that needs the weight alone, layer by layer from disk to disk. Otherwise block by block: load the block,
run the calibration tokens through it, keep one record per *distinct* input (q/k/v share one, gate/up share one),
compress the layers that share a record together, write them, and go on. Two ways to calibrate:

- ``propagated``: every block sees the inputs that the compressed blocks before it produce, as in the GPTQ paper;
- ``dense``: every block sees the inputs of the model as it enters the step. Records then depend on nothing that the
  method does, so all methods and candidates share them, and a second candidate runs no token through the model.

Numbers: weights are taken in the checkpoint's dtype and upcast; forward passes, statistics and methods work in
float32. The compressed weight is cast to the checkpoint's dtype before it is used further, as it will be stored; a
quantized one is what its packed integers stand for. Every torch operation runs on one thread; cores are filled by
batches, strips of H and groups of layers beside each other, so that bytes do not depend on how many cores there are.

Memory: one block's weights in float32, its records, one batch's activations for each worker, and what solving one
group of layers takes for each worker (see `orchestrator.estimate`). It does not grow with depth or samples: weights
come by name, hidden states are on disk, finished layers go to their places at once. A killed run goes on at the block
where it died (`orchestrator.resume`).

Shape legend: N = sequences, T = tokens of a sequence, O = out features, I = in features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.canonical import digest_of
from orchestrator.capture import Stream
from orchestrator.compression import LayerCompressor, WalkReport
from orchestrator.errors import StepError
from orchestrator.folding import fold
from orchestrator.job import Job, Progress, WalkSettings, facts_of_walk
from orchestrator.layer_method import LayerMethod, Needs, ScalingMethod
from orchestrator.layers import is_skipped
from orchestrator.parallel import Workers, exact_matmuls, one_thread
from orchestrator.resume import FinishedBlock, WalkProgress
from orchestrator.stages import Cut
from orchestrator.statistics import InputMoment
from orchestrator.stored import StoredLayers
from orchestrator.usage import give_back_memory, reuse_memory

if TYPE_CHECKING:
    import torch

    from orchestrator.calibration import CalibrationSet
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.export import ModelWriter
    from orchestrator.skeleton import Block, Skeleton


def walk(
    checkpoint: Checkpoint,
    method: LayerMethod,
    calibration: CalibrationSet | None,
    writer: ModelWriter,
    *,
    skip: Sequence[str] = (),
    progress: Progress = lambda fraction, message: None,
    settings: WalkSettings | None = None,
    methods: Mapping[str, LayerMethod] | None = None,
    compressor: type[LayerCompressor] = LayerCompressor,
) -> WalkReport:
    """Compress every linear layer inside the decoder blocks that `skip` does not match; the caller finishes `writer`.

    methods: what compresses each layer, where `method` is a `MixedMethod`. compressor: what is done to layers.

    Raises `StepError` if the calibration set is missing or numbers are not finite (naming the layer), and
    `PreflightError` for an architecture the walk cannot take apart.
    """
    import torch

    from orchestrator.skeleton import Skeleton

    settings = settings or WalkSettings()
    reuse_memory()
    if checkpoint.is_quantized:
        raise StepError(f"{checkpoint.path} is quantized already", remedy="prune before quantizing, quantize once")
    if method.needs is not Needs.WEIGHT and calibration is None:
        raise StepError(
            f"{method.name} needs calibration data, and no step before it made any",
            remedy="put a calibrate step before it",
        )
    tokens_NT = None if method.needs is Needs.WEIGHT or calibration is None else calibration.tokens_NT
    facts = facts_of_walk(checkpoint, settings, tokens_NT)
    job = Job(method, writer, skip, progress, settings, tokens_NT, facts, methods or {})
    with ExitStack() as stack:
        threads = stack.enter_context(one_thread())
        stack.enter_context(exact_matmuls())
        stack.enter_context(torch.no_grad())
        workers = Workers(settings.workers or threads)
        if settings.state is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="walk-", dir=writer.folder.parent)))
        else:
            state = settings.state
        order = _recorded_layers(checkpoint, job)
        if order is not None:
            stored = StoredLayers(checkpoint, order)
            stack.callback(stored.close)
            stack.callback(workers.close)
            with suppress(_RecordGone):  # a damaged one: then all is as if it had never been there
                return _Walk(job, compressor(job, stored), stored, None, workers, state).run()
        skeleton = Skeleton(checkpoint)
        stack.callback(skeleton.close)
        if not skeleton.is_known:
            from orchestrator.proof import prove

            prove(checkpoint)
        stream = None if tokens_NT is None else Stream(skeleton, tokens_NT, state, workers, settings.device)
        if stream is not None:
            stack.callback(stream.close)
        stack.callback(workers.close)  # before the files that threads may still be at
        return _Walk(job, compressor(job, skeleton), skeleton, stream, workers, state).run()


class _RecordGone(Exception):  # noqa: N818 - a signal, not an error
    """Ends a walk without a model that finds a record damaged."""


def _recorded_layers(checkpoint: Checkpoint, job: Job) -> dict[str, Sequence[str]] | None:
    """Return every block's layers in their order if the records of all of them are there, on dense inputs."""
    store = job.settings.records
    scaling = isinstance(job.method, ScalingMethod)  # what can be divided is seen by running the block
    if store is None or job.tokens_NT is None or job.settings.inputs != "dense" or scaling:
        return None
    with_hessian = job.method.needs is Needs.INPUT_MOMENT
    found: dict[str, Sequence[str]] = {}
    for block, layers in checkpoint.layers_by_block().items():
        leader_of = store.index(job.key(block))
        if leader_of is None or sorted(leader_of) != sorted(layers):
            return None
        for leader in {leader_of[name] for name in layers if not is_skipped(name, job.skip)}:
            if not store.has(job.key(block, leader), with_hessian=with_hessian):
                return None
        found[block] = list(leader_of)
    return found


class _Walk:
    def __init__(
        self,
        job: Job,
        compressor: LayerCompressor,
        model: Skeleton | StoredLayers,
        stream: Stream | None,
        workers: Workers,
        state: Path,
    ) -> None:
        self.job = job
        self.method, self.settings, self.writer = job.method, job.settings, job.writer
        self.model = model
        self.stream = stream
        self.workers = workers
        self.dense = job.settings.inputs == "dense"
        self.with_hessian = job.method.needs is Needs.INPUT_MOMENT
        self.targets = {
            block.name: [name for name in block.linears if not is_skipped(name, job.skip)] for block in model.blocks
        }
        self.last = max((block.index for block in model.blocks if self.targets[block.name]), default=-1)
        self.compressor = compressor
        self.prefix: str | None = None  # digest of the compressed layers that the tokens have passed
        parameters = job.method.model_dump(mode="json")
        who = {**job.facts, "method": job.method.name, "parameters": parameters, "skip": sorted(job.skip)}
        if job.methods:
            who["methods"] = digest_of({name: part.model_dump(mode="json") for name, part in job.methods.items()})
        self.finished = WalkProgress(state, {**who, "inputs": job.settings.inputs})

    def run(self) -> WalkReport:
        """Compress everything and say what was found."""
        self.check_ignored()
        self.blocks()
        return self.compressor.report([name for block in self.model.blocks for name in self.targets[block.name]])

    def check_ignored(self) -> None:
        """Every layer that stays dense in a quantized model must be declared so, or nobody could load it."""
        if self.writer.schemes:
            done = {name for names in self.targets.values() for name in names}
            for name in self.model.linear_names():
                if (name in done) == (name in self.writer.ignored):
                    raise StepError(f"{name} would be stored against what quantization_config says of it")

    def blocks(self) -> None:
        """Compress block after block, from the first one that no earlier run has finished."""
        for block in self.model.blocks[self._take_over() : self.last + 1]:
            written = self._without_tokens(block) if self.job.tokens_NT is None else self._with_tokens(block)
            self.finished.finish(
                FinishedBlock(
                    block.index,
                    {name: self.compressor.layers[name] for name in self.targets[block.name]},
                    written,
                    self.writer.scale_dtype,
                    self.stream.position if self.stream else None,
                    self.prefix,
                )
            )
            if self.stream is not None:
                self.stream.discard_passed()
            give_back_memory()
            self.job.progress((block.index + 1) / len(self.model.blocks), f"{self.method.name}: {block.name} done")

    def _take_over(self) -> int:
        """Return the number of blocks that an earlier, killed run has finished, after checking every byte of them."""
        count = 0
        for done in self.finished.blocks:
            if not all(self.writer.resume(name, digest, done.scale_dtype) for name, digest in done.written.items()):
                break
            count += 1
        if count and self.stream is not None:
            hidden = self.finished.blocks[count - 1].hidden
            there = hidden is not None and self.stream.take_up(*hidden)
            # Dense tokens can start again from the first block; others would have to pass compressed blocks again.
            if not there and not self.dense:
                count = 0
        self.finished.keep_first(count)
        for done in self.finished.blocks:
            self.compressor.layers.update(done.layers)
            self.prefix = done.passed
        if count:
            block = self.model.blocks[count - 1]
            self.job.progress(count / len(self.model.blocks), f"{self.method.name}: going on after {block.name}")
        return count

    def _without_tokens(self, block: Block) -> dict[str, str]:
        """Compress a block's layers one by one from their stored weights; return the digests of what was written."""
        self._prefetch_next(block)

        def task(name: str) -> dict[str, str]:
            self._load(block, name, [name])
            written = self.compressor.compress(block, [name], None)
            self.model.release(name)
            return written

        return _joined(self.workers.run([partial(task, name) for name in self.targets[block.name]]))

    def _with_tokens(self, block: Block) -> dict[str, str]:
        """Compress a block's layers with records of their inputs, and send the tokens on."""
        names = self.targets[block.name]
        if self.dense:
            written = self._on_dense_inputs(block, names) if names else {}
        elif names:
            written = self._in_stages(block, self._need_stream(), names)
        else:
            self._need_stream().go_to(block.index + 1)
            written = {}
        self.model.release(block.name)
        return written

    def _need_stream(self) -> Stream:
        if self.stream is None:
            raise _RecordGone
        return self.stream

    def _on_dense_inputs(self, block: Block, names: Sequence[str]) -> dict[str, str]:
        """Compress with records of the uncompressed model's inputs; no token is run if they are all there."""
        store = self.settings.records
        leader_of = store.index(self.job.key(block.name)) if store else None
        records = self._recorded(block, [leader_of[name] for name in names]) if leader_of else None
        if records is None:
            self._need_stream().go_to(block.index)
        self._load(block, block.name, names)
        self._prefetch_next(block)
        if leader_of is None or records is None:
            stream = self._need_stream()
            leader_of = stream.layout(block).leader_of
            if store is not None:
                store.save_index(self.job.key(block.name), {name: leader_of[name] for name in block.linears})
            leaders = list(dict.fromkeys(leader_of[name] for name in names))
            records = self._measure(block, stream, leaders, leaders, keep=block.index < self.last, cut=None)
        divided = self._scale(block, names, leader_of, records)
        return self._solve(block, names, leader_of, records) | self._write(divided)

    def _in_stages(self, block: Block, stream: Stream, names: Sequence[str]) -> dict[str, str]:
        """Compress stage by stage, each on the inputs that the compressed layers before it produce."""
        stream.go_to(block.index)
        self._load(block, block.name, names)
        self._prefetch_next(block)
        layout = stream.layout(block)
        wanted = {layout.leader_of[name] for name in names}
        written: dict[str, str] = {}
        stages = layout.stages
        if isinstance(self.method, ScalingMethod):  # divides what comes before a layer, so all are measured before
            stages = (tuple(leader for stage in stages for leader in stage),)
        last = max(number for number, stage in enumerate(stages) if wanted.intersection(stage))
        for stage in stages[: last + 1]:
            leaders = [leader for leader in stage if leader in wanted]
            cut = layout.cuts.get(stage[0]) if len(stage) == 1 else None
            if not leaders and cut is None:
                continue
            records = self._recorded(block, leaders) if cut is None else None
            if records is None:
                records = self._measure(block, stream, stage, leaders, keep=False, cut=cut)
            divided = self._scale(block, names, layout.leader_of, records)
            done = self._solve(block, [n for n in names if layout.leader_of[n] in stage], layout.leader_of, records)
            done |= self._write(divided)
            self.prefix = digest_of([self.prefix, done])
            written |= done
        if block.index < self.last:
            stream.forward(block)
        return written

    def _scale(
        self, block: Block, names: Sequence[str], leader_of: Mapping[str, str], records: dict[str, InputMoment]
    ) -> dict[str, torch.Tensor]:
        """Move scale from inputs into the weights, if the method wants it; return what was divided and is no layer.

        The loaded block and `records` are changed. A scale follows from the weights as they were.
        """
        if not isinstance(self.method, ScalingMethod):
            return {}
        # What is not compressed stays as it is stored: neither multiplied nor divided.
        places = {
            leader: place
            for leader, place in self._need_stream().folds(block, leader_of).items()
            if set(place.members) <= set(names) and (place.owner not in block.linears or place.owner in names)
        }
        if not places:
            raise StepError(
                f"{self.method.name} finds nothing in {block.name} that could be divided by a scale of an input",
                remedy="use a method that moves no scale (gptq, rtn), or skip no layer",
            )
        tasks = [
            partial(self.method.input_scale, [block.linears[n].weight.data for n in place.members], records[leader])
            for leader, place in places.items()
        ]
        scales = dict(zip(places, self.workers.run(tasks), strict=True))
        for leader, scale_I in scales.items():
            if not bool((scale_I.isfinite() & (scale_I > 0)).all()):
                raise StepError(f"{self.method.name} chose a scale for {leader} that is not finite and positive")
        divided: dict[str, torch.Tensor] = {}
        for leader, place in places.items():
            scale_I, changed = fold(block, place, scales[leader], self.model.checkpoint.torch_dtype)
            records[leader] = records[leader].divided(scale_I)
            divided |= changed
        for name in names:
            self.compressor.facts[name] = {"scaled": float(leader_of[name] in places)}
        return divided

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Write tensors that are no layers, after the layers, which tell the dtype of scales; return digests."""
        return {name: self.writer.add(name, tensor) for name, tensor in tensors.items()}

    def _solve(
        self, block: Block, names: Sequence[str], leader_of: Mapping[str, str], records: dict[str, InputMoment]
    ) -> dict[str, str]:
        """Compress layers, those that share an input together."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(leader_of[name], []).append(name)
        tasks = [
            partial(self.compressor.compress, block, group, records.pop(leader)) for leader, group in groups.items()
        ]
        return _joined(self.workers.run(tasks))

    def _recorded(self, block: Block, leaders: Sequence[str]) -> dict[str, InputMoment] | None:
        """Return the records of these inputs; None unless all are there."""
        found = {}
        store = self.settings.records
        for leader in dict.fromkeys(leaders):
            record = (
                store.load(self.job.key(block.name, leader, self.prefix), with_hessian=self.with_hessian)
                if store
                else None
            )
            if record is None:
                return None
            found[leader] = record.to(self.settings.device)
        return found

    def _measure(
        self, block: Block, stream: Stream, stage: Sequence[str], leaders: Sequence[str], *, keep: bool, cut: Cut | None
    ) -> dict[str, InputMoment]:
        """Run the tokens through the block, and keep what was measured."""
        records = stream.measure(block, stage, leaders, with_hessian=self.with_hessian, keep=keep, cut=cut)
        if self.settings.records is not None:
            for leader, record in records.items():
                self.settings.records.save(self.job.key(block.name, leader, self.prefix), record)
        give_back_memory()
        return records

    def _load(self, block: Block, module: str, names: Sequence[str]) -> None:
        self.model.load(module, self.settings.device)
        for name in names:
            if not block.linears[name].weight.isfinite().all():
                raise StepError(f"the weight of {name} is not finite", remedy="check the model")

    def _prefetch_next(self, block: Block) -> None:
        if block.index < self.last:
            self.model.prefetch(self.model.blocks[block.index + 1].name)


def _joined(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {name: digest for part in parts for name, digest in part.items()}
