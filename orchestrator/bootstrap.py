"""How sure a measured number is: the paired bootstrap over what it was measured on.

Every number that gets an interval here is a quotient of sums over units, a window of text or a question: a mean
log-likelihood, a share of flips, an accuracy, or the ratio of two of them. Both models are measured on the same units,
and a resample draws units, so what makes a unit hard for both cancels in ratios and differences. Tokens within a window
are not independent; windows as units keep that from making an interval too narrow.

Intervals are BCa, bias-corrected and accelerated (Efron 1987, "Better Bootstrap Confidence Intervals", JASA 82), by the
formulas 14.9, 14.10, 14.14 and 14.15 (acceleration by the jackknife) of Efron and Tibshirani 1993. They see only
what was measured: where all units agree the interval is a point.

Shape legend: N = units, R = resamples, C = resamples of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Statistic = Callable[[Mapping[str, Floats]], Floats]

RESAMPLES = 10_000
CONFIDENCE = 0.95  # where nothing else is asked for
FEWEST_UNITS = 10  # with fewer, an interval says more about the few than about the model
_CHUNK_ELEMENTS = 1 << 20  # indices drawn at once: 8 MiB, and as much for each column gathered


@dataclass(frozen=True)
class Quotient:
    """sum(numerator) / sum(denominator) of columns over units; exponential: exp of that, e.g. a perplexity."""

    numerator: str
    denominator: str
    exponential: bool = False


@dataclass(frozen=True)
class Samples:
    """What was counted in each unit of one text or task, of both models on the same units.

    unit: what a unit is, for people: "window". columns: by name, one number for each unit, all of one length.
    quotients: by metric, how it follows from the columns.
    """

    unit: str
    columns: Mapping[str, Sequence[float]]
    quotients: Mapping[str, Quotient]

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(next(iter(self.columns.values())))

    def as_dict(self) -> dict[str, Any]:
        """The samples as JSON values."""
        return {
            "unit": self.unit,
            "columns": {name: list(values) for name, values in self.columns.items()},
            "quotients": {metric: asdict(quotient) for metric, quotient in self.quotients.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Samples:
        """Read what `as_dict` gave."""
        quotients = {metric: Quotient(**quotient) for metric, quotient in values["quotients"].items()}
        return cls(values["unit"], values["columns"], quotients)

    def faults(self, metrics: Mapping[str, float]) -> list[str]:
        """What is wrong with the samples of these metrics: unlike lengths, unknown columns, another value."""
        lengths = sorted({len(values) for values in self.columns.values()})
        if len(lengths) != 1 or not lengths[0]:
            return [f"columns of {lengths} units"]
        faults = []
        for metric, quotient in self.quotients.items():
            unknown = {quotient.numerator, quotient.denominator} - self.columns.keys()
            if unknown or metric not in metrics:
                faults.append(f"{metric} of {sorted(unknown) or 'no metric'}")
                continue
            value = self.value(metric)
            if not abs(value - metrics[metric]) <= 1e-9 + 1e-6 * abs(value):
                faults.append(f"{metric} is {metrics[metric]:.9g}, but its samples give {value:.9g}")
        return faults

    def value(self, metric: str) -> float:
        """The metric as it follows from all units."""
        return float(quotient_of(self.quotients[metric])(self._sums())[0])

    def interval(self, metric: str, confidence: float, seed: int) -> tuple[float, float]:
        """Return the ends of the metric's interval."""
        quotient = self.quotients[metric]
        drawn = _Drawn(self, (quotient.numerator, quotient.denominator), seed)
        return drawn.interval(quotient_of(quotient), confidence)

    def intervals(self, confidence: float, seed: int) -> dict[str, tuple[float, float]]:
        """Return the intervals of all metrics, as `interval` does, from one drawing of units."""
        drawn = _Drawn(self, tuple(self.columns), seed)
        return {
            metric: drawn.interval(quotient_of(quotient), confidence) for metric, quotient in self.quotients.items()
        }

    def difference(self, metric: str, other: str, confidence: float, seed: int) -> tuple[float, float]:
        """Return the ends of the interval of metric - other, both taken from the same resampled units."""
        pair = [self.quotients[name] for name in (metric, other)]
        first, second = map(quotient_of, pair)
        columns = dict.fromkeys(name for quotient in pair for name in (quotient.numerator, quotient.denominator))
        return _Drawn(self, tuple(columns), seed).interval(lambda sums: first(sums) - second(sums), confidence)

    def _sums(self) -> dict[str, Floats]:
        import numpy as np

        return {name: np.asarray(values, np.float64).sum(keepdims=True) for name, values in self.columns.items()}


class _Drawn:
    """Sums of columns: over all units, over all but one [N], and over `RESAMPLES` draws of N units [R]."""

    def __init__(self, samples: Samples, names: Sequence[str], seed: int) -> None:
        import numpy as np

        columns_N = {name: np.asarray(samples.columns[name], np.float64) for name in names}
        self._whole = {name: values_N.sum(keepdims=True) for name, values_N in columns_N.items()}
        self._without_one_N = {name: self._whole[name] - values_N for name, values_N in columns_N.items()}
        self._resampled_R = _resampled_sums(columns_N, seed)

    def interval(self, statistic: Statistic, confidence: float) -> tuple[float, float]:
        value = float(statistic(self._whole)[0])
        return bca(value, statistic(self._resampled_R), statistic(self._without_one_N), confidence)


def quotient_of(quotient: Quotient) -> Statistic:
    """The quotient as a function of sums of columns. 0 / 0 is 1, as of two models that both get nothing right."""

    def of(sums: Mapping[str, Floats]) -> Floats:
        import numpy as np

        above, below = np.broadcast_arrays(sums[quotient.numerator], sums[quotient.denominator])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value: Floats = np.where((above == 0) & (below == 0), 1.0, above / below)
            return np.exp(value) if quotient.exponential else value

    return of


def _resampled_sums(columns_N: Mapping[str, Floats], seed: int) -> dict[str, Floats]:
    """Sums [R] of the columns over draws of N units with replacement, the same draws for every column."""
    import numpy as np

    generator = np.random.default_rng(seed)
    units = len(next(iter(columns_N.values())))
    size = max(1, _CHUNK_ELEMENTS // units)
    sums_R = {name: np.empty(RESAMPLES) for name in columns_N}
    for start in range(0, RESAMPLES, size):
        stop = min(start + size, RESAMPLES)
        drawn_CN = generator.integers(units, size=(stop - start, units))
        for name, values_N in columns_N.items():
            # What all units have alike, as a count of one, needs no looking up.
            alike = bool((values_N == values_N[0]).all())
            sums_R[name][start:stop] = units * values_N[0] if alike else values_N[drawn_CN].sum(axis=1)
    return sums_R


def bca(value: float, resampled_R: Floats, without_one_N: Floats, confidence: float) -> tuple[float, float]:
    """Return the ends of the BCa interval of a statistic.

    value: of all units. resampled_R: of the resamples. without_one_N: of all units but one. Where the correction is
    undefined, because no resample lies on one side of `value`, this is the percentile interval. An end that no finite
    number is (a ratio to nothing) is the outermost finite resample.
    """
    import numpy as np

    tails = (1 - confidence) / 2, (1 + confidence) / 2
    below = ((resampled_R < value).mean() + (resampled_R <= value).mean()) / 2
    spread_N = without_one_N[np.isfinite(without_one_N)]
    spread_N = spread_N.mean() - spread_N if spread_N.size else np.zeros(1)
    squares = float((spread_N**2).sum())
    if 0 < below < 1 and squares > 0:
        normal = NormalDist()
        bias = normal.inv_cdf(float(below))
        acceleration = float((spread_N**3).sum()) / (6 * squares**1.5)
        shifted = [bias + normal.inv_cdf(tail) for tail in tails]
        tails = tuple(normal.cdf(bias + shift / (1 - acceleration * shift)) for shift in shifted)  # type: ignore[assignment]
    finite_R = resampled_R[np.isfinite(resampled_R)]
    if not finite_R.size:
        return value, value
    clipped_R = np.clip(np.nan_to_num(resampled_R, nan=value), finite_R.min(), finite_R.max())
    low, high = np.quantile(clipped_R, tails)
    return float(low), float(high)
