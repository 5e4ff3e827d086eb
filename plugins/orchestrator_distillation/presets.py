"""The methods of this family: one way to train, with three choices that do not depend on each other.

Which divergence is lowered, where prefixes come from, and how the teacher is reached. A preset is a set of defaults.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from orchestrator.api import DENSE, Invariant, ModelFacts, Work
from orchestrator_distillation.divergence import Divergence, DivergenceName
from orchestrator_distillation.lesson import Desk, Lesson, PrefixLesson, Schedule
from orchestrator_distillation.minillm import MiniLLMLesson
from orchestrator_distillation.objective import Objective
from orchestrator_distillation.training import Training


class _Matching(Training):
    """Lowers a divergence between the next-token distributions of teacher and student, token by token."""

    divergence: DivergenceName = Field("forward_kl", description="What is lowered, p being the teacher, q the student.")
    mixing: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="beta of `jsd`, weight of the teacher in the mixture; alpha of `skew_kl` (teacher's weight) and "
        "`skew_reverse_kl` (student's). No use to the others.",
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Divides both models' logits.")
    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the divergence; 1 - alpha weighs the cross-entropy.")
    student_share: float = Field(
        0.0, ge=0, le=1, description="Share of the updates that read text which the student writes itself."
    )
    schedule: Schedule = Field(
        "constant",
        description="student_share is kept, is reached linearly, or is reached in tenths, one whenever the held-out "
        "loss rises.",
    )
    replay_sequences: int = Field(
        0, ge=0, le=1_000_000, description="Student texts that are kept to be read again; 0: none is."
    )
    prompt_tokens: int = Field(32, ge=1, description="Tokens of a window that the student writes on from.")
    answer_tokens: int = Field(96, ge=1, description="Tokens that the student writes.")

    @model_validator(mode="after")
    def _fits_together(self) -> _Matching:
        if self.student_share > 0 and self.teacher_top_k is not None:
            raise ValueError("teacher_top_k is of the data's windows; the student's own text (student_share) is new")
        if self.student_share > 0 and self.prompt_tokens >= self.length_tokens:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} leave nothing of length_tokens {self.length_tokens}")
        if self.student_share == 0 and (self.replay_sequences or self.schedule != "constant"):
            raise ValueError("schedule and replay_sequences mean nothing without student_share")
        if self.alpha == 0 and (self.teacher_top_k is not None or dict(self.teachers) != {DENSE: 1.0}):
            raise ValueError("teachers and teacher_top_k mean nothing with alpha 0: there is cross-entropy alone")
        return self

    def needs_teacher(self) -> bool:
        """With alpha 0 there is cross-entropy alone."""
        return self.alpha > 0

    def can_cache(self) -> bool:
        """Text of the data is known before, the student's is not."""
        return self.needs_teacher() and self.student_share == 0

    def prompt_and_answer(self) -> tuple[int, int]:
        """None, if all text is of the data."""
        return (self.prompt_tokens, self.answer_tokens) if self.student_share > 0 else (0, 0)

    def teacher_temperature(self) -> float:
        """That of the objective."""
        return self.temperature

    def exam(self) -> Objective:
        """The same divergence."""
        return Objective(Divergence(self.divergence, self.mixing), self.temperature)

    def make_lesson(self, desk: Desk, seed: int) -> Lesson:
        """Text of the data, of the student, or of both."""
        return PrefixLesson(
            desk,
            seed,
            Objective(Divergence(self.divergence, self.mixing), self.temperature, self.alpha),
            share=self.student_share,
            schedule=self.schedule,
            replay=self.replay_sequences,
            prompt=self.prompt_tokens,
            answer=self.answer_tokens,
        )

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """As for all, and a pass of every token that the student writes, one at a time."""
        work = super().estimate(model, dense, calibration)
        written = self.student_share * self.updates * self.batch_sequences * self.answer_tokens
        if written == 0:
            return work
        length = self.prompt_tokens + self.answer_tokens
        return work.then(model.forward(int(written), length, self.batch_sequences, head=True))


class Logits(_Matching):
    """The student's next-token distribution nears the dense model's, on text of the data: forward KL."""

    name: ClassVar = "logits"
    paper: ClassVar = "Hinton et al. 2015, arXiv:1503.02531, section 2; forward KL per token."


class GKD(_Matching):
    """Half of the updates read what the student writes; generalised Jensen-Shannon divergence."""

    name: ClassVar = "gkd"
    paper: ClassVar = "Agarwal et al. 2023, arXiv:2306.13649, algorithm 1, eq. 1"

    divergence: DivergenceName = Field("jsd", description="What is lowered, p being the teacher, q the student.")
    student_share: float = Field(
        0.5, ge=0, le=1, description="Share of the updates that read text which the student writes itself: lambda."
    )


class DistiLLM(_Matching):
    """Skew KL; the share of student text rises only when the held-out loss does, and what was written is read again."""

    name: ClassVar = "distillm"
    paper: ClassVar = "Ko et al. 2024, arXiv:2402.03898, eq. 4, algorithm 1"

    divergence: DivergenceName = Field("skew_kl", description="What is lowered, p being the teacher, q the student.")
    mixing: float = Field(0.1, gt=0, lt=1, description="alpha of the skewed divergences, beta of `jsd`.")
    student_share: float = Field(
        1.0, ge=0, le=1, description="Largest share of the updates that read text which the student writes itself."
    )
    schedule: Schedule = Field(
        "adaptive",
        description="student_share is kept, is reached linearly, or is reached in tenths, one whenever the held-out "
        "loss rises.",
    )
    replay_sequences: int = Field(
        1000, ge=0, le=1_000_000, description="Student texts that are kept to be read again; 0: none is."
    )


class MiniLLM(Training):
    """Reverse KL over whole texts that the student writes, by its policy gradient, the teacher writing along."""

    name: ClassVar = "minillm"
    paper: ClassVar = "Gu et al. 2023, arXiv:2306.08543, eq. 3, 5 to 7, algorithm 1"

    learning_rate: float = Field(
        2e-4,
        gt=0,
        le=1,
        description="Peak learning rate. The default suits some million parameters; billions need 5e-6 to 5e-5.",
    )
    prompt_tokens: int = Field(32, ge=1, description="Tokens of a window that the student writes on from.")
    answer_tokens: int = Field(96, ge=2, description="Tokens that the student writes.")
    teacher_share: float = Field(0.2, ge=0, lt=1, description="Share of the teacher in what is sampled: alpha.")
    clip: float = Field(0.2, gt=0, lt=1, description="Bound of PPO on the change of a token's probability: epsilon.")
    reuse: int = Field(4, ge=1, le=1000, description="Updates that learn from the same text of the student.")
    entropy_weight: float = Field(1.0, ge=0, description="Weight of cross-entropy on text of the data; 0: none.")

    @model_validator(mode="after")
    def _fits_together(self) -> MiniLLM:
        if self.teacher_top_k is not None:
            raise ValueError("teacher_top_k is of the data's windows; what the student writes is new")
        if self.prompt_tokens >= self.length_tokens:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} leave nothing of length_tokens {self.length_tokens}")
        return self

    def can_cache(self) -> bool:
        """What the student writes is not known before."""
        return False

    def prompt_and_answer(self) -> tuple[int, int]:
        """What every rollout has."""
        return self.prompt_tokens, self.answer_tokens

    def exam(self) -> Objective:
        """Reverse KL, on text of the data."""
        return Objective(Divergence("reverse_kl"))

    def make_lesson(self, desk: Desk, seed: int) -> Lesson:
        """Text of the student, read several times."""
        return MiniLLMLesson(
            desk,
            seed,
            prompt=self.prompt_tokens,
            answer=self.answer_tokens,
            teacher_share=self.teacher_share,
            clip=self.clip,
            reuse=self.reuse,
            entropy_weight=self.entropy_weight,
        )

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """As for all, and a pass of every token that is written, one at a time, through student and teacher."""
        work = super().estimate(model, dense, calibration)
        written = self.updates * self.batch_sequences * self.answer_tokens // self.reuse
        length = self.prompt_tokens + self.answer_tokens
        return work.then(model.forward(written, length, self.batch_sequences, head=True).times(2))


class QAT(_Matching):
    """Trains a quantized model against its text: the grid stays, integers and scales move. No teacher."""

    name: ClassVar = "qat"
    paper: ClassVar = "Jacob et al. 2018, arXiv:1712.05877, section 3; Esser et al. 2020, arXiv:1902.08153, eq. 3"
    requires: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})

    alpha: float = Field(0.0, ge=0, le=1, description="Weight of the divergence; 1 - alpha weighs the cross-entropy.")


class QAD(_Matching):
    """Trains a quantized model against the dense one: the grid stays, integers and scales move."""

    name: ClassVar = "qad"
    paper: ClassVar = "Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, eq. 3; forward KL with the dense model as teacher"
    requires: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})
