"""Simulating a serving engine's KV memory under traffic: paged, and beside it preallocated as before PagedAttention.

The same requests go through the same memory under each policy: "paged" (`paging`), and contiguous pieces
reserved for the longest sequence ("max"), the next power of two of the answer ("pow2") or the exact length ("oracle";
`contiguous`). The engine around them is the same too (`batching`, which says what is
assumed). No torch, no GPU, no threads; the figures are exact and depend on nothing but the input.

Waste is counted as in Kwon et al. 2023 (arXiv:2309.06180, section 3.1 and figure 2), as shares of the slots that are
given to sequences or lost to them, weighted by time; together with the tokens they are 1:

    tokens      slots that hold the KV of a token
    reserved    slots that will hold one later
    internal    slots that the sequence will never fill
    external    slots lost between sequences: rounding by the allocator, and free memory while who waits would fit into
                its size but not into any one piece of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from orchestrator.errors import PreflightError, SpecError
from orchestrator.serving import MOST_BLOCK_TOKENS, KVPlan
from orchestrator.simulation.batching import Engine, Memory
from orchestrator.simulation.contiguous import RESERVES, ContiguousMemory
from orchestrator.simulation.measures import Integrals, Tally
from orchestrator.simulation.paging import PagedMemory
from orchestrator.simulation.trace import NS
from orchestrator.simulation.traffic import Traffic

PAGED = "paged"
POLICIES = (PAGED, *RESERVES)
MOST_BLOCKS = 2**26  # the free queue is a list


@dataclass(frozen=True)
class PagedPool:
    """The memory, and the limits of the engine.

    num_blocks, block_size: blocks of so many tokens. max_model_len: prompt and answer together, in tokens.
    max_num_seqs: samples that run at once. max_num_batched_tokens: tokens of one step, prompts and answers together.
    watermark: share of the blocks that stays free when a request joins. prefix_caching: whether prompts share blocks.

    Raises `SpecError` for a number that makes no sense, `PreflightError` if not one sequence fits.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    watermark: float = 0.0
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("num_blocks", self.num_blocks, 1 <= self.num_blocks <= MOST_BLOCKS, f"1 to {MOST_BLOCKS} blocks"),
            ("block_size", self.block_size, 1 <= self.block_size <= MOST_BLOCK_TOKENS, f"1 to {MOST_BLOCK_TOKENS}"),
            ("max_model_len", self.max_model_len, self.max_model_len >= 2, "at least 2 tokens"),
            ("max_num_seqs", self.max_num_seqs, self.max_num_seqs >= 1, "at least 1 sequence"),
            ("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_batched_tokens >= 1, "at least 1"),
            ("watermark", self.watermark, 0 <= self.watermark < 1, "a share from 0 to below 1"),
        ):
            if not fits:
                raise SpecError(f"{name} is {str(value)[:40]}, which makes no sense", remedy=f"give {wanted}")
        needed = -(-(self.max_model_len - 1) // self.block_size)
        if needed > self.num_blocks:
            raise PreflightError(
                f"not one sequence of {self.max_model_len} tokens fits: it needs {needed} blocks of "
                f"{self.block_size} tokens, {needed - self.num_blocks} more than the {self.num_blocks} there are",
                remedy=f"set max_model_len to at most {self.num_blocks * self.block_size + 1}, or give more memory",
            )

    @classmethod
    def from_plan(cls, plan: KVPlan, **limits: Any) -> PagedPool:
        """The blocks of a plan; `limits` are the other fields."""
        return cls(plan.num_blocks, plan.block_size, plan.max_model_len, **limits)

    @property
    def slots(self) -> int:
        """Tokens that the memory holds."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class Timing:
    """What a step takes: step_s + decode_token_s x (tokens decoded) + prefill_token_s x (prompt tokens computed).

    step_s is mostly the reading of the weights. Nanoseconds are resolved; measure one's own engine for the values.
    """

    step_s: float
    prefill_token_s: float
    decode_token_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("step_s", self.step_s, 1 / NS),
            ("prefill_token_s", self.prefill_token_s, 0.0),
            ("decode_token_s", self.decode_token_s, 0.0),
        ):
            if not least <= value <= 1000:
                raise SpecError(f"{name} is {value:g}, which makes no sense", remedy=f"give {least:g} to 1000 seconds")

    @property
    def nanoseconds(self) -> tuple[int, int, int]:
        """step, decode token, prefill token."""
        return round(self.step_s * NS), round(self.decode_token_s * NS), round(self.prefill_token_s * NS)


@dataclass(frozen=True)
class Waste:
    """Shares of the slots given to sequences or lost to them; they add up to 1, or are all 0 if nothing ran."""

    tokens: float
    reserved: float
    internal: float
    external: float

    @property
    def total(self) -> float:
        """Everything but tokens."""
        return self.reserved + self.internal + self.external


@dataclass(frozen=True)
class Point:
    """Means over a stretch of time that ends at `time_s`; `finished` and `preemptions` count within it.

    in_use: share of the whole memory that is given to sequences. waste: as `Waste.total`. running: sequences.
    """

    time_s: float
    in_use: float
    waste: float
    running: float
    finished: int
    preemptions: int


@dataclass(frozen=True)
class PolicyResult:
    """What became of the traffic under one policy.

    requests = finished + the sum of refused (by reason). duration_s: from the first arrival to the last token.
    memory_in_use: mean share of the memory given to sequences. mean_running: sequences, while the engine runs or waits.
    queueing delays: from arrival to the first admission. preemptions: of requests.
    recomputed_tokens: computed again after a preemption, less what was found in the cache.
    prefix_hit_rate, prefix_tokens_saved: prompt tokens found in the cache at first admission; the share and the count.
        Parallel samples of a request compute its prompt once under "paged": that counts for neither.
    tokens_per_s: of answers.
    """

    policy: str
    requests: int
    finished: int
    refused: dict[str, int]
    duration_s: float
    steps: int
    waste: Waste
    memory_in_use: float
    mean_running: float
    peak_running: int
    queueing_mean_s: float
    queueing_p50_s: float
    queueing_p99_s: float
    requests_per_s: float
    tokens_per_s: float
    preemptions: int
    recomputed_tokens: int
    prefix_hit_rate: float
    prefix_tokens_saved: int
    generated_tokens: int
    series: tuple[Point, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "waste": {**asdict(self.waste), "total": self.waste.total}, "series": self._columns()}

    def _columns(self) -> dict[str, list[float]]:
        return {
            name: [round(getattr(point, name), 6) for point in self.series]
            for name in ("time_s", "in_use", "waste", "running", "finished", "preemptions")
        }


@dataclass(frozen=True)
class SimulationReport:
    """Every policy's result, by name in the order asked for, and what it was made from."""

    pool: PagedPool
    timing: Timing
    results: dict[str, PolicyResult]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "pool": asdict(self.pool),
            "timing": asdict(self.timing),
            "policies": {name: result.as_dict() for name, result in self.results.items()},
        }


def simulate(
    pool: PagedPool, traffic: Traffic, *, timing: Timing, policies: Sequence[str] = POLICIES
) -> SimulationReport:
    """Put the traffic through the memory under each policy, one after the other.

    `traffic` is iterated once for each policy. Memory does not depend on the number of requests.
    Raises `SpecError` for a policy that does not exist, traffic without requests, and whatever reading it raises.
    """
    if not policies:
        raise SpecError("there is no policy to simulate", remedy=f"name some of {', '.join(POLICIES)}")
    for name in policies:
        if name not in POLICIES:
            raise SpecError(f"there is no policy {name!r}", remedy=f"choose from {', '.join(POLICIES)}")
    results = {}
    for name in dict.fromkeys(policies):
        engine = Engine(
            make_memory(pool, name),
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            timing_ns=timing.nanoseconds,
        )
        tally = engine.run(traffic)
        if tally.requests == 0:
            raise SpecError("the traffic has no requests", remedy="give at least one")
        results[name] = _result(name, tally, pool)
    return SimulationReport(pool, timing, results)


def make_memory(pool: PagedPool, policy: str) -> Memory:
    """Return the empty memory of a policy."""
    if policy == PAGED:
        return PagedMemory(
            pool.num_blocks,
            pool.block_size,
            pool.max_model_len,
            watermark_blocks=int(pool.watermark * pool.num_blocks),
            prefix_caching=pool.prefix_caching,
        )
    return ContiguousMemory(pool.slots, pool.max_model_len, policy)


def _result(policy: str, tally: Tally, pool: PagedPool) -> PolicyResult:
    duration_ns = tally.now_ns - tally.start_ns
    seconds = duration_ns / NS
    saved = max(0, tally.prompt_tokens - tally.computed_tokens)  # contiguous: each sample computes the prompt again
    return PolicyResult(
        policy=policy,
        requests=tally.requests,
        finished=tally.finished,
        refused=dict(sorted(tally.refused.items())),
        duration_s=seconds,
        steps=tally.steps,
        waste=_waste(tally.held, tally.filled, tally.spare, tally.external),
        memory_in_use=_share(tally.held, duration_ns * pool.slots),
        mean_running=_share(tally.running, duration_ns),
        peak_running=tally.peak_running,
        queueing_mean_s=tally.delays.mean() / NS,
        queueing_p50_s=tally.delays.quantile(50) / NS,
        queueing_p99_s=tally.delays.quantile(99) / NS,
        requests_per_s=tally.finished / seconds if seconds else 0.0,
        tokens_per_s=tally.generated_tokens / seconds if seconds else 0.0,
        preemptions=tally.preemptions,
        recomputed_tokens=tally.recomputed_tokens,
        prefix_hit_rate=_share(saved, tally.prompt_tokens),
        prefix_tokens_saved=saved,
        generated_tokens=tally.generated_tokens,
        series=tuple(_point(before, after, tally.start_ns, pool.slots) for before, after in pairwise(tally.snapshots)),
    )


def _waste(held: int, filled: int, spare: int, external: int) -> Waste:
    total = held + external
    return Waste(
        tokens=_share(filled, total),
        reserved=_share(held - filled - spare, total),
        internal=_share(spare, total),
        external=_share(external, total),
    )


def _point(before: Integrals, after: Integrals, start_ns: int, slots: int) -> Point:
    duration = after.now_ns - before.now_ns
    held, external = after.held - before.held, after.external - before.external
    return Point(
        time_s=(after.now_ns - start_ns) / NS,
        in_use=held / (duration * slots),
        waste=1 - _share(after.filled - before.filled, held + external) if held else 0.0,
        running=(after.running - before.running) / duration,
        finished=after.finished - before.finished,
        preemptions=after.preemptions - before.preemptions,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
