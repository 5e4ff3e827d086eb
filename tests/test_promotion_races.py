"""Many promoters at once: processes on a folder, threads on a folder and on a bucket. One wins each step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConflictError
from orchestrator.promotion.history import Change, History, ReleaseRef
from orchestrator.promotion.promoter import Promoter
from orchestrator.store import open_store
from tests.promotion_scene import Scene, anywhere, scene

__all__ = ["anywhere", "scene"]

RACERS = 32
STEPS = 3
# Forks after the imports, as 32 starts of Python would take a minute. Each process reads the same head, and goes when
# all are ready.
RACE = """
import json, os, sys, time
from orchestrator.errors import ConflictError
from orchestrator.promotion.history import Change, History, ReleaseRef
from orchestrator.store import open_store

uri, racers = sys.argv[1], int(sys.argv[2])
release = ReleaseRef(name="model/x", uri=uri + "/model/x", digest="0" * 64)
outcomes, outcome = os.pipe()
gate, opener = os.pipe()
ready, here = os.pipe()
for racer in range(1, racers + 1):
    if os.fork() == 0:
        os.environ["ORCHESTRATOR_ACTOR"] = f"racer {racer}"
        history = History(open_store(uri), "model")
        head = history.head()
        os.close(opener)
        os.write(here, b".")
        os.read(gate, 1)  # ends when the opener is closed everywhere
        try:
            done = history.append(head, Change("promote", "production", str(racer), release))
            said = {"racer": racer, "won": done.entry.sequence}
        except ConflictError as error:
            said = {"racer": racer, "conflict": str(error)}
        os.write(outcome, json.dumps(said).encode() + b"\\n")
        os._exit(0)
os.close(outcome)
seen = 0
while seen < racers:
    seen += len(os.read(ready, racers))
os.close(opener)
with os.fdopen(outcomes) as lines:
    print(lines.read())
"""


def test_of_32_processes_one_wins_each_step(tmp_path: Path) -> None:
    uri = (tmp_path / "releases").as_uri()
    for step in range(1, STEPS + 1):
        done = subprocess.run(
            [sys.executable, "-c", RACE, uri, str(RACERS)], capture_output=True, text=True, check=True, timeout=120
        )
        said = [json.loads(line) for line in done.stdout.split("\n") if line]
        assert len(said) == RACERS
        (winner,) = [one for one in said if "won" in one]
        assert winner["won"] == step
        for loser in said:
            if loser is not winner:
                assert f"racer {winner['racer']} put version {winner['racer']} of 'model'" in loser["conflict"]
    history = History(open_store(uri), "model")
    assert [stored.entry.sequence for stored in history.entries()] == list(range(1, STEPS + 1))
    assert list((tmp_path / "releases" / ".incoming").iterdir()) == []


def test_of_32_promoters_one_wins_and_the_registry_follows(anywhere: Scene) -> None:
    versions = [anywhere.register(f"content-{number}") for number in range(4)]
    anywhere.promoter.promote(versions[0], "production", force=True)
    barrier = threading.Barrier(RACERS)

    class Racer(History):
        """Waits for the others where everybody has looked and nobody has written."""

        def append(self, head: Any, change: Change) -> Any:
            barrier.wait(60)
            return super().append(head, change)

    def race(number: int) -> str | ConflictError:
        promoter = Promoter(anywhere.model, anywhere.settings)
        promoter._history = Racer(anywhere.store, anywhere.model)
        try:
            done = promoter.promote(versions[1 + number % 3], "production", force=True, reason=f"racer {number}").done
        except ConflictError as error:
            return error
        assert done is not None and done.entry.reason is not None
        return done.entry.reason

    with ThreadPoolExecutor(RACERS) as pool:
        outcomes = list(pool.map(race, range(RACERS)))
    winners = [outcome for outcome in outcomes if isinstance(outcome, str)]
    entries = anywhere.history.entries()
    assert len(entries) == 2 and winners == [entries[1].entry.reason]
    losers = [outcome for outcome in outcomes if isinstance(outcome, ConflictError)]
    assert len(losers) == RACERS - 1
    assert all(f"put version {entries[1].entry.version}" in str(error) for error in losers)
    assert anywhere.alias() == entries[1].entry.version
    assert anywhere.promoter.reconcile().repaired == ()


def test_promotions_that_follow_each_other_closely_leave_the_registry_at_the_last(scene: Scene) -> None:
    """Nobody expects anything: all may win in turn. Whatever order MLflow was written in, the newest entry counts."""
    versions = [scene.register(f"content-{number}") for number in range(4)]
    scene.promoter.promote(versions[0], "production", force=True)

    def push(number: int) -> int:
        won = 0
        for turn in range(4):
            try:
                version = versions[(number + turn) % 4]
                won += Promoter(scene.model, scene.settings).promote(version, "production", force=True).done is not None
            except ConflictError:
                continue
        return won

    with ThreadPoolExecutor(8) as pool:
        won = sum(pool.map(push, range(8)))
    entries = scene.history.entries()
    assert len(entries) == won + 1
    assert scene.alias() == entries[-1].entry.version
    assert scene.promoter.reconcile().repaired == ()


def test_other_aliases_are_no_conflict_and_the_rung_below_is(tmp_path: Path) -> None:
    def ref(name: str) -> ReleaseRef:
        return ReleaseRef(name=f"m/{name}", uri=f"file:///r/m/{name}", digest="0" * 64)

    store = open_store(tmp_path.as_uri())
    one, other = History(store, "m"), History(store, "m")
    head = one.append(None, Change("promote", "staging", "1", ref("a")))
    other.append(head, Change("promote", "candidate", "2", ref("b")))
    third = one.append(head, Change("promote", "production", "1", ref("a"), relies_on="staging"))
    assert third.entry.sequence == 3 and set(third.entry.state) == {"candidate", "staging", "production"}
    moved = other.append(third, Change("promote", "staging", "2", ref("b")))
    with pytest.raises(ConflictError, match="into staging meanwhile"):
        one.append(third, Change("promote", "production", "1", ref("a"), relies_on="staging"))
    assert one.head() == moved


def test_a_promoter_that_is_killed_between_entry_and_alias_is_made_up_for(scene: Scene) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "production", force=True)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.home import Settings\n"
        "from orchestrator.promotion.promoter import Promoter\n"
        "from orchestrator.registry import ModelRegistry\n"
        "ModelRegistry.show_promotion = lambda *a, **o: os.kill(os.getpid(), signal.SIGKILL)\n"
        "home, tracking, model, version = sys.argv[1:]\n"
        "Promoter(model, Settings(Path(home), tracking)).promote(version, 'production', force=True)\n"
    )
    words = [str(scene.folder / "home"), scene.tracking_uri, scene.model, second]
    done = subprocess.run([sys.executable, "-c", script, *words], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (scene.alias(), len(scene.history.entries())) == (first, 2)
    assert scene.anew().reconcile().repaired == (
        f"production was at version {first} in the registry, is at version {second} again",
    )
    assert scene.alias() == second


def test_a_store_that_ignores_conditions_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old server lets the second writer overwrite: the first one reads back what it did not write."""
    store = open_store(tmp_path.as_uri())
    real = type(store)._create

    def overwritten(self: Any, key: str, item: Any, meter: Any) -> None:
        real(self, key, item, meter)
        path = tmp_path / key
        path.chmod(0o644)
        entry = json.loads(path.read_bytes())
        path.write_bytes(
            json.dumps({**entry, "actor": "somebody else"}, separators=(",", ":"), sort_keys=True).encode()
        )

    monkeypatch.setattr(type(store), "_create", overwritten)
    change = Change("promote", "production", "1", ReleaseRef(name="m/a", uri="file:///r/m/a", digest="0" * 64))
    with pytest.raises(ConflictError, match="somebody else put version 1"):
        History(store, "m").append(None, change)
    assert list((tmp_path / ".incoming").iterdir()) == []
