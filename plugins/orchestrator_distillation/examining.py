"""Looking at a student from outside: its loss on windows that it never trains on, and whether it reads as teachers do.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, P = B x T positions, C = positions of a
chunk, V = vocabulary, R = positions with a next token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.api import Checkpoint, Context, StepError
from orchestrator_distillation.divergence import Divergence
from orchestrator_distillation.lesson import Desk, next_tokens
from orchestrator_distillation.objective import NO_TARGET, Objective
from orchestrator_distillation.teachers import windows_of

if TYPE_CHECKING:
    import torch


# Tokenizers with one vocabulary may still cut otherwise: other merges, other rules for digits, spaces and marks.
_PROBE = "The 1,234 quick (brown) foxes don't jump; they'd  rather   read_docs!\n\tdef naïve(x): return x ** 2 # été\n"


class Examiner:
    """Measures the student on the held-out windows: the divergence that chooses, and the forward KL.

    Both at the temperature of `objective`, at which the teacher speaks; without T^2. Without a teacher: cross-entropy.
    """

    def __init__(self, desk: Desk, held_out_NT: torch.Tensor, objective: Objective, with_teacher: bool) -> None:
        self._desk, self._tokens_NT, self._with_teacher = desk, held_out_NT, with_teacher
        self._objective = objective
        self._kl = Objective(Divergence("forward_kl"), objective.temperature)

    def measure(self) -> Mapping[str, float]:
        """Return `loss`, and `kl` if there is a teacher, in nats per token."""
        import torch

        total = {"loss": 0.0, "kl": 0.0}
        count = targets = 0
        for numbers_B in windows_of(self._tokens_NT, self._desk.at_once):
            tokens_BT = self._tokens_NT[numbers_B].to(self._desk.student.model.device)
            said = None
            if self._with_teacher:
                heard = self._desk.cache.listen(numbers_B) if self._desk.cache else self._desk.listen(None, tokens_BT)
                assert heard is not None
                said = heard
            targets_P = next_tokens(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool)).flatten()
            for part, logits_CV in self._desk.student.logits_of(tokens_BT):
                rows_C = torch.arange(part.start, part.start + len(logits_CV), device=logits_CV.device)
                targets_C = targets_P[rows_C]
                if said is None:
                    rows = (targets_C != NO_TARGET).nonzero().squeeze(-1)
                    log_q_RV = logits_CV[rows].log_softmax(-1)
                    total["loss"] -= float(log_q_RV.gather(-1, targets_C[rows].unsqueeze(-1)).sum(dtype=torch.float64))
                    targets += len(rows)
                    continue
                chunk = said.at(rows_C)
                kl_C, _ = self._kl.divergence_and_gradient(logits_CV, chunk)
                same = self._objective.divergence == self._kl.divergence
                loss_C = kl_C if same else self._objective.divergence_and_gradient(logits_CV, chunk)[0]
                total["kl"] += float(kl_C.sum(dtype=torch.float64))
                total["loss"] += float(loss_C.sum(dtype=torch.float64))
                count += len(rows_C)
        if not self._with_teacher:
            return {"loss": total["loss"] / max(1, targets)}
        return {name: value / count for name, value in total.items()}


def require_one_tokenizer(context: Context, teachers: list[Checkpoint]) -> None:
    """Raise `StepError` if a teacher other than the dense model reads text in other tokens than the student."""
    others = [teacher for teacher in teachers if teacher.path != context.dense.path]
    if not others:
        return
    own = context.dense.load_tokenizer()
    for teacher in others:
        theirs = teacher.load_tokenizer()
        if own.get_vocab() == theirs.get_vocab() and own(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"]:
            raise StepError(
                f"student and teacher {teacher.path.name} cut text into other tokens, though they know the same ones",
                remedy="use a teacher of the student's family",
            )
        if own.get_vocab() != theirs.get_vocab():
            strange = sorted(own.get_vocab().items() ^ theirs.get_vocab().items())[0]
            raise StepError(
                f"student and teacher {teacher.path.name} have different tokenizers: token {strange[0]!r} is"
                f" {theirs.get_vocab().get(strange[0], 'unknown')} to the teacher,"
                f" {own.get_vocab().get(strange[0], 'unknown')} to the student",
                remedy="use a teacher of the student's family",
            )
