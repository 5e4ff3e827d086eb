"""How far the compressed model's predictions are from the dense model's.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, P = all positions, C = positions of a
chunk, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.api import (
    Checkpoint,
    Context,
    Measured,
    ModelFacts,
    Quantile,
    Quotient,
    Samples,
    Stage,
    StepError,
    Work,
)
from orchestrator_evaluation.forward import WindowEvaluator, chunks, load_float32, logits_of
from orchestrator_evaluation.overlap import OVERLAP_METRIC

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Fidelity(WindowEvaluator):
    """KL divergence and top-1 agreement between the next-token distributions of both models, at every position."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "fidelity"
    paper: ClassVar = "Kullback and Leibler 1951; per token as in arXiv:2407.09141, 'Accuracy is Not All You Need'."
    metrics: ClassVar[Mapping[str, str]] = {
        "kl_mean": "mean over positions of KL(dense || compressed), nats",
        "kl_p99": "99th percentile over positions (nearest rank) of KL(dense || compressed), nats",
        "top1_agreement": "share of positions where both models' likeliest token is the same, 0 to 1",
        "top1_flips": "share of positions where it is not the same: 1 - top1_agreement",
        "fidelity_tokens": "number of positions compared",
        **OVERLAP_METRIC,
    }
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        "kl_mean": "lower",
        "kl_p99": "lower",
        "top1_agreement": "higher",
        "top1_flips": "lower",
    }
    sampled: ClassVar[frozenset[str]] = frozenset({"kl_mean", "kl_p99", "top1_agreement", "top1_flips"})

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Both models in float32, with the logits of one batch of each."""
        passing = self.passing(dense)
        held = dense.widened_bytes + model.float32_bytes + 2 * passing.memory_bytes + 4 * self.chunk_bytes(dense)
        memory = max(held, dense.float32_bytes + model.load_bytes(as_float32=True))
        twice = passing.then(self.passing(model))
        return replace(twice, memory_bytes=memory, moved_bytes=twice.moved_bytes + 3 * held)

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        """Run both models once over every window. Raises `StepError` for too little text or unlike vocabularies."""
        texts, metrics = self.windows_of_texts(baseline, context)
        dense, compressed = load_float32(baseline), load_float32(candidate)
        windows, done = sum(map(len, texts.values())), 0
        samples = []
        for suffix, tokens_NT in texts.items():
            flips: list[int] = []
            divergences: list[torch.Tensor] = []
            for start in range(0, len(tokens_NT), self.batch):
                for kl_T, flipped in _compared(dense, compressed, tokens_NT[start : start + self.batch]):
                    divergences.append(kl_T)
                    flips.append(flipped)
                context.progress((done + len(flips)) / windows, f"window {done + len(flips)} of {windows}")
            done += len(flips)
            part = _samples(suffix, divergences, flips, tokens_NT.shape[1])
            metrics |= {name: part.value(name) for name in part.metrics}
            metrics[f"fidelity_tokens{suffix}"] = float(tokens_NT.numel())
            samples.append(part)
        return Measured(metrics, samples=samples)


def _compared(
    dense: PreTrainedModel, compressed: PreTrainedModel, tokens_BT: torch.Tensor
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield, for each window, the divergence [T], nats, float64, and the number of flips."""
    import torch

    dense_BTV = logits_of(dense, tokens_BT)
    compressed_BTV = logits_of(compressed, tokens_BT).to(dense_BTV.device)
    if dense_BTV.shape != compressed_BTV.shape:
        raise StepError(
            f"the dense model scores {dense_BTV.shape[2]} tokens, the compressed one {compressed_BTV.shape[2]}",
            remedy="compare models with one vocabulary",
        )
    for dense_TV, compressed_TV in zip(dense_BTV, compressed_BTV, strict=True):
        parts: list[torch.Tensor] = []
        flipped = 0
        for part in chunks(*dense_TV.shape):
            parts.append(kl_divergence(dense_TV[part], compressed_TV[part]).cpu())
            flipped += int((dense_TV[part].argmax(-1) != compressed_TV[part].argmax(-1)).sum())
        kl_T = torch.cat(parts).double()
        if not bool(kl_T.isfinite().all()):
            raise StepError(
                "the KL divergence is not finite: one of the models is broken",
                remedy="look at the metrics of the steps before, and compress less",
            )
        yield kl_T, flipped


def _samples(suffix: str, divergences: Sequence[torch.Tensor], flips: Sequence[int], positions: int) -> Samples:
    """Windows as units. divergences: of each window [T], nats, float64."""
    columns: dict[str, Sequence[float]] = {
        "kl_nats": [float(kl_T.sum()) for kl_T in divergences],
        "flips": flips,
        "agreeing": [positions - flipped for flipped in flips],
        "positions": [positions] * len(flips),
    }
    quotients = {
        f"kl_mean{suffix}": Quotient("kl_nats", "positions"),
        f"top1_flips{suffix}": Quotient("flips", "positions"),
        f"top1_agreement{suffix}": Quotient("agreeing", "positions"),
    }
    tails = {f"kl_p99{suffix}": Quantile.of(0.99, "positions", [kl_T.numpy() for kl_T in divergences])}
    return Samples("window", columns, quotients, tails)


def kl_divergence(reference_CV: torch.Tensor, other_CV: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || other) [C], nats, of the distributions that these float32 logits stand for.

    Rounding can make the sum of a near-zero divergence slightly negative; such a sum is returned as 0.
    """
    log_p_CV = reference_CV.log_softmax(-1)
    log_q_CV = other_CV.log_softmax(-1)
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1).clamp(min=0)
