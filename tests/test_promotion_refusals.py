"""What promotion does not believe: damaged entries, a candidate that moved, rejected releases, odd names and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConflictError, GateError, PublishError, SpecError
from orchestrator.promotion import timeline
from orchestrator.promotion.history import ACTOR_VARIABLE, Change, ReleaseRef, actor
from orchestrator.registry import ModelRegistry
from tests.promotion_scene import Scene, anywhere, scene
from tests.test_promotion import approve, run, set_policy

__all__ = ["anywhere", "scene"]


def entry_path(scene: Scene, number: int) -> Path:
    return scene.path(f"{scene.model}/.promotion/history/{number:08}.json")


# Where a rollback goes to


@pytest.mark.parametrize("how", ["changed", "removed", "rewritten"])
def test_rollback_takes_its_target_from_no_entry_that_the_newest_does_not_prove(scene: Scene, how: str) -> None:
    versions = [scene.register(content) for content in ("one", "two", "three")]
    for version in versions:
        scene.promoter.promote(version, "production", force=True)
    for _ in range(3):  # other aliases move on, so that the entry in question is not beside the newest
        scene.promoter.promote(versions[0], "staging", force=True)
        scene.promoter.promote(versions[1], "staging", force=True)
    path = entry_path(scene, 3)
    entry = json.loads(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "changed":  # whoever may write to the store chooses what goes to production
        first = json.loads(entry_path(scene, 2).read_bytes())["previous"]
        path.write_bytes(json.dumps({**entry, "previous": first}).encode())
    else:
        path.write_bytes(json.dumps({**entry, "actor": "nobody"}).encode())
    for call in (scene.anew().rollback, lambda: scene.anew().rollback(to=versions[0])):
        with pytest.raises(PublishError, match=r"is damaged: entry (3 is missing|4 does not follow)"):
            call()
    assert scene.alias() == versions[2] and scene.history.head().entry.sequence == 9  # type: ignore[union-attr]


def test_damage_that_a_rollback_does_not_rest_on_does_not_stop_it(scene: Scene) -> None:
    first, second = scene.register("one"), scene.register("two")
    for version in (first, second, first, second):
        scene.promoter.promote(version, "production", force=True)
    entry_path(scene, 1).unlink()
    assert scene.anew().rollback().version == first
    with pytest.raises(PublishError, match="entry 1 is missing"):
        scene.anew().promote(second, "production", force=True)


def test_only_what_is_needed_of_a_long_history_is_read(scene: Scene) -> None:
    history = scene.history
    release = ReleaseRef(name="m/a", uri="file:///r/m/a", digest="0" * 64)
    head = None
    for number in range(1, 21):
        head = history.append(head, Change("promote", "production", str(number), release))
    fresh = scene.history
    assert [stored.entry.sequence for stored in fresh.since(18)] == [18, 19, 20]
    assert sorted(fresh._seen) == [18, 19, 20]
    assert [stored.entry.sequence for stored in scene.history.since(1)] == list(range(1, 21))


# The candidate, which registering moves too


def test_a_candidate_is_where_the_registry_says(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    first = scene.register("one")
    scene.promoter.promote(first, "candidate")
    second = scene.register("two", "candidate")
    with pytest.raises(ConflictError, match=f"candidate of .* is at version {second}, not at {first}"):
        scene.anew().promote(first, "candidate", expect=first)
    assert run(monkeypatch, scene, "promote", scene.model, first, "--to", "candidate", "--expect", second) == 0
    assert f"version {first} is in candidate; version {second} before; entry 2" in capfd.readouterr().out
    assert scene.alias("candidate") == first and len(scene.history.entries()) == 2
    assert run(monkeypatch, scene, "history", scene.model) == 0
    assert f"version {first} (was {second})" in capfd.readouterr().out
    assert scene.anew().promote(first, "candidate").done is None
    # Back to what the history said last before registering moved it.
    third = scene.register("three", "candidate")
    done = scene.anew().rollback("candidate", expect=third).done
    assert done is not None and (done.entry.version, done.entry.before) == (first, third)
    assert scene.alias("candidate") == first


def test_a_candidate_promoted_but_never_shown_is_not_put_back_over_one_registered_since(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scene.register("one")
    second = scene.register("two", "candidate")
    with monkeypatch.context() as patched:

        def fail(*ignored: Any, **also: Any) -> None:
            raise OSError("the network is down")

        patched.setattr(type(scene.client), "set_registered_model_alias", fail)
        with pytest.raises(PublishError):
            scene.promoter.promote(first, "candidate")
    found = scene.anew().reconcile()
    assert found.repaired == () and scene.alias("candidate") == second
    assert f"`orchestrator promote {scene.model} {first} --to candidate`" in found.unrecorded[0]
    assert scene.anew().promote(first, "candidate").done is not None
    assert scene.alias("candidate") == first and scene.anew().reconcile().unrecorded == ()


# Rejected releases


def test_what_was_rejected_is_not_rolled_back_to_unless_forced(
    anywhere: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (anywhere.folder / "home").mkdir(exist_ok=True)
    set_policy(anywhere, "models: {'*': {approvers: [ada]}}\n")
    first, second, third = (anywhere.register(content) for content in ("one", "two", "three"))
    for version in (first, second, third):
        anywhere.promoter.promote(version, "production", force=True)
    approve(anywhere, second, approve=False, reason="it swears")
    approve(anywhere, second, by="grace")  # who may not decide
    for words in (("rollback", anywhere.model), ("rollback", anywhere.model, "--to", second)):
        assert run(monkeypatch, anywhere, *words) == 5
        said = capfd.readouterr().err
        assert f"ada rejected version {second}" in said and "it swears" in said and "--force" in said
    assert anywhere.alias() == third and len(anywhere.history.entries()) == 3
    assert anywhere.promoter.rollback(to=first).version == first  # of which nobody said anything
    assert run(monkeypatch, anywhere, "rollback", anywhere.model, "--to", second, "--force", "--json") == 0
    assert json.loads(capfd.readouterr().out)["entry"]["forced"] == ["was rejected by ada"]
    assert run(monkeypatch, anywhere, "history", anywhere.model) == 0
    assert "forced: was rejected by ada" in capfd.readouterr().out
    anywhere.promoter.rollback(to=first)
    approve(anywhere, second)  # a newer decision
    assert anywhere.promoter.rollback(to=second).done is not None


def test_what_was_rejected_is_not_promoted_where_nobody_has_to_approve(scene: Scene) -> None:
    version = scene.register("one", "candidate")
    approve(scene, version, alias="staging", approve=False)
    with pytest.raises(GateError, match=f"ada rejected version {version} of .* for staging"):
        scene.promoter.promote(version, "staging")
    done = scene.promoter.promote(version, "staging", force=True).done
    assert done is not None and done.entry.forced == ("was rejected by ada",)


# Odd times, names and texts


@pytest.mark.parametrize(
    "text",
    ["0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00", "0001-01-01", "\udcff", "2026-13-01", "", "1e9", "now\n"],
)
def test_no_time_is_answered_with_a_traceback(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any, text: str
) -> None:
    scene.promoter.promote(scene.register("one"), "candidate")
    capfd.readouterr()
    code = run(monkeypatch, scene, "history", scene.model, f"--at={text}")
    shown = capfd.readouterr()
    assert code == (0 if text == "0001-01-01" else 2)
    assert "Traceback" not in shown.err and ("error: " in shown.err) == bool(code)
    if not code:
        assert "nothing was in production" in shown.out and timeline.parse_moment(text).year == 1


@pytest.mark.parametrize("name", ["\udcff", "x\x1b[31mRED\ny", "\u202e", "x" * 1001])
def test_a_user_whose_name_no_record_should_hold_is_asked_for_another(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any, name: str
) -> None:
    version = scene.register("one")
    monkeypatch.delenv(ACTOR_VARIABLE, raising=False)
    monkeypatch.setenv("LOGNAME", name)
    for words in (
        ("promote", scene.model, version, "--to", "candidate"),
        ("approve", scene.model, version, "--for", "staging", "--by", "ada"),
    ):
        assert run(monkeypatch, scene, *words) == 2
        said = capfd.readouterr().err
        assert "error: the user's name" in said and ACTOR_VARIABLE in said and "\x1b" not in said
    assert scene.history.head() is None and scene.store.list_records(f"{scene.model}/.promotion/history") == []
    monkeypatch.setenv(ACTOR_VARIABLE, "ada")
    assert actor() == "ada" and scene.promoter.promote(version, "candidate").done is not None


def test_what_others_wrote_into_the_store_steers_no_terminal(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    version = scene.register("one")
    scene.promoter.promote(version, "candidate")
    path = entry_path(scene, 1)
    entry = json.loads(path.read_bytes())
    text = "x\x1b[31mRED\ny\u202e"
    path.write_bytes(
        json.dumps({**entry, "actor": text, "reason": text, "time": "2999-01-01T00:00:00.000000Z"}).encode()
    )
    scene.client.delete_registered_model_tag(scene.model, "orchestrator.promotions.head")
    capfd.readouterr()
    assert run(monkeypatch, scene, "history", scene.model) == 0
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\u202e" not in shown.out + shown.err
    assert len(shown.out.splitlines()) == 1 and r"x\x1b[31mRED\ny\u202e" in shown.out
    assert len(shown.err.splitlines()) == 1 and "clocks disagree" in shown.err
    assert run(monkeypatch, scene, "history", scene.model, "--json") == 0
    document = capfd.readouterr().out
    assert "\x1b" not in document and json.loads(document)["entries"][0]["actor"] == text


# Wrong places and names


def test_a_store_that_has_nothing_of_the_model_is_refused(
    anywhere: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    (anywhere.folder / "home").mkdir(exist_ok=True)
    model, version = anywhere.model, anywhere.register("one")
    elsewhere = tmp_path / "nowhere"
    for words in (
        ("history", model),
        ("reconcile", model),
        ("rollback", model),
        ("promote", model, version, "--to", "candidate"),
        ("approve", model, version, "--for", "staging", "--by", "ada"),
    ):
        assert run(monkeypatch, anywhere, *words, "--store", str(elsewhere)) == 2
        shown = capfd.readouterr()
        assert shown.out == "" and "holds neither a history nor a release of" in shown.err
    assert not elsewhere.exists()
    assert run(monkeypatch, anywhere, "history", model, "--store", anywhere.uri) == 0
    assert run(monkeypatch, anywhere, "history", model) == 0
    assert capfd.readouterr().out.count("nothing was promoted yet") == 2
    assert run(monkeypatch, anywhere, "history", "nosuch", "--store", anywhere.uri) == 2
    assert run(monkeypatch, anywhere, "history", "nosuch") == 2
    assert "there is no registered model 'nosuch'" in capfd.readouterr().err
    assert run(monkeypatch, anywhere, "promote", model, version, "--to", "candidate", "--store", anywhere.uri) == 0


def test_a_lost_alias_names_what_brings_it_back(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    version = scene.register("one")
    scene.climb(version)
    scene.client.delete_registered_model_alias(scene.model, "production")
    assert run(monkeypatch, scene, "pull", f"models:/{scene.model}@production", str(scene.folder / "pulled")) == 2
    said = capfd.readouterr().err
    assert "has no alias 'production'" in said and f"`orchestrator reconcile {scene.model}`" in said
    assert scene.anew().promote("production", "staging", force=True).done is None  # the history knows
    scene.promoter.reconcile()
    assert ModelRegistry(scene.tracking_uri).resolve(f"models:/{scene.model}@production").version == version
    with pytest.raises(SpecError, match="has no alias 'champion'; known aliases"):
        ModelRegistry(scene.tracking_uri).resolve(f"models:/{scene.model}@champion")
    # An alias that nobody ever promoted to is not lost.
    other = Scene(scene.uri, scene.folder, scene.tracking_uri)
    other.promoter.promote(other.register("other"), "candidate")
    with pytest.raises(SpecError, match="has no alias 'production'; known aliases: candidate"):
        ModelRegistry(scene.tracking_uri).resolve(f"models:/{other.model}@production")


@pytest.mark.parametrize("version", ["9" * 19, "9" * 30, "٣"])
def test_a_number_that_is_none_is_refused_before_mlflow_is_asked(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any, version: str
) -> None:
    scene.promoter.promote(scene.register("one"), "production", force=True)
    for words in (
        ("promote", scene.model, version, "--to", "staging"),
        ("rollback", scene.model, "--to", version),
        ("approve", scene.model, version, "--for", "staging", "--by", "ada"),
        ("pull", f"models:/{scene.model}/{version}", str(scene.folder / "pulled")),
    ):
        assert run(monkeypatch, scene, *words) == 2
        said = capfd.readouterr().err
        assert "error: " in said and "MLFLOW_TRACKING_URI" not in said and "Traceback" not in said
    assert len(scene.history.entries()) == 1


def test_a_model_may_be_named_as_mlflow_names_it(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    version = scene.register("one", "candidate")
    name = f"models:/{scene.model}"
    assert run(monkeypatch, scene, "promote", name, version, "--to", "staging") == 0
    assert f"{scene.model} version {version} is in staging" in capfd.readouterr().out
    assert run(monkeypatch, scene, "approve", name, version, "--for", "production", "--by", "ada") == 0
    assert run(monkeypatch, scene, "reconcile", name) == 0
    assert run(monkeypatch, scene, "history", name, "--json") == 0
    assert name not in (out := capfd.readouterr().out) and f'"model": "{scene.model}"' in out
    assert run(monkeypatch, scene, "history", f"{name}/1") == 2
    assert f"did you mean '{scene.model}'?" in capfd.readouterr().err
