"""How much of what compression costs hangs on the calibration: the same chain on other texts and with other seeds.

Williams and Aletras 2024 (arXiv:2311.09755) find that calibration data alone move the quality of one and the same
method by more than methods differ; a single run does not show that. Here the chain is computed again for every text and
seed of a grid, and each model is measured on the same held-out windows.

Shape legend: N = windows, T = tokens of a window, K = corpora, S = seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, sqrt
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.api import (
    CalibrationSources,
    Checkpoint,
    Context,
    Measured,
    ModelFacts,
    Quotient,
    Recalibration,
    Samples,
    Stage,
    StepError,
    Variant,
    Work,
)
from orchestrator_evaluation.forward import WindowEvaluator, load_float32, overlaps
from orchestrator_evaluation.kept_losses import KeptLosses, Losses
from orchestrator_evaluation.overlap import OVERLAP
from orchestrator_evaluation.perplexity import negative_log_likelihoods

if TYPE_CHECKING:
    import torch

_OF_A_TEXT = {
    "perplexity_ratio_mean": "perplexity / dense perplexity, geometric mean over the variants",
    "perplexity_ratio_min": "the same of the best variant",
    "perplexity_ratio_max": "the same of the worst variant",
    "perplexity_ratio_std": "standard deviation of the same over the variants",
    "perplexity_spread": "perplexity of the worst variant / that of the best, minus 1",
    "loss_mean": "what compression adds to the negative log-likelihood, mean over the variants, nats per token",
    "calibration_share": "share of loss_mean that the best variant does not have, 0 to 1: what is due to calibration",
    OVERLAP: "largest share of the runs of 13 tokens that a variant was calibrated or trained on, 0 to 1",
}
_OF_CORPORA = "standard deviation of what compression adds between texts (of their means over seeds), nats per token"
_OF_SEEDS = "standard deviation of what compression adds between seeds on the same text, nats per token"
_OF_A_CORPUS = "perplexity / dense perplexity of the models calibrated on {}, geometric mean over the seeds"
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Robustness(WindowEvaluator):
    """The spread of perplexity over calibration texts and seeds; every variant is the chain of the specification again.

    A seed takes the place of the specification's in every step of the chain, a text that of every calibrate step; what
    else steps read, such as the text of a distillation, stays. All variants are measured on the same windows. Models
    are made one at a time and not kept, measurements are: a further text or seed costs one more variant, a killed step
    goes on with the next one. Intervals are those of the windows; the variants are taken as they are.
    """

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "robustness"
    paper: ClassVar = "Williams and Aletras 2024, arXiv:2311.09755: the impact of calibration data on compression."
    metrics: ClassVar[Mapping[str, str]] = _OF_A_TEXT | {
        "loss_std_corpus": _OF_CORPORA,
        "loss_std_seed": _OF_SEEDS,
        "variants": "number of models measured: corpora x seeds",
    }
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = dict.fromkeys(
        (
            *(name for name in _OF_A_TEXT if name != OVERLAP),
            "loss_std_corpus",
            "loss_std_seed",
            "perplexity_ratio_on",
        ),
        "lower",
    )
    # About the recipe, not about the model that is released: no substitute for a gate on that.
    quality: ClassVar[bool] = False
    sampled: ClassVar[frozenset[str]] = frozenset({"perplexity_ratio_mean", "loss_mean"})

    corpora: CalibrationSources = Field(
        min_length=1,
        max_length=100,
        description="Calibration texts by name, the specification's own among them if it is to be compared. Every "
        "calibrate step draws from each as from its own.",
    )
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, max_length=100, description="Seeds that take the place of the specification's."
    )

    @model_validator(mode="after")
    def _some_variants(self) -> Robustness:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        if len(self.corpora) * len(self.seeds) < 2:
            raise ValueError("one text and one seed have no spread: name more corpora or seeds")
        return self

    def declared(self) -> Mapping[str, str]:
        """The metrics of every held-out text, those of every corpus on it, and the number of variants."""
        each = dict(_OF_A_TEXT)
        each |= {"loss_std_corpus": _OF_CORPORA} if len(self.corpora) > 1 else {}
        each |= {"loss_std_seed": _OF_SEEDS} if len(self.seeds) > 1 else {}
        named: dict[str, str] = {}
        for suffix in self._texts():
            behind = f"; text {suffix[1:]}" if suffix else ""
            named |= {f"{name}{suffix}": f"{what}{behind}" for name, what in each.items()}
            named |= {
                f"perplexity_ratio_on{suffix}.{corpus}": f"{_OF_A_CORPUS.format(corpus)}{behind}"
                for corpus in sorted(self.corpora)
            }
        return named | {"variants": self.metrics["variants"]}

    def reads_calibration(self) -> bool:
        """Texts are compared with the sets of the variants, not with the specification's."""
        return False

    def presupposed(self) -> Mapping[str, tuple[float, str]]:
        """Nothing: a text that is not held out is not measured at all."""
        return {}

    def recalibrations(self) -> Sequence[Recalibration]:
        """Every corpus with every seed."""
        return [
            Recalibration(f"{corpus}-{seed}", f"corpora.{corpus}", source, seed)
            for corpus, source in sorted(self.corpora.items())
            for seed in sorted(self.seeds)
        ]

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The dense model and then every variant, in float32, with the logits of one batch. Making them is not here."""
        whole = Work()
        for facts, times in ((dense, 1), (model, len(self.corpora) * len(self.seeds))):
            passing = self.passing(facts)
            held = facts.widened_bytes + passing.memory_bytes + 2 * self.chunk_bytes(facts)
            memory = max(facts.load_bytes(as_float32=True), held)
            once = replace(passing, memory_bytes=memory, moved_bytes=passing.moved_bytes + 3 * held)
            whole = whole.then(once.times(times))
        return whole

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        """Measure every variant. Raises `StepError` for too little text, a broken model, a text that is not held out.

        `candidate` itself is measured if one of the variants has its text and its seed.
        """
        texts = self.tokens_of_texts(baseline)
        count = len(context.variants)
        context.progress(0.0, "the dense model")
        dense = self._losses(baseline, texts)
        found: list[Losses] = []
        shares: dict[str, float] = {}
        for number, variant in enumerate(context.variants):
            losses, found_shares = self._measured(variant, texts, context, number / count, 1 / count)
            found.append(losses)
            shares = {name: max(share, shares.get(name, 0.0)) for name, share in found_shares.items()}
        metrics: dict[str, float] = {"variants": float(count)} | shares
        curves: dict[str, list[tuple[int, float]]] = {}
        samples = []
        for suffix, tokens_NT in texts.items():
            predicted = tokens_NT[:, 1:].numel()
            excess = [
                [after - before for before, after in zip(dense[suffix], losses[suffix], strict=True)]
                for losses in found
            ]
            grid = self._grid([sum(windows) / predicted for windows in excess])
            metrics |= self._metrics(suffix, grid)
            part = _samples(suffix, excess, tokens_NT.shape[1] - 1)
            metrics |= {name: part.value(name) for name in part.metrics}
            samples.append(part)
            if len(self.seeds) > 1:
                curves |= {
                    f"perplexity_ratio_on{suffix}.{corpus}_by_seed": [
                        (seed, exp(loss)) for seed, loss in zip(sorted(self.seeds), row, strict=True)
                    ]
                    for corpus, row in grid.items()
                }
        return Measured(metrics, curves, samples)

    def _grid(self, losses: Sequence[float]) -> dict[str, list[float]]:
        """What compression adds, nats per token: by corpus, of each seed in rising order."""
        seeds = len(self.seeds)
        return {corpus: list(losses[at * seeds : (at + 1) * seeds]) for at, corpus in enumerate(sorted(self.corpora))}

    def _metrics(self, suffix: str, grid: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """What follows from the losses of the variants on one text."""
        losses = [loss for row in grid.values() for loss in row]
        mean, best, worst = statistics.fmean(losses), min(losses), max(losses)
        metrics = {
            "perplexity_ratio_min": exp(best),
            "perplexity_ratio_max": exp(worst),
            "perplexity_ratio_std": statistics.stdev(map(exp, losses)),
            "perplexity_spread": exp(worst - best) - 1,
            # A compression that costs nothing has no loss of which a share could be due to anything.
            "calibration_share": (mean - max(best, 0.0)) / mean if mean > 0 else 0.0,
        }
        if len(grid) > 1:
            metrics["loss_std_corpus"] = statistics.stdev(map(statistics.fmean, grid.values()))
        if len(self.seeds) > 1:
            metrics["loss_std_seed"] = sqrt(statistics.fmean(map(statistics.variance, grid.values())))
        of_corpora = {
            f"perplexity_ratio_on{suffix}.{corpus}": exp(statistics.fmean(row)) for corpus, row in grid.items()
        }
        return {f"{name}{suffix}": value for name, value in metrics.items()} | of_corpora

    def _measured(
        self, variant: Variant, texts: Mapping[str, torch.Tensor], context: Context, begin: float, share: float
    ) -> tuple[Losses, dict[str, float]]:
        """The losses of one variant and its overlaps with the texts; kept from an earlier run, or measured."""
        name = variant.asked.name
        kept = KeptLosses.of(context.cache, variant, texts, self.batch)
        known = kept.read()
        if known is None:
            with variant.remade(_part(context, begin, 0.8 * share, name)) as made:
                shares = overlaps(texts, made.calibration, *context.trained_on)
                self.refuse_overlap(shares, f"what {name} was calibrated or trained on")
                context.progress(begin + 0.8 * share, f"{name}: measuring")
                known = self._losses(made.model, texts), shares
            kept.write(*known)
        losses, shares = known
        self.refuse_overlap(shares, f"what {name} was calibrated or trained on")
        for suffix, tokens_NT in texts.items():
            mean = sum(losses[suffix]) / tokens_NT[:, 1:].numel()
            if not mean < 700.0:  # exp overflows above; also false for NaN
                raise StepError(
                    f"the mean negative log-likelihood of the variant {name} is {mean}: it is broken",
                    remedy="look at its calibration text, and compress less",
                )
        context.progress(begin + share, f"{name}: measured")
        return losses, shares

    def _losses(self, checkpoint: Checkpoint, texts: Mapping[str, torch.Tensor]) -> Losses:
        """Return the negative log-likelihood of every window of every text, nats."""
        model = load_float32(checkpoint)
        return {
            suffix: [
                loss
                for start in range(0, len(tokens_NT), self.batch)
                for loss in negative_log_likelihoods(model, tokens_NT[start : start + self.batch])
            ]
            for suffix, tokens_NT in texts.items()
        }


def _samples(suffix: str, excess: Sequence[Sequence[float]], tokens: int) -> Samples:
    """Windows as units. excess: of every variant, what compression adds in each window, nats."""
    columns = {
        "mean_excess_nats": [statistics.fmean(variants) for variants in zip(*excess, strict=True)],
        "tokens": [float(tokens)] * len(excess[0]),
    }
    quotients = {
        f"loss_mean{suffix}": Quotient("mean_excess_nats", "tokens"),
        f"perplexity_ratio_mean{suffix}": Quotient("mean_excess_nats", "tokens", exponential=True),
    }
    return Samples("window", columns, quotients)


def _part(context: Context, begin: float, share: float, name: str) -> Callable[[float, str], None]:
    """Progress of making a variant as progress of the step."""
    return lambda fraction, message: context.progress(begin + share * fraction, f"{name}: {message}")
