"""What one update is taught: where prefixes come from, and what is made of the teacher's and the student's scores.

A `Lesson` adds the gradients of one update to those of the parameters. It draws from its own generator alone, and
gives and takes its state, so that a killed run goes on.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, P = B x T positions, R = positions that
count, C = positions of a chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator_distillation.objective import NO_TARGET, Objective
from orchestrator_distillation.outputs import Scorer
from orchestrator_distillation.sampling import Samples, sample
from orchestrator_distillation.teachers import Ensemble, Said, TeacherCache

if TYPE_CHECKING:
    import torch

Schedule = Literal["constant", "linear", "adaptive"]
# Ko et al. 2024, arXiv:2402.03898: the share of student text rises by a tenth when the held-out loss does.
_ADAPTIVE_STEP = 0.1


@dataclass
class Desk:
    """What lessons work with.

    windows_NT: what is trained on. first: its number among the windows of the cache, held-out ones come before.
    size: windows of an update; at_once: of them, how many pass the models together.
    """

    student: Scorer
    teacher: Ensemble | None
    cache: TeacherCache | None
    windows_NT: torch.Tensor
    first: int
    size: int
    at_once: int
    updates: int
    end_token: int | None

    def listen(self, numbers_B: torch.Tensor | None, tokens_BT: torch.Tensor) -> Said | None:
        """Return what the teacher says. numbers_B: of the windows, if they are of the data."""
        if self.cache is not None and numbers_B is not None:
            return self.cache.listen(numbers_B + self.first)
        return None if self.teacher is None else self.teacher.listen(tokens_BT)


class Lesson(ABC):
    """Adds up the gradients of one update after the other."""

    def __init__(self, desk: Desk, seed: int) -> None:
        import torch

        self.desk = desk
        self.order = Order(len(desk.windows_NT), desk.size, seed)
        self.generator = torch.Generator(device=desk.student.model.device).manual_seed(seed)

    @abstractmethod
    def teach(self, update: int) -> float:
        """Add the gradients of an update, counted from 0, and return its loss."""

    def hear(self, held_out: float) -> None:  # noqa: B027 - most lessons do not change with it
        """Take notice of the loss on held-out windows."""

    def curve(self) -> Mapping[str, float]:
        """Numbers of the last update that are worth a curve."""
        return {}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what decides the updates that follow."""
        return {"generator": self.generator.get_state()}, {}

    def restore(self, update: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Go on after `update` updates."""
        self.generator.set_state(tensors["generator"])
        self.order.go_to(update)


class Order:
    """In which order windows are read: each once per pass, as the seed has it."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, min(size, count), seed
        self._batches = self._all()

    def next(self) -> torch.Tensor:
        """Return the numbers of the windows of the next update."""
        return next(self._batches)

    def go_to(self, update: int) -> None:
        """Go on as if `update` batches had been read."""
        self._batches = self._all()
        for _ in range(update):
            next(self._batches)

    def _all(self) -> Iterator[torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        while True:
            order = torch.randperm(self._count, generator=generator)
            yield from torch.split(order[: self._count // self._size * self._size], self._size)


class PrefixLesson(Lesson):
    """A divergence and cross-entropy on text of the data or of the student.

    share: of the updates, how many read what the student writes (lambda of GKD, Agarwal et al. 2023, algorithm 1).
    schedule: whether that share is constant, rises linearly to it, or rises from 0 with the held-out loss (DistiLLM).
    replay: how many windows of student text are kept, to be read again with falling probability 1 - update / updates
    (Ko et al. 2024, section 3.2); 0: none is read twice. prompt, answer: tokens that are taken over and written.
    """

    def __init__(
        self,
        desk: Desk,
        seed: int,
        objective: Objective,
        *,
        share: float = 0.0,
        schedule: Schedule = "constant",
        replay: int = 0,
        prompt: int = 0,
        answer: int = 0,
    ) -> None:
        super().__init__(desk, seed)
        self._objective = objective
        self._most, self._schedule = share, schedule
        self._share = 0.0 if schedule == "adaptive" else share
        self._heard: float | None = None
        self._replay, self._kept = replay, Kept()
        self._prompt, self._answer = prompt, answer
        self._student_updates = 0

    def teach(self, update: int) -> float:
        """Draw where the prefixes come from; then the gradients, some windows at a time."""
        numbers_B = self.order.next()
        tokens_BT = self.desk.windows_NT[numbers_B].to(self.desk.student.model.device)
        share = self._share_of(update)
        if share == 0 or self._draw() >= share:
            return self._learn(numbers_B, tokens_BT, None)
        self._student_updates += 1
        samples = self._student_text(tokens_BT[:, : self._prompt], update)
        return self._learn(None, samples.tokens_BT, samples.counted_BT)

    def hear(self, held_out: float) -> None:
        """With an adaptive schedule, a rising loss raises the share of student text."""
        if self._schedule == "adaptive" and self._heard is not None and held_out > self._heard:
            self._share = min(self._most, self._share + _ADAPTIVE_STEP)
        self._heard = held_out

    def curve(self) -> Mapping[str, float]:
        """How many updates have read student text so far."""
        return {"student_updates": float(self._student_updates)} if self._most > 0 else {}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the generator, the share and what students wrote."""
        tensors, facts = super().state()
        facts |= {"share": self._share, "heard": self._heard, "student_updates": self._student_updates}
        return {**tensors, **self._kept.tensors()}, facts

    def restore(self, update: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Go on after `update` updates."""
        super().restore(update, tensors, facts)
        self._share, self._heard = float(facts["share"]), facts["heard"]
        self._student_updates = int(facts["student_updates"])
        self._kept.restore(tensors)

    def _share_of(self, update: int) -> float:
        rising = self._schedule == "linear"
        return self._share * (update + 1) / self.desk.updates if rising else self._share

    def _draw(self) -> float:
        import torch

        device = self.generator.device
        return float(torch.rand((), generator=self.generator, device=device, dtype=torch.float64))

    def _student_text(self, prompts_BT: torch.Tensor, update: int) -> Samples:
        fresh = 1.0 - update / self.desk.updates
        if self._replay and len(self._kept) >= len(prompts_BT) and self._draw() >= fresh:
            return self._kept.draw(len(prompts_BT), self.generator)
        samples = sample(self.desk.student, prompts_BT, self._answer, self.generator, end_token=self.desk.end_token)
        if self._replay:
            self._kept.add(samples, self._replay)
        return samples

    def _learn(self, numbers_B: torch.Tensor | None, tokens_BT: torch.Tensor, counted_BT: torch.Tensor | None) -> float:
        import torch

        if counted_BT is None:
            counted_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        targets_BT = next_tokens(tokens_BT, counted_BT)
        positions, targets = int(counted_BT.sum()), int((targets_BT != NO_TARGET).sum())
        loss = 0.0
        for start in range(0, len(tokens_BT), self.desk.at_once):
            part = slice(start, start + self.desk.at_once)
            said = None
            if self._objective.alpha > 0:
                said = self.desk.listen(None if numbers_B is None else numbers_B[part], tokens_BT[part])
            targets_P = targets_BT[part].flatten()

            def cost(
                rows_C: torch.Tensor, logits_CV: torch.Tensor, said: Said | None = said, targets_P: Any = targets_P
            ) -> tuple[float, torch.Tensor]:
                chunk = None if said is None else said.at(rows_C)
                return self._objective.loss_and_gradient(logits_CV, chunk, targets_P[rows_C], positions, targets)

            rows_R = counted_BT[part].flatten().nonzero().squeeze(-1)
            loss += self.desk.student.backward(tokens_BT[part], rows_R, cost)
        return loss


class Kept:
    """What students wrote, the latest of it."""

    def __init__(self) -> None:
        self._samples: Samples | None = None

    def __len__(self) -> int:
        return 0 if self._samples is None else len(self._samples.tokens_BT)

    def add(self, samples: Samples, most: int) -> None:
        """Keep these too, and forget the oldest beyond `most` windows."""
        import torch

        if self._samples is not None:
            old = self._samples
            samples = Samples(
                torch.cat([old.tokens_BT, samples.tokens_BT]), torch.cat([old.counted_BT, samples.counted_BT])
            )
        self._samples = Samples(samples.tokens_BT[-most:], samples.counted_BT[-most:])

    def draw(self, count: int, generator: torch.Generator) -> Samples:
        """Return `count` different ones."""
        import torch

        assert self._samples is not None
        chosen_B = torch.randperm(len(self), generator=generator, device=generator.device)[:count]
        return Samples(self._samples.tokens_BT[chosen_B], self._samples.counted_BT[chosen_B])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return them for a state."""
        if self._samples is None:
            return {}
        return {"kept_tokens": self._samples.tokens_BT, "kept_counted": self._samples.counted_BT}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take them from a state."""
        if "kept_tokens" in tensors:
            self._samples = Samples(tensors["kept_tokens"], tensors["kept_counted"])


def next_tokens(tokens_BT: torch.Tensor, counted_BT: torch.Tensor) -> torch.Tensor:
    """Return the token after each position, `NO_TARGET` after the last one and where none counts."""
    import torch

    targets_BT = torch.full_like(tokens_BT, NO_TARGET)
    targets_BT[:, :-1] = torch.where(counted_BT[:, :-1], tokens_BT[:, 1:], NO_TARGET)
    return targets_BT


def rate(update: int, updates: int, warmup_fraction: float) -> float:
    """The learning rate of an update (counted from 0) as a share of its peak: linear rise, cosine fall to 0."""
    rising = math.ceil(warmup_fraction * updates)
    if update < rising:
        return (update + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (update - rising) / (updates - rising)))


Progress = Callable[[float, str], None]
