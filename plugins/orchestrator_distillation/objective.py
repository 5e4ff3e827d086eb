"""What the student's logits at some positions cost, and the gradient: a divergence from the teacher, and cross-entropy.

Written out rather than left to autograd, so that no more than one chunk of float32 probabilities exists at a time.

The teacher's distribution is given over the whole vocabulary, or by the logarithms of its K largest probabilities and
of their tail, the mass of all other tokens. With a tail the divergence is the one between distributions over K + 1
outcomes: it is a lower bound of the whole one (data processing inequality), zero exactly if those are equal, and its
gradient moves all tokens of the tail alike.

Shape legend: C = positions of a chunk, V = vocabulary, K = tokens that the teacher names, K1 = K + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator_distillation.divergence import Divergence

if TYPE_CHECKING:
    import torch

# In the targets: this position has no next token, or one that does not count.
NO_TARGET = -1
# Float32 numbers of a vocabulary-wide temporary: 16 MiB.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TeacherChunk:
    """The teacher's distribution at some positions, at the temperature of the objective.

    log_p: [C, V]; or [C, K1], the last column being the tail, where ids_CK names the tokens of the others.
    """

    log_p: torch.Tensor
    ids_CK: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """alpha T^2 mean D(softmax(teacher/T), softmax(student/T)) + (1 - alpha) mean -ln softmax(student)[target].

    Hinton et al. 2015, arXiv:1503.02531, section 2.1, for any divergence; T^2 keeps gradients of one size.
    """

    divergence: Divergence
    temperature: float = 1.0
    alpha: float = 1.0

    def loss_and_gradient(
        self,
        student_CV: torch.Tensor,
        teacher: TeacherChunk | None,
        targets_C: torch.Tensor,
        positions: int,
        targets: int,
    ) -> tuple[float, torch.Tensor]:
        """Return these positions' part of the loss, nats, and its gradient [C, V] by the student's logits (float32).

        teacher: may be None if alpha is 0. positions, targets: the numbers that the two means are taken over, of all
        chunks. Positions whose target is `NO_TARGET` have no cross-entropy.
        """
        import torch

        student_CV = student_CV.detach().float()
        loss, gradient_CV = 0.0, None
        if self.alpha > 0:
            assert teacher is not None
            value_C, gradient_CV = self.divergence_and_gradient(student_CV, teacher)
            loss += self.alpha * self.temperature**2 * float(value_C.sum(dtype=torch.float64)) / positions
            gradient_CV *= self.alpha * self.temperature / positions
        if self.alpha < 1:
            rows = (targets_C != NO_TARGET).nonzero().squeeze(-1)
            columns = targets_C[rows]
            log_q_RV = student_CV[rows].log_softmax(-1)
            likelihood = float(log_q_RV.gather(-1, columns.unsqueeze(-1)).sum(dtype=torch.float64))
            loss -= (1 - self.alpha) * likelihood / max(1, targets)
            share_RV = log_q_RV.exp_()
            share_RV[torch.arange(len(rows), device=rows.device), columns] -= 1
            share_RV *= (1 - self.alpha) / max(1, targets)
            if gradient_CV is None:
                gradient_CV = torch.zeros_like(student_CV)
            gradient_CV[rows] += share_RV
        assert gradient_CV is not None
        return loss, gradient_CV

    def divergence_and_gradient(
        self, student_CV: torch.Tensor, teacher: TeacherChunk
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return D [C] at each position, nats, and its gradient [C, V] by student/T."""
        log_q_CV = (student_CV if self.temperature == 1 else student_CV / self.temperature).log_softmax(-1)
        if teacher.ids_CK is None:
            return self.divergence.value_and_gradient(teacher.log_p, log_q_CV)
        log_q_CK1 = _with_tail(log_q_CV, teacher.ids_CK)
        value_C, gradient_CK1 = self.divergence.value_and_gradient(teacher.log_p, log_q_CK1)
        # What moves the tail moves each of its tokens by its share of the tail.
        share_CV = log_q_CV.sub_(log_q_CK1[:, -1:]).exp_()
        gradient_CV = share_CV.mul_(gradient_CK1[:, -1:])
        return value_C, gradient_CV.scatter_(-1, teacher.ids_CK, gradient_CK1[:, :-1])


def _with_tail(log_q_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [C, K1] of the tokens `ids_CK`, and of all others together."""
    import torch

    tail_C1 = log_q_CV.scatter(-1, ids_CK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_q_CV.gather(-1, ids_CK), tail_C1], dim=-1)


def top_and_tail(log_p_CV: torch.Tensor, count: int) -> TeacherChunk:
    """Return the `count` largest of the log-probabilities, in falling order, and the tail of all others."""
    import torch

    top_CK, ids_CK = log_p_CV.topk(count, dim=-1)
    tail_C1 = log_p_CV.scatter(-1, ids_CK, float("-inf")).logsumexp(-1, keepdim=True)
    return TeacherChunk(torch.cat([top_CK, tail_C1], dim=-1), ids_CK)
