"""The benchmark of steps measures what its parts say; its numbers are no test."""

from __future__ import annotations

import time

from benchmarks.steps import Ledger
from orchestrator.artifact import ArtifactStore
from orchestrator.run import Execution


def test_every_part_names_something_that_exists_and_is_put_back() -> None:
    before = (ArtifactStore.commit, Execution._cached)
    with Ledger().watching():
        assert (ArtifactStore.commit, Execution._cached) != before
    assert (ArtifactStore.commit, Execution._cached) == before


def test_the_time_of_an_inner_part_is_not_counted_twice() -> None:
    ledger = Ledger()
    inner = ledger.wrap("inner", lambda: time.sleep(0.05))
    outer = ledger.wrap("outer", lambda: inner())
    outer()
    assert ledger.seconds["inner"] >= 0.05 > ledger.seconds["outer"]
    assert ledger.calls == {"inner": 1, "outer": 1}
