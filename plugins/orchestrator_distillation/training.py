"""What all methods that train a student have in common: text, optimizer, teacher, invariants, resuming.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from orchestrator.api import (
    DENSE,
    TRAINED_TOKENS,
    Checkpoint,
    Context,
    Invariant,
    ModelFacts,
    ModelMethod,
    ModelResult,
    Stage,
    StepError,
    TextSource,
    WeightedModels,
    Work,
    check_text_size,
    token_windows,
)
from orchestrator_distillation.divergence import Divergence
from orchestrator_distillation.examining import Examiner, require_one_tokenizer
from orchestrator_distillation.lesson import Desk, Lesson
from orchestrator_distillation.loop import Pace, Trainer, recomputing, trainable
from orchestrator_distillation.objective import CHUNK_ELEMENTS, Objective
from orchestrator_distillation.outputs import Compute, Scorer
from orchestrator_distillation.resuming import Best, TrainingState
from orchestrator_distillation.straight_through import Grids, grid_layers, weight_names
from orchestrator_distillation.teachers import Ensemble, TeacherCache
from orchestrator_distillation.zeros import ZeroMask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_HELD_OUT_SHARE = 8  # one window in eight, at most _HELD_OUT_MOST, is never trained on
_HELD_OUT_MOST = 16
_EXAMS = 10
_OFFERED_TOP_K = 64


class Training(ModelMethod):
    """Trains all parameters of the model by AdamW, with linear warm-up and cosine decay.

    Weights that are exactly zero in a linear layer stay zero; layers on a grid stay on it (straight-through). Master
    weights, sums and losses are float32; the result has the dtypes of the input. Dropout stays off. Of all parameters
    that were examined, those with the lowest loss on held-out windows are the result, the first ones among them. The
    same input gives the same bytes, also after a run was killed and started again.
    """

    stage: ClassVar = Stage.DISTILL
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS, Invariant.GRID})
    resumable: ClassVar[bool] = True

    source: TextSource | None = Field(
        None,
        description="Text to train on: a file, or hub:OWNER/NAME:SPLIT@REVISION. Default: the calibration set.",
    )
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    sequences: int = Field(512, ge=2, le=10_000_000, description="Windows drawn from `source`; no use without it.")
    updates: int = Field(200, ge=1, le=10_000_000, description="Optimizer steps.")
    batch_sequences: int = Field(4, ge=1, le=65536, description="Windows per optimizer step.")
    sequences_at_once: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Windows that pass the models together; gradients of a step add up. Default: all of a step.",
    )
    length_tokens: int = Field(
        256, ge=2, le=1_048_576, description="Window length, tokens; longer calibration windows are cut to it."
    )
    learning_rate: float = Field(
        5e-4,
        gt=0,
        le=1,
        description="Peak learning rate. The default suits some million parameters; billions need 1e-5 to 1e-4.",
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the updates with rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay, per unit of learning rate.")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")
    examine_every: int | None = Field(
        None, ge=1, description="Updates between two looks at the held-out windows. Default: a tenth of all."
    )
    recompute: bool = Field(
        False, description="Run each decoder block again for its gradients instead of keeping what it computed."
    )
    compute: Compute = Field(
        "float32", description="Type of matrix products; what is held, sums and losses are float32 either way."
    )
    learn_scales: bool = Field(
        True, description="Of layers on a grid, train the scales beside the integers. No use without a grid."
    )
    teachers: WeightedModels = Field(
        {DENSE: 1.0},
        min_length=1,
        description="Folder or hub id of each teacher and its weight in the mean of their distributions; 'dense' is "
        "the model that the pipeline started from.",
    )
    teacher_top_k: int | None = Field(
        None,
        ge=1,
        description="Let the teacher run once, before the student is loaded, and keep of each position the largest so "
        "many probabilities and the sum of all others. Default: the teacher stays in memory.",
    )

    @abstractmethod
    def make_lesson(self, desk: Desk, seed: int) -> Lesson:
        """Return what the updates are taught by."""

    def exam(self) -> Objective:
        """The divergence on held-out windows by which parameters are chosen."""
        return Objective(Divergence("forward_kl"))

    def needs_teacher(self) -> bool:
        """Whether anything is learned from a teacher."""
        return True

    def preflight(self) -> None:
        """Refuse a text file with fewer bytes than tokens needed. (The plan itself refuses an unreadable source.)"""
        if self.source is not None:
            check_text_size(self.source, self.sequences, self.length_tokens)

    def config_after(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same. Raises `StepError` for a teacher that cannot know the student's tokens, or too many asked of it."""
        vocabulary = config.get("vocab_size")
        for name in self.teachers if self.needs_teacher() and isinstance(vocabulary, int) else ():
            known = vocabulary if name == DENSE else Checkpoint(Path(name)).config.get("vocab_size", vocabulary)
            assert isinstance(known, int)
            if known != vocabulary:
                raise StepError(
                    f"the student scores {vocabulary} tokens, the teacher {Path(name).name} {known}",
                    remedy="use a teacher of the student's family, with the same tokenizer",
                )
            if self.teacher_top_k is not None and self.teacher_top_k >= known:
                raise StepError(
                    f"teacher_top_k is {self.teacher_top_k}, and the teacher knows {known} tokens",
                    remedy="set it to some dozen, or remove it",
                )
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        prompt, answer = self.prompt_and_answer()
        if isinstance(positions, int) and prompt + answer > positions:
            raise StepError(
                f"the student is to write {answer} tokens after {prompt}, and it has {positions} positions",
                remedy=f"lower answer_tokens to at most {positions - prompt}"
                if prompt < positions
                else "lower prompt_tokens first",
            )
        return config

    def prompt_and_answer(self) -> tuple[int, int]:
        """How many tokens the student takes over and writes, if it does."""
        return 0, 0

    def needs_calibration(self) -> bool:
        """Whether the windows come from the calibration set."""
        return self.source is None

    def teacher_temperature(self) -> float:
        """Temperature of the teacher's distribution."""
        return 1.0

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Teacher, student, its gradient and two moments in float32; what one batch leaves for the backward pass."""
        sequences, length = (self.sequences, self.length_tokens) if self.source else calibration
        windows = sequences * max(1, length // self.length_tokens)
        length = min(length, self.length_tokens)
        held_out = _held_out(windows)
        size = max(1, min(self.batch_sequences, windows - held_out))
        at_once = length * min(size, self.sequences_at_once or size)
        trained = self.updates * size * length
        cached = self.teacher_top_k is not None
        teachers = len(self.teachers) if self.needs_teacher() else 0
        passes = 3 + self.recompute + (0 if cached else teachers)
        passed = model.forward(trained, length, at_once, head=True).times(passes)
        exams = 1 + self.updates // self._examine_every()
        examined = 1 + (0 if cached else teachers)
        passed = passed.then(model.forward(held_out * length, length, at_once, head=True).times(examined * exams + 2))
        if cached:
            passed = passed.then(dense.forward(windows * length, length, length, head=True).times(teachers))
        chunk = min(CHUNK_ELEMENTS, at_once * model.vocabulary)
        saved = model.saved_bytes(at_once)
        if self.recompute:
            blocks = max(1, len(model.blocks))
            saved = saved // blocks + 4 * at_once * model.hidden * blocks
        held = 4 * model.float32_bytes + model.parameters + saved + 4 * (6 * chunk + 4 * at_once * model.hidden)
        held += model.float32_bytes if model.quantized else 0  # masters beside the weights that they stand behind
        memory = held + (0 if cached else teachers * dense.float32_bytes)
        alone = teachers * dense.float32_bytes + 4 * (4 * chunk + length * dense.hidden) if cached else 0
        return replace(
            passed,
            memory_bytes=max(memory, alone),
            disk_bytes=0 if self.source is None else 4 * min(windows * length, TRAINED_TOKENS),
            scratch_bytes=4 * model.float32_bytes,
            moved_bytes=passed.moved_bytes
            + self.updates * 10.0 * model.float32_bytes
            + 80.0 * trained * model.vocabulary,
            calls=passed.calls + self.updates * 15 * 9 * len(model.blocks),
        )

    def economies(self) -> Sequence[Mapping[str, Any]]:
        """The teacher's cache, if this method can do with it; then fewer windows at once, and recomputing."""
        found: list[Mapping[str, Any]] = []
        if self.can_cache() and self.teacher_top_k is None:
            found.append({"teacher_top_k": _OFFERED_TOP_K})
        if (self.sequences_at_once or self.batch_sequences) > 1:
            found.append({"sequences_at_once": 1})
        return [*found, {"recompute": True}] if not self.recompute else found

    def can_cache(self) -> bool:
        """Whether all the teacher is asked about is known before."""
        return self.needs_teacher()

    def prepare(self, context: Context) -> None:
        """Compare tokenizers; let the teacher run, if it is to run once. Raises `StepError` for too little text."""
        if not self.needs_teacher():
            return
        teachers = self._teacher_models(context)
        if context.checkpoint is not None:
            self.config_after(context.checkpoint.config)
        require_one_tokenizer(context, [checkpoint for checkpoint, _ in teachers])
        if self.teacher_top_k is not None:
            tokens_NT = self._windows(context)
            cache = self._cache(context, tokens_NT)
            cache.fill(lambda: Ensemble.load(teachers, self.teacher_temperature(), self.compute), context.progress)
            if cache.set_aside:
                what = f"{cache.set_aside} files of the teacher's cache were damaged or made from something else"
                context.progress(0.0, f"{what}; they were set aside and made anew")

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Train `model` in place. Raises `StepError` for too little text, unlike vocabularies and a diverging loss."""
        import torch

        if context.state is None:  # outside of a run nobody has called it
            self.prepare(context)
        tokens_NT = self._windows(context)
        on_grids = weight_names(model, context.checkpoint)
        pruned = Invariant.ZEROS in context.held
        zeros = ZeroMask(model, () if pruned else set(on_grids.values()))
        with trainable(model) as dtypes, recomputing(model, self.recompute):
            grids = Grids(
                grid_layers(model, context.checkpoint, on_grids, {name: zeros.of(name) for name in on_grids.values()}),
                self.learn_scales,
            )
            grids.write()
            desk, held_out_NT = self._desk(model, context, tokens_NT)
            examiner = Examiner(desk, held_out_NT, self.exam(), self.needs_teacher())
            before = examiner.measure()
            trainer = Trainer(
                model, self.make_lesson(desk, context.seed), self._pace(), grids, zeros, set(on_grids.values())
            )
            folder = context.state or context.scratch
            identity = {"threads": torch.get_num_threads(), "machine": torch.backends.cpu.get_cpu_capability()}
            course = trainer.run(
                lambda: examiner.measure()["loss"],
                before["loss"],
                TrainingState(context.state, identity),
                Best(folder),
                context.progress,
            )
            encodings = grids.encodings()
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name]).float()  # what the result can hold is what is measured
            after = examiner.measure()
        if lost := zeros.violations():
            raise StepError(f"pruned weights of {lost[0]} are no longer zero", remedy="report this; it is a bug")
        losses = [loss for _, loss in course.curves["train_loss"]]
        metrics = {
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "held_out_before": before["loss"],
            "held_out_after": after["loss"],
            **({"kl_before": before["kl"], "kl_after": after["kl"]} if self.needs_teacher() else {}),
            "best_update": float(course.best_update),
            "updates": float(self.updates),
            "tokens": float(self.updates * min(desk.size, len(desk.windows_NT)) * tokens_NT.shape[1]),
            "zeros_kept": float(zeros.count),
            "layers_on_grid": float(len(encodings)),
        }
        own = None if self.source is None else tokens_NT
        return ModelResult(model, metrics, encodings=encodings, curves=course.curves, trained_on=own)

    def _examine_every(self) -> int:
        return self.examine_every or max(1, self.updates // _EXAMS)

    def _pace(self) -> Pace:
        return Pace(
            self.updates,
            self.learning_rate,
            self.warmup_fraction,
            self.weight_decay,
            self.clip_norm,
            self._examine_every(),
        )

    def _windows(self, context: Context) -> torch.Tensor:
        """The windows [N, T], of the calibration set or drawn from `source`."""
        if self.source is None:
            if context.calibration is None:
                raise StepError("there is no calibration set to distill on", remedy="set `source`, or calibrate before")
            tokens_NT = context.calibration.tokens_NT
            length = min(self.length_tokens, tokens_NT.shape[1])
            # Long windows are cut into several of the length asked for.
            tokens_NT = tokens_NT[:, : tokens_NT.shape[1] // length * length].reshape(-1, length)
        else:
            tokens_NT = token_windows(
                self.source,
                context.dense.load_tokenizer(),
                num_sequences=self.sequences,
                length=self.length_tokens,
                seed=context.seed,
                field=self.field,
                random=True,
            ).tokens_NT
        if len(tokens_NT) < 2:
            raise StepError(
                "distillation needs two windows or more: one is held out", remedy="calibrate on more `sequences`"
            )
        return tokens_NT

    def _desk(self, model: PreTrainedModel, context: Context, tokens_NT: torch.Tensor) -> tuple[Desk, torch.Tensor]:
        """Return what lessons work with, and the held-out windows, which are the first ones."""
        held_out = _held_out(len(tokens_NT))
        prompt, length = self.prompt_and_answer()[0], tokens_NT.shape[1]
        if prompt >= length:
            raise StepError(
                f"prompt_tokens {prompt} leave nothing of windows of {length} tokens",
                remedy=f"set prompt_tokens to at most {length - 1}, or calibrate on longer windows",
            )
        student, teacher, cache = Scorer(model, self.compute), None, None
        if self.needs_teacher():
            models = self._teacher_models(context)
            if self.teacher_top_k is None:
                teacher = Ensemble.load(models, self.teacher_temperature(), self.compute, model.device)
                vocabularies = [scorer.vocabulary for _, scorer in teacher.members]
            else:
                cache = self._cache(context, tokens_NT)
                vocabularies = [int(checkpoint.config["vocab_size"]) for checkpoint, _ in models]
            for vocabulary in vocabularies:
                if vocabulary != student.vocabulary:
                    raise StepError(
                        f"the student scores {student.vocabulary} tokens, the teacher {vocabulary}",
                        remedy="distill between models with one vocabulary",
                    )
        end = getattr(model.generation_config, "eos_token_id", None)
        return (
            Desk(
                student,
                teacher,
                cache,
                tokens_NT[held_out:],
                held_out,
                self.batch_sequences,
                self.sequences_at_once or self.batch_sequences,
                self.updates,
                end[0] if isinstance(end, list) else end,
            ),
            tokens_NT[:held_out],
        )

    def _teacher_models(self, context: Context) -> list[tuple[Checkpoint, float]]:
        return [
            (context.dense if name == DENSE else Checkpoint(Path(name)), weight)
            for name, weight in self.teachers.items()
        ]

    def _cache(self, context: Context, tokens_NT: torch.Tensor) -> TeacherCache:
        import torch

        teachers = sorted((checkpoint.digest(), weight) for checkpoint, weight in self._teacher_models(context))
        identity = {
            "teachers": teachers,
            "temperature": self.teacher_temperature(),
            "compute": self.compute,
            "torch": torch.__version__,
        }
        assert self.teacher_top_k is not None
        return TeacherCache(context.cache or context.scratch, tokens_NT, self.teacher_top_k, identity)


def _held_out(windows: int) -> int:
    """How many of so many windows are never trained on."""
    return min(_HELD_OUT_MOST, max(1, windows // _HELD_OUT_SHARE))
