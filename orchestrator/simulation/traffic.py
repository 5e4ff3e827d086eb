"""Traffic for the simulator: a distribution with a seed, or a recorded trace (`trace`).

Traffic is any collection of `Request`s in order of arrival that can be iterated again and again, once for each
policy. A distribution draws them in chunks, so memory does not depend on their number; the same seed, the same
requests. Each quantity has a random stream of its own: more samples per request do not move the arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import SpecError
from orchestrator.simulation.trace import MOST_SAMPLES, MOST_TOKENS, NS, Request, Trace

__all__ = ["Distribution", "Lengths", "Request", "Trace", "Traffic", "parse_lengths", "traffic_from_options"]

Traffic = Iterable[Request]
CHUNK = 8192
MOST_REQUESTS = 10**9
MOST_PREFIXES = 10**6
MOST_LENGTH = 2**24
LENGTHS_SYNTAX = "fixed:N, uniform:LOW-HIGH or lognormal:MEAN[,cv=1][,low=1][,high=N]"


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, rounded and clipped to low...high.

    kind: "fixed" (mean), "uniform" (low to high, both included) or "lognormal" (mean; cv, the standard deviation as a
        share of the mean). Clipping moves the mean of what is drawn.
    """

    kind: str
    mean: float
    cv: float = 1.0
    low: int = 1
    high: int = MOST_LENGTH

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("kind", self.kind, self.kind in ("fixed", "uniform", "lognormal"), "fixed, uniform or lognormal"),
            ("low", self.low, 1 <= self.low <= MOST_LENGTH, "at least 1 token"),
            ("high", self.high, self.low <= self.high <= MOST_LENGTH, f"low ({self.low}) to {MOST_LENGTH} tokens"),
            ("mean", self.mean, self.low <= self.mean <= self.high, f"a length from {self.low} to {self.high}"),
            ("cv", self.cv, 0 <= self.cv <= 100, "a share from 0 to 100"),
        ):
            _check(f"{name} of the lengths", value, fits, wanted)

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return `count` lengths, int64."""
        if self.kind == "fixed":
            return np.full(count, round(self.mean), dtype=np.int64)
        if self.kind == "uniform":
            return random.integers(self.low, self.high, size=count, endpoint=True, dtype=np.int64)
        sigma = math.sqrt(math.log1p(self.cv**2))
        drawn = random.lognormal(math.log(self.mean) - sigma**2 / 2, sigma, size=count)
        lengths: NDArray[np.int64] = np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)
        return lengths


@dataclass(frozen=True)
class Distribution:
    """Requests drawn at random.

    requests: how many. rate: arrivals per second. burstiness: coefficient of variation of the gaps between arrivals,
        which are gamma distributed; 1 is a Poisson process, more is burstier, 0 is a metronome.
    prompt, answer: lengths in tokens. The prompt follows the shared prefix, if there is one.
    prefixes, prefix_tokens: how many system prompts there are, and their length; each request begins with one of them,
        the k-th most popular with probability proportional to k^-zipf.
    samples: answers generated for each request, each of its own length.
    """

    requests: int
    rate: float
    prompt: Lengths
    answer: Lengths
    burstiness: float = 1.0
    prefixes: int = 0
    prefix_tokens: int = 0
    zipf: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("requests", self.requests, 1 <= self.requests <= MOST_REQUESTS, f"1 to {MOST_REQUESTS}"),
            ("rate", self.rate, 1e-6 <= self.rate <= 1e8, "requests per second, from 1e-6 to 1e8"),
            ("burstiness", self.burstiness, 0 <= self.burstiness <= 100, "0 to 100; 1 is a Poisson process"),
            ("prefixes", self.prefixes, 0 <= self.prefixes <= MOST_PREFIXES, f"0 to {MOST_PREFIXES}"),
            ("prefix_tokens", self.prefix_tokens, 0 <= self.prefix_tokens <= MOST_TOKENS, "a number of tokens"),
            ("zipf", self.zipf, 0 <= self.zipf <= 10, "an exponent from 0 to 10"),
            ("samples", self.samples, 1 <= self.samples <= MOST_SAMPLES, f"1 to {MOST_SAMPLES}"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "a non-negative integer"),
        ):
            _check(name, value, fits, wanted)
        if bool(self.prefixes) != bool(self.prefix_tokens):
            raise SpecError(
                f"{self.prefixes} shared prefixes of {self.prefix_tokens} tokens make no sense",
                remedy="give both prefixes and prefix_tokens, or neither",
            )

    def __iter__(self) -> Iterator[Request]:
        gaps, prompts, answers, popular = np.random.default_rng(self.seed).spawn(4)
        weights = np.arange(1, self.prefixes + 1, dtype=np.float64) ** -self.zipf
        cumulative = np.cumsum(weights) / weights.sum() if self.prefixes else None
        now = 0
        for start in range(0, self.requests, CHUNK):
            count = min(CHUNK, self.requests - start)
            arrivals = now + np.cumsum(self._gaps(gaps, count))
            now = int(arrivals[-1])
            lengths = self.prompt.draw(prompts, count) + self.prefix_tokens
            samples = self.answer.draw(answers, count * self.samples).reshape(count, self.samples)
            each = map(tuple, samples.tolist())
            if cumulative is None:
                yield from map(Request, arrivals.tolist(), lengths.tolist(), each)
            else:
                ids = np.minimum(np.searchsorted(cumulative, popular.random(count), side="right"), self.prefixes - 1)
                named = zip(ids.tolist(), strict=True)  # tuples of one
                yield from map(
                    Request, arrivals.tolist(), lengths.tolist(), each, named, repeat(self.prefix_tokens, count)
                )

    def _gaps(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Nanoseconds between arrivals."""
        if self.burstiness == 0:
            seconds = np.full(count, 1 / self.rate)
        elif self.burstiness == 1:
            seconds = random.exponential(1 / self.rate, size=count)
        else:
            shape = self.burstiness**-2
            seconds = random.gamma(shape, 1 / (self.rate * shape), size=count)
        gaps: NDArray[np.int64] = np.rint(seconds * NS).astype(np.int64)
        return gaps


def parse_lengths(text: str) -> Lengths:
    """Read `fixed:128`, `uniform:16-512` or `lognormal:160,cv=1.2,low=4,high=2048`. Raises `SpecError`."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "fixed":
            return Lengths("fixed", int(rest))
        if kind == "uniform":
            low, high = map(int, rest.split("-"))
            return Lengths("uniform", (low + high) / 2, low=low, high=high)
        if kind == "lognormal":
            mean, *more = rest.split(",")
            options = dict(one.strip().split("=") for one in more)
            if not options.keys() <= {"cv", "low", "high"}:
                raise ValueError
            return Lengths(
                "lognormal",
                float(mean),
                cv=float(options.get("cv", 1)),
                low=int(options.get("low", 1)),
                high=int(options.get("high", MOST_LENGTH)),
            )
    except ValueError:
        pass
    raise SpecError(f"{text!r} is no distribution of lengths", remedy=f"write {LENGTHS_SYNTAX}")


def traffic_from_options(
    *,
    trace: str | Path | None = None,
    rate: float | None = None,
    requests: int = 10_000,
    prompt: str = "lognormal:160",
    answer: str = "lognormal:200",
    burstiness: float = 1.0,
    prefixes: int = 0,
    prefix_tokens: int = 0,
    zipf: float = 1.0,
    samples: int = 1,
    seed: int = 0,
) -> Traffic:
    """Return the traffic that the options of a command describe: a trace or, with `rate`, a distribution.

    A trace is read once from end to end, so that a bad line is refused before anything is simulated.
    Raises `SpecError`.
    """
    if (trace is None) == (rate is None):
        raise SpecError(
            "the traffic is given twice" if trace is not None else "there is no traffic",
            remedy="give either a trace or a rate in requests per second",
        )
    if trace is not None:
        recorded = Trace(Path(trace))
        for _ in recorded:
            pass
        return recorded
    assert rate is not None
    return Distribution(
        requests=requests,
        rate=rate,
        prompt=parse_lengths(prompt),
        answer=parse_lengths(answer),
        burstiness=burstiness,
        prefixes=prefixes,
        prefix_tokens=prefix_tokens,
        zipf=zipf,
        samples=samples,
        seed=seed,
    )


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    """The comparisons behind `fits` are written so that NaN fails them."""
    if not fits:
        raise SpecError(f"{name} is {str(value)[:40]}, which makes no sense", remedy=f"give {wanted}")
