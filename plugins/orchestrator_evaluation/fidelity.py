"""How far the compressed model's predictions are from the dense model's.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, P = all positions, C = positions of a
chunk, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from orchestrator.api import Checkpoint, Context, ModelFacts, Stage, StepError, Work
from orchestrator_evaluation.forward import WindowEvaluator, chunks, load_float32, logits_of

if TYPE_CHECKING:
    import torch


class Fidelity(WindowEvaluator):
    """KL divergence and top-1 agreement between the next-token distributions of both models, at every position."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "fidelity"
    paper: ClassVar = "Kullback and Leibler 1951; per token as in arXiv:2407.09141, 'Accuracy is Not All You Need'."
    metrics: ClassVar[Mapping[str, str]] = {
        "kl_mean": "mean over positions of KL(dense || compressed), nats",
        "kl_p99": "99th percentile over positions (nearest rank) of KL(dense || compressed), nats",
        "top1_agreement": "share of positions where both models' likeliest token is the same, 0 to 1",
        "fidelity_tokens": "number of positions compared",
    }

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Both models in float32, with the logits of one batch of each."""
        passing = self.passing(dense)
        held = dense.widened_bytes + model.float32_bytes + 2 * passing.memory_bytes + 4 * self.chunk_bytes(dense)
        memory = max(held, dense.float32_bytes + model.load_bytes(as_float32=True))
        twice = passing.then(self.passing(model))
        return replace(twice, memory_bytes=memory, moved_bytes=twice.moved_bytes + 3 * held)

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        """Run both models once over every window. Raises `StepError` for too little text or unlike vocabularies."""
        import torch

        tokens_NT = self.tokens_NT(baseline)
        dense, compressed = load_float32(baseline), load_float32(candidate)
        parts_C: list[torch.Tensor] = []
        agreeing = 0
        for start in range(0, len(tokens_NT), self.batch):
            tokens_BT = tokens_NT[start : start + self.batch]
            dense_PV = logits_of(dense, tokens_BT).flatten(0, 1)
            compressed_PV = logits_of(compressed, tokens_BT).flatten(0, 1).to(dense_PV.device)
            if dense_PV.shape != compressed_PV.shape:
                raise StepError(
                    f"the dense model scores {dense_PV.shape[1]} tokens, the compressed one {compressed_PV.shape[1]}",
                    remedy="compare models with one vocabulary",
                )
            for part in chunks(*dense_PV.shape):
                parts_C.append(kl_divergence(dense_PV[part], compressed_PV[part]).cpu())
                agreeing += int((dense_PV[part].argmax(-1) == compressed_PV[part].argmax(-1)).sum())
            done = min(start + self.batch, len(tokens_NT))
            context.progress(done / len(tokens_NT), f"window {done} of {len(tokens_NT)}")
        kl_P = torch.cat(parts_C).double().sort().values
        if not bool(kl_P.isfinite().all()):
            raise StepError(
                "the KL divergence is not finite: one of the models is broken",
                remedy="look at the metrics of the steps before, and compress less",
            )
        return {
            "kl_mean": float(kl_P.mean()),
            "kl_p99": float(kl_P[math.ceil(0.99 * len(kl_P)) - 1]),
            "top1_agreement": agreeing / len(kl_P),
            "fidelity_tokens": float(len(kl_P)),
        }


def kl_divergence(reference_CV: torch.Tensor, other_CV: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || other) [C], nats, of the distributions that these float32 logits stand for.

    Rounding can make the sum of a near-zero divergence slightly negative; such a sum is returned as 0.
    """
    log_p_CV = reference_CV.log_softmax(-1)
    log_q_CV = other_CV.log_softmax(-1)
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1).clamp(min=0)
