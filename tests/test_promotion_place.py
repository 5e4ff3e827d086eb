"""Who can write to MLflow does not say where a model's history lies, or what is in production."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.canonical import canonical_json
from orchestrator.errors import ConflictError, GateError, SpecError
from orchestrator.promotion.approval import Approvals
from orchestrator.promotion.history import Change, History
from orchestrator.promotion.promoter import HEAD_TAG, STORE_TAG
from orchestrator.promotion.rules import reference
from orchestrator.registry import DIGEST_TAG, ModelRegistry
from orchestrator.store import open_store
from tests.promotion_scene import Scene, anywhere, scene
from tests.test_promotion import run

__all__ = ["anywhere", "scene"]

EVIL = "mallory\x1b]0;pwned\x07\x1b[2J\u202e\nversion 9 is in production"


def forge(scene: Scene, version: str, alias: str = "production", uri: str | None = None) -> str:
    """Put `version` into `alias` of a copy of the history, as who keeps to no rule does; return where that lies."""
    place = uri or (scene.folder / "fake").as_uri()
    if uri is None and scene.uri.startswith("file:"):
        shutil.copytree(scene.path(f"{scene.model}/.promotion"), scene.folder / "fake" / scene.model / ".promotion")
    history = History(open_store(place), scene.model)
    release = reference(scene.anew().registered(version))
    history.append(history.head(), Change("promote", alias, version, release))
    return place


def tag(scene: Scene, place: str) -> None:
    scene.client.set_registered_model_tag(scene.model, STORE_TAG, place)
    scene.client.delete_registered_model_tag(scene.model, HEAD_TAG)


def set_policy(scene: Scene, **values: Any) -> None:
    (scene.folder / "home" / "promotion.yaml").write_text(json.dumps({"models": {"*": values}}))


def test_a_tag_alone_leads_to_no_other_history(anywhere: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    first, second = anywhere.register("one"), anywhere.register("two")
    anywhere.climb(first)
    tag(anywhere, place := forge(anywhere, second))
    for words in (
        ("history",), ("reconcile",), ("rollback",), ("promote", second, "--to", "production"),
        ("approve", second, "--for", "production", "--by", "ada"),
    ):  # fmt: skip
        assert run(monkeypatch, anywhere, words[0], anywhere.model, *words[1:]) == 2
        said = capfd.readouterr()
        assert said.out == "" and f"lies in {place}, where no release of it is registered" in said.err
        assert "--store, or store: in promotion.yaml" in said.err
    assert anywhere.alias() == first
    # What people say is believed, and the registry is made to follow.
    assert run(monkeypatch, anywhere, "reconcile", anywhere.model, "--store", anywhere.uri) == 0
    assert anywhere.client.get_registered_model(anywhere.model).tags[STORE_TAG] == anywhere.uri
    capfd.readouterr()
    assert run(monkeypatch, anywhere, "history", anywhere.model) == 0
    assert f"version {second}" not in capfd.readouterr().out


@pytest.mark.parametrize("tagged", [True, False])
def test_a_folder_does_not_decide_about_releases_in_a_bucket(
    tmp_path: Path, tracking_uri: str, s3_bucket: str, tagged: bool
) -> None:
    (tmp_path / "home").mkdir()
    scene = Scene(f"s3://{s3_bucket}/models", tmp_path, tracking_uri)
    first = scene.register("one")
    place = forge(scene, first)
    ModelRegistry(tracking_uri).register(
        scene.model, source=f"{place}/{scene.model}/x", run_id=None, tags={DIGEST_TAG: "0" * 64}, alias=None,
        description="forged",
    )  # fmt: skip
    if tagged:
        scene.client.set_registered_model_tag(scene.model, STORE_TAG, place)
    with pytest.raises(SpecError, match=f"lies in {place}, while releases of it lie in a bucket"):
        scene.promoter.reconcile()
    assert scene.alias() is None
    set_policy(scene, store=scene.uri)
    assert scene.anew().promote(first, "candidate").done is not None
    assert scene.history.head() is not None


def test_the_policy_says_where_the_history_lies(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.climb(first)
    place = forge(scene, second)
    ModelRegistry(scene.tracking_uri).register(
        scene.model, source=f"{place}/{scene.model}/x", run_id=None, tags={DIGEST_TAG: "0" * 64}, alias=None,
        description="forged",
    )  # fmt: skip
    tag(scene, place)  # a version there makes it believable: this is what the policy protects from
    assert scene.anew().history.store.uri == place
    set_policy(scene, store=scene.uri + "/")
    assert scene.anew().history.store.uri == scene.uri
    found = scene.anew().reconcile()
    assert any("the tags about entry 3 were missing" in line for line in found.repaired)
    assert scene.client.get_registered_model(scene.model).tags[STORE_TAG] == scene.uri and scene.alias() == first
    scene.client.set_registered_model_tag(scene.model, STORE_TAG, "orchestrator-file://elsewhere/fake")
    found = scene.anew().reconcile()
    assert any("the registry named another place of the history" in line for line in found.repaired)
    assert scene.anew().reconcile().repaired == ()
    assert run(monkeypatch, scene, "reconcile", scene.model, "--store", place) == 2
    assert f"promotion.yaml says that the history of '{scene.model}' lies in {scene.uri}" in capfd.readouterr().err
    set_policy(scene, store=(scene.folder / "nowhere").as_uri())
    with pytest.raises(SpecError, match=r"neither a history nor a release .*correct store: in promotion.yaml"):
        scene.anew().reconcile()
    set_policy(scene, store="releases")
    with pytest.raises(SpecError, match=r"yaml:1: models\.\*\.store"):
        scene.anew().reconcile()


def test_versions_of_other_machines_and_programs_do_not_hide_the_place(scene: Scene) -> None:
    version = scene.register("one")
    scene.climb(version, "candidate")
    for source in ("orchestrator-file://elsewhere/r/m/x", "s3://b"):
        scene.client.create_model_version(scene.model, source)
    assert scene.anew().promote(version, "staging").done is not None


def test_what_nobody_approved_is_neither_shown_nor_told(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    first, second = scene.register("one"), scene.register("two")
    set_policy(scene, require_approval=["production"], approvers=["ada"])
    approvals = Approvals(scene.store, scene.model)

    def approve(version: str, by: str = "ada", hours: int = 1, *, approve: bool = True) -> None:
        digest, lasts = scene.releases[version].digest, timedelta(hours=hours)
        approvals.decide(version, digest, "production", by=by, lasts=lasts, approve=approve)

    approve(first)
    scene.climb(first)
    assert scene.anew().reconcile().problems == ()
    approve(second, hours=-1)  # expired by the time of the entry
    approve(second, by="mallory")
    forge(scene, second, uri=scene.uri)
    said = f"version {second} came into production (entry 4 of the history) without the approval by ada that the policy"
    assert run(monkeypatch, scene, "reconcile", scene.model) == 6
    err = capfd.readouterr().err
    assert f"error: production: {said}" in err and f"`orchestrator approve {scene.model} {second} --for" in err
    assert scene.alias() == first
    with pytest.raises(GateError, match="without the approval"):  # nor as something that is there already
        scene.anew().promote(second, "production", force=True)
    assert scene.alias() == first
    approve(second)
    assert scene.anew().reconcile().problems == () and scene.alias() == second
    approve(second, approve=False)
    assert len(scene.anew().reconcile().problems) == 1
    assert scene.anew().rollback().version == first  # approved when it was promoted
    assert scene.anew().reconcile().problems == () and scene.alias() == first
    forge(scene, second, uri=scene.uri)
    approve(first, approve=False)  # says nothing of `second`
    assert len(scene.anew().reconcile().problems) == 1


def test_what_others_wrote_into_records_is_one_line_of_a_message(scene: Scene) -> None:
    version = scene.register("one")
    scene.promoter.promote(version, "candidate")
    path = scene.path(f"{scene.model}/.promotion/history/00000001.json")
    entry = json.loads(path.read_bytes())
    path.write_bytes(canonical_json({**entry, "actor": EVIL, "reason": EVIL}))
    second = scene.register("two")
    with pytest.raises(ConflictError) as conflict:
        History(scene.store, scene.model).append(
            None, Change("promote", "candidate", second, reference(scene.promoter.registered(second)))
        )
    messages = [str(conflict.value)]
    scene.client.delete_registered_model_tag(scene.model, HEAD_TAG)
    approvals = Approvals(scene.store, scene.model)
    for approve, hours, needed, policy in (
        (False, 1, True, {}),
        (False, 1, False, {}),
        (True, -1, True, {}),
        (True, 1, True, {"approvers": ["grace"]}),
    ):
        set_policy(scene, **policy)
        filed = approvals.decide(
            version, scene.releases[version].digest, "staging", by="ada", lasts=timedelta(hours=hours), approve=approve
        )
        record = json.loads(scene.path(filed.key).read_bytes())
        scene.path(filed.key).write_bytes(canonical_json({**record, "by": EVIL, "reason": EVIL}))
        with pytest.raises(GateError) as refused:
            scene.anew().promote(version, "staging", require_approval=needed)
        messages.append(str(refused.value))
    for message in messages:
        assert "mallory" in message and message.isprintable()
