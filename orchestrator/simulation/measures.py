"""What a simulation counts, in memory that does not depend on its length.

Integrals over time are exact integers (slots x nanoseconds). Quantiles come from a histogram whose bins are 1/64 wide
relative to their value; the course over time from snapshots of the integrals, every other of which is dropped when
there are too many.
"""

from __future__ import annotations

from typing import NamedTuple

MOST_POINTS = 200
FIRST_INTERVAL_NS = 10**6


class LogHistogram:
    """Counts of non-negative integers; a quantile is within 1/128 of the true one."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.total = 0
        self.sum = 0

    def add(self, value: int) -> None:
        """Count one value."""
        shift = value.bit_length() - 7
        place = (shift << 6) + (value >> shift) if shift > 0 else value
        self._counts[place] = self._counts.get(place, 0) + 1
        self.total += 1
        self.sum += value

    def mean(self) -> float:
        """Exact; 0 of nothing."""
        return self.sum / self.total if self.total else 0.0

    def quantile(self, percent: int) -> float:
        """The value at or below which this share of the values lies (nearest rank); 0 of nothing."""
        rank = max(1, -(-percent * self.total // 100))
        seen = 0
        for place in sorted(self._counts):
            seen += self._counts[place]
            if seen >= rank:
                if place < 128:
                    return float(place)
                shift = (place >> 6) - 1
                return float(((place - (shift << 6)) << shift) + ((1 << shift) - 1) / 2)
        return 0.0


class Integrals(NamedTuple):
    """Sums over time up to `now_ns`, in slots (or sequences) x nanoseconds; and counts so far."""

    now_ns: int
    held: int
    filled: int
    spare: int
    external: int
    running: int
    finished: int
    preemptions: int


class Tally:
    """The figures of one policy while it runs. See `simulate.PolicyResult` for what they mean."""

    def __init__(self) -> None:
        self.requests = self.finished = self.preemptions = self.steps = self.peak_running = 0
        self.prompt_tokens = self.computed_tokens = self.recomputed_tokens = self.generated_tokens = 0
        self.refused: dict[str, int] = {}
        self.delays = LogHistogram()
        self.start_ns = self.now_ns = 0
        self.held = self.filled = self.spare = self.external = self.running = 0
        self.snapshots: list[Integrals] = []
        self._interval = FIRST_INTERVAL_NS
        self._next = 0

    def open(self, now_ns: int) -> None:
        """Start the clock."""
        self.start_ns = self.now_ns = now_ns
        self._next = now_ns + self._interval
        self.snapshots.append(self.integrals())

    def admitted(self, delay_ns: int, prompt_tokens: int, computed_tokens: int) -> None:
        """A request has joined for the first time."""
        self.delays.add(delay_ns)
        self.prompt_tokens += prompt_tokens
        self.computed_tokens += computed_tokens

    def add(self, now: int, duration: int, held: int, filled: int, spare: int, external: int, running: int) -> None:
        """Count a time that ends `now` with these sizes; `filled` may be a sum over steps of `duration` each."""
        self.now_ns = now
        self.held += held * duration
        self.filled += filled * duration
        self.spare += spare * duration
        self.external += external * duration
        self.running += running * duration
        if now >= self._next:
            self._snapshot()

    def jump(
        self, now: int, steps: int, duration: int, held: int, filled: int, spare: int, external: int, running: int
    ) -> None:
        """Count `steps` steps of `duration` each, over which only `filled` (its sum over them) has changed."""
        self.filled += filled * duration
        self.add(now, steps * duration, held, 0, spare, external, running)

    def close(self) -> None:
        """Stop the clock."""
        if self.snapshots and self.snapshots[-1].now_ns < self.now_ns:
            self.snapshots.append(self.integrals())

    def integrals(self) -> Integrals:
        """Everything up to now."""
        return Integrals(
            self.now_ns,
            self.held,
            self.filled,
            self.spare,
            self.external,
            self.running,
            self.finished,
            self.preemptions,
        )

    def _snapshot(self) -> None:
        self.snapshots.append(self.integrals())
        if len(self.snapshots) >= MOST_POINTS:
            del self.snapshots[1::2]
            # Steps may be longer than the interval asked for, so what is left says how far apart points now are.
            self._interval = (self.snapshots[-1].now_ns - self.start_ns) // (len(self.snapshots) - 1)
        self._next = self.now_ns + self._interval
