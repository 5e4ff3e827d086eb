"""Perplexity per token on held-out text.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, C = tokens of a chunk, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.api import Checkpoint, Context, Measured, ModelFacts, Quotient, Samples, Stage, StepError, Work
from orchestrator_evaluation.forward import WindowEvaluator, chunks, load_float32, logits_of
from orchestrator_evaluation.overlap import OVERLAP_METRIC

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Perplexity(WindowEvaluator):
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    The first token of a window is context only: a window of T tokens has T - 1 predictions. Windows are the units of
    intervals.
    """

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "perplexity"
    paper: ClassVar = "Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks."
    metrics: ClassVar[Mapping[str, str]] = {
        "perplexity": "perplexity per token of the compressed model",
        "dense_perplexity": "perplexity per token of the dense model on the same windows",
        "perplexity_ratio": "perplexity / dense_perplexity",
        "perplexity_tokens": "number of predicted tokens",
        **OVERLAP_METRIC,
    }

    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"perplexity": "lower"}
    sampled: ClassVar[frozenset[str]] = frozenset({"perplexity", "dense_perplexity", "perplexity_ratio"})

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """One model after the other, in float32, with the logits of one batch."""
        whole = Work()
        for facts in (dense, model):
            passing = self.passing(facts)
            held = facts.widened_bytes + passing.memory_bytes + 2 * self.chunk_bytes(facts)
            memory = max(facts.load_bytes(as_float32=True), held)
            whole = whole.then(replace(passing, memory_bytes=memory, moved_bytes=passing.moved_bytes + 3 * held))
        return whole

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        """Measure both models on the same windows. Raises `StepError` for too little text or a broken model."""
        texts, metrics = self.windows_of_texts(baseline, context)
        dense, compressed = (
            self._losses(what, checkpoint, texts, context, half)
            for half, what, checkpoint in ((0, "dense", baseline), (1, "compressed", candidate))
        )
        samples = []
        for suffix, tokens_NT in texts.items():
            part = _samples(suffix, dense[suffix], compressed[suffix], tokens_NT.shape[1] - 1)
            metrics |= {name: part.value(name) for name in part.quotients}
            metrics[f"perplexity_tokens{suffix}"] = float(tokens_NT[:, 1:].numel())
            samples.append(part)
        return Measured(metrics, samples=samples)

    def _losses(
        self, what: str, checkpoint: Checkpoint, texts: Mapping[str, torch.Tensor], context: Context, half: int
    ) -> dict[str, list[float]]:
        """Return the negative log-likelihood of every window of every text, nats."""
        model = load_float32(checkpoint)
        windows, done = sum(map(len, texts.values())), 0
        losses: dict[str, list[float]] = {}
        for suffix, tokens_NT in texts.items():
            found = losses[suffix] = []
            for start in range(0, len(tokens_NT), self.batch):
                found += negative_log_likelihoods(model, tokens_NT[start : start + self.batch])
                context.progress(
                    (half + (done + len(found)) / windows) / 2, f"{what}: window {done + len(found)} of {windows}"
                )
            done += len(found)
            mean = sum(found) / tokens_NT[:, 1:].numel()
            if not mean < 700.0:  # exp overflows above; also false for NaN
                raise StepError(
                    f"the {what} model's mean negative log-likelihood is {mean}: it is broken",
                    remedy="look at the metrics of the steps before, and compress less",
                )
        return losses


def _samples(suffix: str, dense: Sequence[float], compressed: Sequence[float], tokens: int) -> Samples:
    """Windows as units: nats of each model and of their difference, which is exact where the models agree."""
    columns = {
        "nats": compressed,
        "dense_nats": dense,
        "excess_nats": [after - before for before, after in zip(dense, compressed, strict=True)],
        "tokens": [tokens] * len(dense),
    }
    quotients = {
        f"perplexity{suffix}": Quotient("nats", "tokens", exponential=True),
        f"dense_perplexity{suffix}": Quotient("dense_nats", "tokens", exponential=True),
        f"perplexity_ratio{suffix}": Quotient("excess_nats", "tokens", exponential=True),
    }
    return Samples("window", columns, quotients)


def negative_log_likelihoods(model: PreTrainedModel, tokens_BT: torch.Tensor) -> list[float]:
    """Return the sum of -ln p(token | tokens before it), nats, over all but the first token, for each window."""
    import torch

    logits_BTV = logits_of(model, tokens_BT)[:, :-1]
    targets_BT = tokens_BT[:, 1:].to(logits_BTV.device)
    losses = []
    for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True):
        total = 0.0
        for part in chunks(len(targets_T), logits_TV.shape[-1]):
            loss_C = torch.nn.functional.cross_entropy(logits_TV[part], targets_T[part], reduction="none")
            total += float(loss_C.double().sum())
        losses.append(total)
    return losses
