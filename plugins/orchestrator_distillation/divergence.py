"""Divergences between the teacher's and the student's next-token distributions, with their slopes in closed form.

p is the teacher's distribution, q the student's, m a mixture of both:

| name              | D(p, q)                         | m             | source                                |
|-------------------|---------------------------------|---------------|---------------------------------------|
| `forward_kl`      | KL(p || q)                      |               | Hinton et al., arXiv:1503.02531       |
| `reverse_kl`      | KL(q || p)                      |               | MiniLLM, arXiv:2306.08543, eq. 1      |
| `jsd`             | b KL(p || m) + (1-b) KL(q || m) | b p + (1-b) q | GKD, arXiv:2306.13649, eq. 1          |
| `skew_kl`         | KL(p || m)                      | a p + (1-a) q | DistiLLM, arXiv:2402.03898, eq. 4     |
| `skew_reverse_kl` | KL(q || m)                      | (1-a) p + a q | the same, section 3.1                 |

The gradient by the student's logits z of any D is q (h - sum q h), where h is dD/dq up to a constant, because q is a
softmax of z. Arithmetic is in logarithms, so that probabilities may underflow.

Shape legend: C = positions, K = outcomes (the vocabulary, or some tokens and all others together).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
MIXING = ("jsd", "skew_kl", "skew_reverse_kl")


@dataclass(frozen=True)
class Divergence:
    """One of the five. mixing: b of `jsd`, a of the skewed ones, in (0, 1); the two KL divergences have none."""

    name: DivergenceName = "forward_kl"
    mixing: float = 0.5

    def value_and_gradient(self, log_p_CK: torch.Tensor, log_q_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return D [C], nats, and dD/dz [C, K] by the student's logits, from log-probabilities."""
        p_CK, q_CK = log_p_CK.exp(), log_q_CK.exp()
        if self.name == "forward_kl":  # h = -p/q, so the gradient is q - p, whatever has underflowed
            return (p_CK * (log_p_CK - log_q_CK)).sum(-1), q_CK - p_CK
        if self.name == "reverse_kl":
            slope_CK = log_q_CK - log_p_CK
            value_C = (q_CK * slope_CK).sum(-1)
        elif self.name == "jsd":
            b = self.mixing
            log_m_CK = _log_mixture(log_p_CK, log_q_CK, b)
            slope_CK = (1 - b) * (log_q_CK - log_m_CK)
            value_C = b * (p_CK * (log_p_CK - log_m_CK)).sum(-1) + (q_CK * slope_CK).sum(-1)
        elif self.name == "skew_kl":
            ratio_CK = log_p_CK - _log_mixture(log_p_CK, log_q_CK, self.mixing)
            value_C = (p_CK * ratio_CK).sum(-1)
            slope_CK = (self.mixing - 1) * ratio_CK.exp()
        else:
            ratio_CK = log_q_CK - _log_mixture(log_p_CK, log_q_CK, 1 - self.mixing)
            value_C = (q_CK * ratio_CK).sum(-1)
            slope_CK = ratio_CK - self.mixing * ratio_CK.exp()
        weighted_CK = q_CK * slope_CK
        return value_C, weighted_CK - q_CK * weighted_CK.sum(-1, keepdim=True)


def _log_mixture(log_p_CK: torch.Tensor, log_q_CK: torch.Tensor, share: float) -> torch.Tensor:
    """Return ln(share p + (1 - share) q)."""
    import torch

    return torch.logaddexp(log_p_CK + math.log(share), log_q_CK + math.log1p(-share))
