"""The distillation loss and its gradient, in closed form.

Written out rather than left to autograd, so that no more than one chunk of float32 probabilities exists at a time.

Shape legend: P = positions, C = positions of a chunk, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Float32 numbers of a vocabulary-wide temporary: 64 MiB.
CHUNK_ELEMENTS = 1 << 24
# In the targets: this position has no next token.
NO_TARGET = -1


def loss_and_gradient(
    student_PV: torch.Tensor, teacher_PV: torch.Tensor, targets_P: torch.Tensor, temperature: float, alpha: float
) -> tuple[float, torch.Tensor]:
    """Return the loss and its gradient [P, V] by the student's logits (float32).

    loss = alpha T^2 mean of KL(softmax(teacher/T) || softmax(student/T))
           + (1 - alpha) mean of -ln softmax(student)[target]

    Hinton et al. 2015, arXiv:1503.02531, section 2.1, where the factor T^2 keeps gradients of one size. The gradient of
    its first term is alpha T (softmax(student/T) - softmax(teacher/T)) / P, of its second (1 - alpha)
    (softmax(student) - onehot(target)) / (number of targets). Positions with `NO_TARGET` are left out of the second.
    """
    import torch

    num_positions, num_vocabulary = student_PV.shape
    num_targets = max(1, int((targets_P != NO_TARGET).sum()))
    gradient_PV = torch.empty(num_positions, num_vocabulary, device=student_PV.device)
    loss = 0.0
    size = max(1, CHUNK_ELEMENTS // num_vocabulary)
    for start in range(0, num_positions, size):
        part = slice(start, start + size)
        student_CV = student_PV[part].detach().float()
        log_q_CV = (student_CV / temperature).log_softmax(-1)
        log_p_CV = (teacher_PV[part].detach().float() / temperature).log_softmax(-1)
        p_CV = log_p_CV.exp()
        divergence = float((p_CV * (log_p_CV - log_q_CV)).sum(dtype=torch.float64))
        loss += alpha * temperature**2 * divergence / num_positions
        gradient_CV = (log_q_CV.exp() - p_CV) * (alpha * temperature / num_positions)
        if alpha < 1:
            targets_C = targets_P[part]
            rows = (targets_C != NO_TARGET).nonzero().squeeze(-1)
            columns = targets_C[rows]
            log_s_CV = student_CV.log_softmax(-1)[rows]
            likelihood = float(log_s_CV.gather(-1, columns.unsqueeze(-1)).sum(dtype=torch.float64))
            loss -= (1 - alpha) * likelihood / num_targets
            share_CV = log_s_CV.exp()
            share_CV[torch.arange(len(rows), device=rows.device), columns] -= 1
            gradient_CV[rows] += share_CV * ((1 - alpha) / num_targets)
        gradient_PV[part] = gradient_CV
    return loss, gradient_PV


def mean_divergence(student_PV: torch.Tensor, teacher_PV: torch.Tensor) -> float:
    """Return the mean over positions of KL(teacher || student) at temperature 1, nats."""
    import torch

    num_positions, num_vocabulary = student_PV.shape
    total = 0.0
    size = max(1, CHUNK_ELEMENTS // num_vocabulary)
    for start in range(0, num_positions, size):
        log_q_CV = student_PV[start : start + size].float().log_softmax(-1)
        log_p_CV = teacher_PV[start : start + size].float().log_softmax(-1)
        total += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dtype=torch.float64))
    return total / num_positions
