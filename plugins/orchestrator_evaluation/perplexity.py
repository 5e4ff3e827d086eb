"""Perplexity per token on held-out text.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, C = tokens of a chunk, V = vocabulary.
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
    from transformers import PreTrainedModel


class Perplexity(WindowEvaluator):
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    The first token of a window is context only: a window of T tokens has T - 1 predictions.
    """

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "perplexity"
    paper: ClassVar = "Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks."
    metrics: ClassVar[Mapping[str, str]] = {
        "perplexity": "perplexity per token of the compressed model",
        "dense_perplexity": "perplexity per token of the dense model on the same windows",
        "perplexity_ratio": "perplexity / dense_perplexity",
        "perplexity_tokens": "number of predicted tokens",
    }

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """One model after the other, in float32, with the logits of one batch."""
        whole = Work()
        for facts in (dense, model):
            passing = self.passing(facts)
            held = facts.widened_bytes + passing.memory_bytes + 2 * self.chunk_bytes(facts)
            memory = max(facts.load_bytes(as_float32=True), held)
            whole = whole.then(replace(passing, memory_bytes=memory, moved_bytes=passing.moved_bytes + 3 * held))
        return whole

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        """Measure both models on the same windows. Raises `StepError` for too little text or a broken model."""
        tokens_NT = self.tokens_NT(baseline)
        log_perplexity = []
        for index, (what, checkpoint) in enumerate((("dense", baseline), ("compressed", candidate))):
            model = load_float32(checkpoint)
            total = 0.0
            for start in range(0, len(tokens_NT), self.batch):
                total += negative_log_likelihood(model, tokens_NT[start : start + self.batch])
                done = min(start + self.batch, len(tokens_NT))
                context.progress((index + done / len(tokens_NT)) / 2, f"{what}: window {done} of {len(tokens_NT)}")
            del model
            log_perplexity.append(total / tokens_NT[:, 1:].numel())
            if not log_perplexity[-1] < 700.0:  # exp overflows above; also false for NaN
                raise StepError(
                    f"the {what} model's mean negative log-likelihood is {log_perplexity[-1]}: it is broken",
                    remedy="look at the metrics of the steps before, and compress less",
                )
        dense, compressed = log_perplexity
        return {
            "perplexity": math.exp(compressed),
            "dense_perplexity": math.exp(dense),
            "perplexity_ratio": math.exp(compressed - dense),
            "perplexity_tokens": float(tokens_NT[:, 1:].numel()),
        }


def negative_log_likelihood(model: PreTrainedModel, tokens_BT: torch.Tensor) -> float:
    """Return the sum of -ln p(token | tokens before it), nats, over all but the first token of each window."""
    import torch

    logits_BTV = logits_of(model, tokens_BT)[:, :-1]
    targets_BT = tokens_BT[:, 1:].to(logits_BTV.device)
    total = 0.0
    for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True):
        for part in chunks(len(targets_T), logits_TV.shape[-1]):
            loss_C = torch.nn.functional.cross_entropy(logits_TV[part], targets_T[part], reduction="none")
            total += float(loss_C.double().sum())
    return total
