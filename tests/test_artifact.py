"""The artifact store: whole or not there, found by digest, damage noticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from orchestrator.artifact import Artifact, ArtifactStore
from orchestrator.errors import SpecError, StepError
from orchestrator.journal import Journal, lease

IDENTITY = {"parameters": {}, "plugin": {"distribution": "tests", "version": "1"}}
FACTS = {
    "kind": "model",
    "stage": "prune",
    "method": "none",
    "metrics": {"a": 1.0},
    "identity": IDENTITY,
    "inputs": {},
    "invariants": {},
}


def commit(store: ArtifactStore, fingerprint: str = "f" * 64, text: str = "weights") -> Artifact:
    folder = store.stage(fingerprint)
    (folder / "sub").mkdir()
    (folder / "model.bin").write_text(text, encoding="utf-8")
    (folder / "sub" / "more.txt").write_text("more", encoding="utf-8")
    return store.commit(fingerprint, folder, FACTS, seconds=1.5, peak_memory_bytes=7)


def test_a_committed_step_is_found_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = commit(store)
    found = ArtifactStore(tmp_path).lookup("f" * 64)
    assert found == made
    assert found.damage() is None
    assert found.metrics == {"a": 1.0}
    assert found.bytes == len("weights") + len("more")
    assert not list((tmp_path / "staging").iterdir())


def test_equal_content_has_equal_digest(tmp_path: Path) -> None:
    assert commit(ArtifactStore(tmp_path / "a")).digest == commit(ArtifactStore(tmp_path / "b")).digest
    assert commit(ArtifactStore(tmp_path / "a")).digest != commit(ArtifactStore(tmp_path / "c"), text="other").digest


def test_what_a_killed_step_left_is_no_result(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (store.stage("f" * 64) / "model.bin").write_text("half", encoding="utf-8")
    assert store.lookup("f" * 64) is None
    assert not list(store.stage("f" * 64).iterdir())


@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "add"])
def test_damage_is_noticed(tmp_path: Path, fault: str) -> None:
    artifact = commit(ArtifactStore(tmp_path))
    victim = artifact.path / "model.bin"
    if fault == "flip":
        victim.write_text("weightz", encoding="utf-8")
    elif fault == "truncate":
        victim.write_text("weigh", encoding="utf-8")
    elif fault == "remove":
        victim.unlink()
    else:
        (artifact.path / "extra").touch()
    damage = artifact.damage()
    assert damage is not None
    assert ("extra" if fault == "add" else "model.bin") in damage


def test_a_damaged_manifest_is_no_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = commit(store)
    manifest = artifact.path / "manifest.json"
    manifest.write_text(json.dumps({**artifact.manifest, "metrics": {"a": 0.0}}), encoding="utf-8")
    assert store.lookup("f" * 64) is None


def test_damage_is_repaired_by_committing_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = commit(store)
    (artifact.path / "model.bin").write_text("ruined", encoding="utf-8")
    assert commit(store).damage() is None


def test_a_step_may_not_write_a_manifest(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.stage("e" * 64)
    (folder / "manifest.json").touch()
    with pytest.raises(StepError, match="manifest"):
        store.commit("e" * 64, folder, FACTS, seconds=0, peak_memory_bytes=0)


def test_references(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = commit(store)
    assert store.find(artifact.digest) == artifact
    assert store.find(artifact.digest[:4]) == artifact
    assert store.find(str(artifact.path)).digest == artifact.digest
    for wrong in ("", artifact.digest[:3], "zzzz", "../..", str(tmp_path)):
        with pytest.raises(SpecError):
            store.find(wrong)


def test_an_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = commit(store).digest
    (tmp_path / "artifacts" / (digest[:10] + "0" * 54)).mkdir()
    with pytest.raises(SpecError, match="give more characters"):
        store.find(digest[:8])


def test_the_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("started", step=1)
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"event": "fini')
    assert [event["event"] for event in journal.events()] == ["started"]


def _hold(home: Path, held: multiprocessing.synchronize.Event) -> None:
    with lease(home, "step"):
        held.set()
        time.sleep(60)


def test_a_lease_is_exclusive_and_ends_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(30)
    waited: list[bool] = []

    def kill_the_holder() -> None:
        waited.append(True)
        process.kill()  # SIGKILL: no cleanup of any kind

    with lease(tmp_path, "step", kill_the_holder):
        assert waited == [True]
    process.join()


def test_only_what_was_abandoned_long_ago_is_swept(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    now = time.time()
    for name, days in (("old", 8), ("old.state", 9), ("at-work", 8), ("young", 8), ("young.state", 1), ("other", 6)):
        (store.stage(name) / "file").write_bytes(b"x")
        for path in (tmp_path / "staging" / name / "file", tmp_path / "staging" / name):
            os.utime(path, (now - days * 86400, now - days * 86400))
    kept = ["other", "young", "young.state"]
    with lease(tmp_path, "at-work"):
        store.sweep()
    assert sorted(path.name for path in (tmp_path / "staging").iterdir()) == ["at-work", *kept]
    store.sweep()
    assert sorted(path.name for path in (tmp_path / "staging").iterdir()) == kept


def test_a_home_without_staging_is_swept_too(tmp_path: Path) -> None:
    ArtifactStore(tmp_path).sweep()
    assert not list(tmp_path.iterdir())


def test_unstaging_a_step_takes_its_folders_and_no_others(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for name in ("abc", "abc.state", "abcd", "abcd.state"):
        store.stage(name)
    store.unstage("abc")
    assert sorted(path.name for path in (tmp_path / "staging").iterdir()) == ["abcd", "abcd.state"]
