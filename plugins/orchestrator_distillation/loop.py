"""The optimizer's loop: updates, held-out losses, the best parameters, states from which a killed run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError, decoder_blocks
from orchestrator_distillation.lesson import Lesson, Progress, rate
from orchestrator_distillation.resuming import Best, TrainingState
from orchestrator_distillation.straight_through import Grids
from orchestrator_distillation.zeros import ZeroMask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Loss on held-out windows that decides which parameters are kept.
Examine = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """Numbers of the optimizer: AdamW, linear warm-up, cosine decay to 0. examine_every: updates between two exams."""

    updates: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    examine_every: int


@dataclass
class Course:
    """What training gave: curves by name, and which update was the best on held-out windows (0: before the first)."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    best_update: int = 0
    resumed_at: int = 0

    def note(self, update: int, values: Mapping[str, float]) -> None:
        """Add a point to curves."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append((update, value))


class Trainer:
    """Trains the parameters of a student, those of layers on grids through their masters."""

    def __init__(
        self, model: PreTrainedModel, lesson: Lesson, pace: Pace, grids: Grids, zeros: ZeroMask, on_grids: set[str]
    ) -> None:
        import torch

        self._lesson, self._pace, self._grids, self._zeros = lesson, pace, grids, zeros
        plain = {name: weight for name, weight in model.named_parameters() if name not in on_grids}
        self.parameters: dict[str, torch.nn.Parameter] = {**plain, **grids.parameters()}
        changes = [weight for name, weight in self.parameters.items() if name.endswith(".log_change")]
        decaying = [weight for name, weight in self.parameters.items() if not name.endswith(".log_change")]
        groups: list[dict[str, Any]] = [{"params": decaying}]
        if changes:
            groups.append({"params": changes, "weight_decay": 0.0})
        self._optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.95), weight_decay=pace.weight_decay, fused=True
        )

    def run(self, examine: Examine, before: float, state: TrainingState, best: Best, progress: Progress) -> Course:
        """Train, and leave the student with the parameters that were best on held-out windows.

        before: the loss on them as the student is now.
        """
        course = self._resumed(state, best)
        done = course.resumed_at
        if done == 0:
            self._examined(0, before, best, course)
        began, first = time.monotonic(), done
        while done < self._pace.updates:
            loss = self._update(done, course)
            done += 1
            if done % self._pace.examine_every == 0 or done == self._pace.updates:
                self._examined(done, examine(), best, course)
            if state.is_due():
                state.save(done, *self._state(course, best))
                best.named()
            each = (time.monotonic() - began) / (done - first)
            progress(
                done / self._pace.updates,
                f"update {done} of {self._pace.updates}, loss {loss:.4f}, {_left((self._pace.updates - done) * each)}",
            )
        course.best_update = best.update
        if best.update == 0:
            progress(1.0, "no update has lowered the held-out loss; the model is as it was: lower `learning_rate`")
        if best.update != self._pace.updates:
            for name, value in best.parameters().items():
                self.parameters[name].data.copy_(value)
            self._grids.write()
        return course

    def _update(self, number: int, course: Course) -> float:
        import torch

        share = rate(number, self._pace.updates, self._pace.warmup_fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = self._pace.learning_rate * share
        loss = self._lesson.teach(number)
        self._grids.take_gradients()
        self._zeros.clear_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._pace.clip_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StepError(
                f"distillation diverged at update {number + 1}: loss {loss}, gradient norm {norm}",
                remedy=f"lower `learning_rate` (now {self._pace.learning_rate:g}) or raise `warmup_fraction`",
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._zeros.clear_weights()
        self._grids.write()
        course.note(number + 1, {"train_loss": loss, "gradient_norm": norm, **self._lesson.curve()})
        return loss

    def _examined(self, update: int, loss: float, best: Best, course: Course) -> None:
        if not math.isfinite(loss):
            raise StepError(
                f"the loss on held-out windows is {loss} after {update} updates",
                remedy="check the model and its teacher for numbers that are not finite"
                if update == 0
                else f"lower `learning_rate` (now {self._pace.learning_rate:g})",
            )
        course.note(update, {"held_out_loss": loss})
        best.offer(update, loss, self.parameters)
        self._lesson.hear(loss)

    def _state(self, course: Course, best: Best) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        taught, facts = self._lesson.state()
        tensors = {f"lesson.{name}": tensor for name, tensor in taught.items()}
        for name, weight in self.parameters.items():
            tensors[f"parameter.{name}"] = weight.data
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self._optimizer.state[weight]:
                    tensors[f"{moment}.{name}"] = self._optimizer.state[weight][moment]
        return tensors, {"lesson": facts, "curves": course.curves, "best": best.facts()}

    def _resumed(self, state: TrainingState, best: Best) -> Course:
        import torch

        found = state.load()
        if found is None or not best.restore(found[2]["best"]):
            best.forget()
            return Course()
        update, tensors, facts = found
        for name, weight in self.parameters.items():
            weight.data.copy_(tensors[f"parameter.{name}"])
            if f"exp_avg.{name}" in tensors:
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(update)),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(weight.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(weight.device),
                }
        self._grids.write()
        taught = {n.removeprefix("lesson."): t for n, t in tensors.items() if n.startswith("lesson.")}
        self._lesson.restore(update, taught, facts["lesson"])
        curves = {name: [(int(at), float(value)) for at, value in curve] for name, curve in facts["curves"].items()}
        return Course(curves, resumed_at=update)


@contextmanager
def trainable(model: PreTrainedModel) -> Iterator[dict[str, torch.dtype]]:
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


@contextmanager
def recomputing(model: Any, active: bool) -> Iterator[None]:
    """Keep only what enters each decoder block for the backward pass, and run the block again there.

    Chen et al. 2016, arXiv:1604.06174. Transformers' own switch does so in training mode alone, with dropout on.
    """
    from torch.utils.checkpoint import checkpoint

    blocks: list[Any] = []
    if active:
        names = decoder_blocks(model, model.config.get_text_config().num_hidden_layers)
        blocks = [model.get_submodule(name) for name in names]
    try:
        for block in blocks:
            block.forward = partial(_checkpointed, checkpoint, block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(checkpoint: Any, forward: Any, *inputs: Any, **named: Any) -> Any:
    import torch

    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def _left(seconds: float) -> str:
    """How long it will still take, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
