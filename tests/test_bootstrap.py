"""Intervals against SciPy's bootstrap, against closed forms, and against how often they hold what is true."""

from __future__ import annotations

import json
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from orchestrator import bootstrap
from orchestrator.bootstrap import Quantile, Quotient, Samples, bca
from orchestrator.sign_test import Pairs, fewest_noticed

UNITS = 60


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[float]]:
    """Nats and tokens of both models in windows of unlike lengths, and answers right or wrong."""
    generator = np.random.default_rng(7)
    tokens = generator.integers(20, 200, UNITS).astype(float)
    dense = tokens * generator.gamma(4.0, 0.6, UNITS)
    compressed = dense * generator.normal(1.04, 0.03, UNITS)
    before = generator.random(UNITS) < 0.7
    after = before ^ (generator.random(UNITS) < 0.15)
    columns = {"tokens": tokens, "dense": dense, "nats": compressed, "excess": compressed - dense}
    columns |= {"before": before.astype(float), "after": after.astype(float), "units": np.ones(UNITS)}
    return {name: [float(value) for value in values] for name, values in columns.items()}


QUOTIENTS = {
    "perplexity": Quotient("nats", "tokens", exponential=True),
    "dense_perplexity": Quotient("dense", "tokens", exponential=True),
    "perplexity_ratio": Quotient("excess", "tokens", exponential=True),
    "accuracy": Quotient("after", "units"),
    "dense_accuracy": Quotient("before", "units"),
    "accuracy_ratio": Quotient("after", "before"),
}


@pytest.fixture(scope="module")
def samples(drawn: dict[str, list[float]]) -> Samples:
    return Samples("window", drawn, QUOTIENTS)


def scipy_interval(samples: Samples, metric: str, confidence: float, method: str = "BCa") -> tuple[float, float]:
    stats = pytest.importorskip("scipy.stats")
    quotient = QUOTIENTS[metric]

    def statistic(above: Any, below: Any, axis: int) -> Any:
        value = above.sum(axis=axis) / below.sum(axis=axis)
        return np.exp(value) if quotient.exponential else value

    columns = [np.array(samples.columns[name]) for name in (quotient.numerator, quotient.denominator)]
    found = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=bootstrap.RESAMPLES,
        confidence_level=confidence,
        method=method,
        rng=np.random.default_rng(99),  # other draws than ours
    ).confidence_interval
    return float(found.low), float(found.high)


@pytest.mark.parametrize("metric", QUOTIENTS)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_intervals_agree_with_scipy(samples: Samples, metric: str, confidence: float) -> None:
    mine = samples.interval(metric, confidence, seed=0)
    theirs = scipy_interval(samples, metric, confidence)
    width = theirs[1] - theirs[0]
    # Two sets of 10,000 resamples; an accuracy's ends lie on a lattice of 1 / 60.
    allowed = 0.05 * width + (1.01 / UNITS if metric.endswith("accuracy") else 0.0)
    assert mine == (pytest.approx(theirs[0], abs=allowed), pytest.approx(theirs[1], abs=allowed))


def test_the_correction_is_that_of_the_textbook(drawn: dict[str, list[float]]) -> None:
    """Not a matter of draws: with the resamples of `bootstrap.py`, by the textbook's formulas in plain Python."""
    values = np.array(drawn["nats"])
    generator = np.random.default_rng(3)
    resampled = np.array([values[generator.integers(UNITS, size=UNITS)].mean() for _ in range(2000)])
    without_one = np.array([np.delete(values, index).mean() for index in range(UNITS)])
    low, high = bca(float(values.mean()), resampled, without_one, 0.9)

    normal = NormalDist()
    bias = normal.inv_cdf(float((resampled < values.mean()).mean()))
    spread = without_one.mean() - without_one
    skew = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
    expected = []
    for tail in (0.05, 0.95):
        shifted = bias + normal.inv_cdf(tail)
        expected.append(np.quantile(resampled, normal.cdf(bias + shifted / (1 - skew * shifted))))
    assert (low, high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_a_mean_of_many_units_has_the_interval_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 4000)
    samples = Samples("window", {"x": list(values), "n": [1.0] * 4000}, {"mean": Quotient("x", "n")})
    low, high = samples.interval("mean", 0.95, seed=0)
    half = 1.959964 * values.std() / math.sqrt(4000)
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.05 * half),
        pytest.approx(values.mean() + half, abs=0.05 * half),
    )


def test_pairing_cancels_what_is_hard_for_both(samples: Samples) -> None:
    """The interval of the ratio is far narrower than what the two models' own intervals would allow."""
    low, high = samples.interval("perplexity_ratio", 0.95, seed=0)
    alone = [samples.interval(name, 0.95, seed=0) for name in ("perplexity", "dense_perplexity")]
    assert high / low < (alone[0][1] / alone[0][0]) ** 0.5
    assert low < samples.value("perplexity") / samples.value("dense_perplexity") < high


def test_the_interval_of_a_difference_takes_both_from_the_same_units(samples: Samples) -> None:
    stats = pytest.importorskip("scipy.stats")
    gain = np.array(samples.columns["after"]) - np.array(samples.columns["before"])
    theirs = stats.bootstrap(
        (gain,), np.mean, n_resamples=bootstrap.RESAMPLES, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    mine = samples.difference("accuracy", "dense_accuracy", 0.95, seed=0)
    assert mine == (pytest.approx(theirs.low, abs=1.01 / UNITS), pytest.approx(theirs.high, abs=1.01 / UNITS))
    assert samples.difference("accuracy", "accuracy", 0.95, seed=0) == (0.0, 0.0)


def test_an_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 experiments on a skewed ratio: 90 % intervals of 40 units hold the true ratio in 84 to 95 % of them."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    generator = np.random.default_rng(11)
    held = 0
    for number in range(300):
        below = generator.gamma(2.0, 1.0, 40)
        above = below * generator.gamma(3.0, 0.5, 40)  # the ratio is 1.5
        columns = {"above": list(above), "below": list(below)}
        low, high = Samples("window", columns, {"r": Quotient("above", "below")}).interval("r", 0.9, seed=number)
        held += low <= 1.5 <= high
    assert 0.84 * 300 <= held <= 0.95 * 300


def test_neither_memory_nor_company_change_the_draws(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    once = samples.interval("perplexity_ratio", 0.95, seed=4)
    assert samples.interval("perplexity_ratio", 0.95, seed=4) == once
    assert samples.interval("perplexity_ratio", 0.95, seed=5) != once
    assert samples.intervals(0.95, seed=4)["perplexity_ratio"] == once
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 7 * UNITS)
    assert samples.interval("perplexity_ratio", 0.95, seed=4) == once


def test_where_all_units_agree_the_interval_is_a_point() -> None:
    columns = {"flips": [0.0] * 12, "positions": [31.0] * 12}
    samples = Samples("window", columns, {"top1_flips": Quotient("flips", "positions")})
    assert samples.interval("top1_flips", 0.95, seed=0) == (0.0, 0.0)


def test_a_ratio_to_next_to_nothing_has_finite_ends() -> None:
    """One of twelve right: a third of the resamples hold no right answer of the dense model at all."""
    columns = {"after": [1.0, 1.0] + [0.0] * 10, "before": [1.0] + [0.0] * 11}
    low, high = Samples("question", columns, {"r": Quotient("after", "before")}).interval("r", 0.95, seed=0)
    assert 0 <= low <= 2 <= high < math.inf


def test_samples_survive_json_and_say_what_is_wrong_with_them(samples: Samples) -> None:
    again = Samples.from_dict(samples.as_dict())
    metrics = {name: samples.value(name) for name in QUOTIENTS}
    assert again.faults(metrics) == []
    assert again.interval("accuracy", 0.9, 0) == samples.interval("accuracy", 0.9, 0)
    assert "but its samples give" in again.faults(metrics | {"accuracy": 0.1})[0]
    assert Samples("window", {"a": [1.0], "b": [1.0, 2.0]}, {}).faults({}) == ["columns of [1, 2] units"]
    assert Samples("window", {"a": [1.0]}, {"m": Quotient("a", "c")}).faults({"m": 1.0}) == ["m of ['c']"]


def in_windows(generator: np.random.Generator, windows: int, length: int) -> list[np.ndarray]:
    """Lognormal values with a part that all of a window share, as a passage that is hard throughout."""
    return [np.exp(generator.normal(0, 0.6) + generator.normal(0, 0.8, length)) for _ in range(windows)]


def test_a_quantile_is_that_of_all_values_and_its_interval_that_of_whole_windows() -> None:
    """The kept tail gives the ends that testing every value by SciPy's BCa of the share above it does."""
    stats = pytest.importorskip("scipy.stats")
    values = in_windows(np.random.default_rng(2), 40, 100)
    samples = Samples("window", {"n": [100.0] * 40}, {}, {"p99": Quantile.of(0.99, "n", values)})
    pooled = np.sort(np.concatenate(values))
    assert samples.value("p99") == pooled[math.ceil(0.99 * 4000) - 1]
    assert sum(map(len, samples.quantiles["p99"].largest)) == 5 * 41
    low, high = samples.interval("p99", 0.9, seed=6)
    assert low < samples.value("p99") < high
    for end, side in ((low, 0), (high, 1)):
        rank = int((pooled > end).sum())
        for other, within in ((end, True), (pooled[4000 - rank - 7], False)):  # some ranks further down: rejected
            above = np.array([(window > other).mean() for window in values])
            found = stats.bootstrap(
                (above,), np.mean, n_resamples=9999, confidence_level=0.9, rng=np.random.default_rng(1)
            ).confidence_interval
            assert bool((found.low, found.high)[side] <= 0.0105) is within
    assert samples.intervals(0.9, seed=6) == {"p99": (low, high)}
    again = Samples.from_dict(json.loads(json.dumps(samples.as_dict())))
    assert again.interval("p99", 0.9, seed=6) == (low, high)
    assert again.faults({"p99": samples.value("p99")}) == []
    assert "its samples give" in again.faults({"p99": 1.0})[0]


def test_the_interval_of_a_quantile_holds_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 experiments with windows that differ: 90 % intervals hold the true 99th percentile in 80 to 95 % of them.

    Drawing tokens as if windows did not matter holds it in far fewer.
    """
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    generator = np.random.default_rng(12)
    truth = math.exp(NormalDist().inv_cdf(0.99))  # 0.6² + 0.8² = 1
    held = naive = 0
    for number in range(200):
        values = in_windows(generator, 60, 50)
        samples = Samples("window", {"n": [50.0] * 60}, {}, {"p99": Quantile.of(0.99, "n", values)})
        low, high = samples.interval("p99", 0.9, seed=number)
        held += low <= truth <= high
        if number < 40:
            alone = np.sort(np.concatenate(values)[generator.integers(3000, size=(300, 3000))], axis=1)[:, 2969]
            low, high = np.quantile(alone, (0.05, 0.95))
            naive += low <= truth <= high
    assert 0.80 * 200 <= held <= 0.95 * 200
    assert naive / 40 < held / 200 - 0.1


def test_a_quantile_of_values_that_are_all_alike_keeps_few_of_them() -> None:
    same = Quantile.of(0.99, "n", [np.zeros(1000)] * 12)
    assert sum(map(len, same.largest)) == 5 * 121
    samples = Samples("window", {"n": [1000.0] * 12}, {}, {"p99": same})
    assert samples.value("p99") == 0.0
    assert samples.interval("p99", 0.95, seed=0) == (0.0, 0.0)
    short = Samples("window", {"n": [1.0, 1.0]}, {}, {"p99": Quantile(0.99, "n", [[1.0]])})
    assert short.faults({"p99": 1.0}) == ["p99 of values in 1 units, not 2"]


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (0, 3), (3, 0), (2, 9), (40, 71), (300, 350), (0, 6), (0, 5)])
def test_lost_and_won_units_are_held_as_scipy_holds_them(won: int, lost: int) -> None:
    from scipy.stats import binomtest

    pairs = Pairs(won, lost, units=1000)
    changed = won + lost
    low, high = pairs.interval(0.95)
    if not changed:
        assert pairs.chance(lost) == 1 and (low, high) == (0, 0)
        return
    assert pairs.chance(lost) == pytest.approx(binomtest(lost, changed, 0.5, "greater").pvalue)
    exact = binomtest(won, changed).proportion_ci(0.95, "exact")
    assert low == pytest.approx((2 * exact.low - 1) * changed / 1000)
    assert high == pytest.approx((2 * exact.high - 1) * changed / 1000)
    assert (high < 0) is (pairs.chance(lost) <= 0.025)


def test_the_fewest_lost_units_that_are_noticed() -> None:
    noticed = fewest_noticed(0.95)
    assert noticed == 6
    assert Pairs(0, noticed, 50).chance(noticed) <= 0.025 < Pairs(0, noticed - 1, 50).chance(noticed - 1)


def test_a_model_that_is_no_worse_is_refused_no_more_often_than_said() -> None:
    """Of two equally good models, where few questions are answered differently; the bootstrap refuses 5 % here."""
    generator = np.random.default_rng(3)
    refused = 0
    for changed in generator.binomial(20, 0.3, 4000):
        lost = int(generator.binomial(changed, 0.5))
        refused += Pairs(int(changed) - lost, lost, 20).chance(lost) <= 0.025
    assert refused / 4000 <= 0.025


def test_only_what_is_right_or_wrong_is_paired(samples: Samples) -> None:
    before, after = (np.asarray(samples.columns[name]) for name in ("before", "after"))
    pairs = samples.pairs("accuracy", "dense_accuracy")
    assert pairs == Pairs(int((after > before).sum()), int((after < before).sum()), UNITS)
    assert samples.pairs("perplexity", "dense_perplexity") is None
    assert samples.pairs("accuracy_ratio", "dense_accuracy") is None  # a share of those that were right before
