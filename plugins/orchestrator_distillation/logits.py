"""Distillation from the dense model's logits.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, P = B x T positions, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from orchestrator.api import (
    Context,
    Invariant,
    ModelFacts,
    ModelMethod,
    ModelResult,
    Stage,
    StepError,
    TextSource,
    Work,
    token_windows,
)
from orchestrator_distillation.loss import CHUNK_ELEMENTS, NO_TARGET, loss_and_gradient, mean_divergence
from orchestrator_distillation.zeros import ZeroMask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_HELD_OUT_SHARE = 8  # one window in eight, at most _HELD_OUT_MOST, is never trained on
_HELD_OUT_MOST = 16


class Logits(ModelMethod):
    """All parameters are trained so that the student's next-token distribution nears the dense model's.

    Forward KL with temperature, AdamW, linear warm-up and cosine decay. Weights that are exactly zero in a linear
    layer stay zero. Master weights, activations and the loss are float32; the result has the dtypes of the input.
    Dropout stays off: the same input gives the same bytes.
    """

    stage: ClassVar = Stage.DISTILL
    name: ClassVar = "logits"
    paper: ClassVar = "Hinton et al. 2015, arXiv:1503.02531, section 2; forward KL per token."
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS})

    source: TextSource | None = Field(
        None,
        description="Text to train on: a file, or hub:OWNER/NAME:SPLIT@REVISION. Default: the calibration set.",
    )
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    sequences: int = Field(512, ge=2, le=10_000_000, description="Windows drawn from `source`; no use without it.")
    updates: int = Field(200, ge=1, le=10_000_000, description="Optimizer steps.")
    batch_sequences: int = Field(4, ge=1, le=65536, description="Windows per optimizer step.")
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
    temperature: float = Field(1.0, gt=0, le=100, description="Divides both models' logits.")
    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the KL term; 1 - alpha weighs the cross-entropy.")

    def needs_calibration(self) -> bool:
        """Whether the windows come from the calibration set."""
        return self.source is None

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Teacher, student, its gradient and two moments in float32; what one batch leaves for the backward pass."""
        sequences, length = (self.sequences, self.length_tokens) if self.source else calibration
        windows = sequences * max(1, length // self.length_tokens)
        length = min(length, self.length_tokens)
        held_out = min(_HELD_OUT_MOST, max(1, windows // _HELD_OUT_SHARE))
        batch = length * max(1, min(self.batch_sequences, windows - held_out))
        trained = self.updates * batch
        passed = model.forward(trained, length, batch, head=True).times(4)  # teacher, student, and twice backward
        passed = passed.then(model.forward(held_out * length, length, batch, head=True).times(4))
        chunk = min(CHUNK_ELEMENTS, batch * model.vocabulary)
        logits = 4 * (3 * batch * model.vocabulary + 4 * chunk)
        held = dense.float32_bytes + 4 * model.float32_bytes + model.parameters
        return replace(
            passed,
            memory_bytes=held + model.saved_bytes(batch) + logits,
            moved_bytes=passed.moved_bytes
            + self.updates * 10.0 * model.float32_bytes
            + 80.0 * trained * model.vocabulary,
            calls=passed.calls + self.updates * 15 * 9 * len(model.blocks),
        )

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Train `model` in place. Raises `StepError` for too little text, unlike vocabularies and a diverging loss."""
        import torch

        tokens_NT = self._windows(context)
        if len(tokens_NT) < 2:
            raise StepError(
                "distillation needs two windows or more: one is held out", remedy="calibrate on more `sequences`"
            )
        teacher: Any = context.dense.load()
        teacher = teacher.float().eval().to(model.device)
        zeros = ZeroMask(model)
        held_out = min(_HELD_OUT_MOST, max(1, len(tokens_NT) // _HELD_OUT_SHARE))
        with _trainable(model) as dtypes:
            before = self._held_out_divergence(model, teacher, tokens_NT[:held_out])
            with torch.enable_grad():
                losses = self._train(model, teacher, tokens_NT[held_out:], zeros, context)
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name]).float()  # what the result can hold is what is measured
            after = self._held_out_divergence(model, teacher, tokens_NT[:held_out])
        if lost := zeros.violations():
            raise StepError(f"pruned weights of {lost[0]} are no longer zero", remedy="report this; it is a bug")
        metrics = {
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "kl_before": before,
            "kl_after": after,
            "updates": float(self.updates),
            "tokens": float(self.updates * min(self.batch_sequences, len(tokens_NT) - held_out) * tokens_NT.shape[1]),
            "zeros_kept": float(zeros.count),
        }
        return ModelResult(model, metrics)

    def _windows(self, context: Context) -> torch.Tensor:
        """The windows [N, T], of the calibration set or drawn from `source`."""
        if self.source is None:
            if context.calibration is None:
                raise StepError("there is no calibration set to distill on", remedy="set `source`, or calibrate before")
            tokens_NT = context.calibration.tokens_NT
            length = min(self.length_tokens, tokens_NT.shape[1])
            # Long windows are cut into several of the length asked for.
            return tokens_NT[:, : tokens_NT.shape[1] // length * length].reshape(-1, length)
        return token_windows(
            self.source,
            context.dense.load_tokenizer(),
            num_sequences=self.sequences,
            length=self.length_tokens,
            seed=context.seed,
            field=self.field,
            random=True,
        ).tokens_NT

    def _train(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        tokens_NT: torch.Tensor,
        zeros: ZeroMask,
        context: Context,
    ) -> list[float]:
        """Run the optimizer and return the loss of every update."""
        import torch

        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=self.weight_decay)
        losses: list[float] = []
        batches = _batches(len(tokens_NT), self.batch_sequences, context.seed)
        for update in range(self.updates):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self._schedule(update)
            tokens_BT = tokens_NT[next(batches)].to(model.device)
            targets_BT = torch.full_like(tokens_BT, NO_TARGET)
            targets_BT[:, :-1] = tokens_BT[:, 1:]
            teacher_PV = _teacher_logits(teacher, tokens_BT)
            student_PV = _logits(model, tokens_BT)
            _require_one_vocabulary(student_PV, teacher_PV)
            loss, gradient_PV = loss_and_gradient(
                student_PV, teacher_PV, targets_BT.flatten(), self.temperature, self.alpha
            )
            student_PV.backward(gradient_PV)  # type: ignore[no-untyped-call]
            zeros.clear_gradients()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise StepError(
                    f"distillation diverged at update {update + 1}: loss {loss}, gradient norm {norm}",
                    remedy=f"lower `learning_rate` (now {self.learning_rate:g}) or raise `warmup_fraction`",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            zeros.clear_weights()
            losses.append(loss)
            context.progress((update + 1) / self.updates, f"update {update + 1} of {self.updates}, loss {loss:.4f}")
        return losses

    def _schedule(self, update: int) -> float:
        """The learning rate of an update (counted from 0) as a share of its peak: linear rise, cosine fall to 0."""
        rising = math.ceil(self.warmup_fraction * self.updates)
        if update < rising:
            return (update + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (update - rising) / (self.updates - rising)))

    def _held_out_divergence(self, model: PreTrainedModel, teacher: PreTrainedModel, tokens_NT: torch.Tensor) -> float:
        """Mean KL(teacher || student) on windows that are not trained on, nats per token."""
        import torch

        total = 0.0
        with torch.no_grad():
            for tokens_BT in torch.split(tokens_NT.to(model.device), self.batch_sequences):
                student_PV, teacher_PV = _logits(model, tokens_BT), _logits(teacher, tokens_BT)
                _require_one_vocabulary(student_PV, teacher_PV)
                total += mean_divergence(student_PV, teacher_PV) * len(tokens_BT)
        return total / len(tokens_NT)


@contextmanager
def _trainable(model: PreTrainedModel) -> Iterator[dict[str, torch.dtype]]:
    """Give the parameters float32 master weights and gradients, and turn dropout off, for as long as this is open.

    Yields the parameters' own dtypes, to which they return at the end. Buffers are left alone: rotary frequencies are
    float32 in every model. Tied parameters are one object here and stay so.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        yield dtypes
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])
            parameter.requires_grad_(trained[name])
        for module, mode in modes:
            module.training = mode


def _logits(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    return cast("torch.Tensor", model(input_ids=tokens_BT, use_cache=False).logits.flatten(0, 1))


def _teacher_logits(teacher: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return _logits(teacher, tokens_BT)


def _require_one_vocabulary(student_PV: torch.Tensor, teacher_PV: torch.Tensor) -> None:
    if student_PV.shape != teacher_PV.shape:
        raise StepError(
            f"the student scores {student_PV.shape[1]} tokens, the teacher {teacher_PV.shape[1]}",
            remedy="distill between models with one vocabulary",
        )


def _batches(num_windows: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the indices of batches for ever, each window once per pass, in an order that depends on the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = min(size, num_windows)
    while True:
        order = torch.randperm(num_windows, generator=generator)
        yield from torch.split(order[: num_windows // size * size], size)
