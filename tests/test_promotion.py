"""Promotion against a real registry (sqlite) and real stores: a folder, and a bucket of an S3 server process."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator import cli
from orchestrator.errors import ConflictError, GateError, OrchestratorError, PreflightError, PublishError, SpecError
from orchestrator.promotion import history as history_module
from orchestrator.promotion import notify as notify_module
from orchestrator.promotion import timeline
from orchestrator.promotion.approval import Approvals, parse_duration
from orchestrator.promotion.history import ACTOR_VARIABLE, Entry, History, actor, written
from orchestrator.promotion.policy import VARIABLE, policy_for
from orchestrator.promotion.promoter import HEAD_TAG, STORE_TAG, VERSION_TAG, Promoter
from tests.promotion_scene import Scene, anywhere, scene
from tests.s3_server import FaultyProxy, s3_client, use_endpoint

__all__ = ["anywhere", "scene"]

LADDER = ("candidate", "staging", "production")


def run(monkeypatch: pytest.MonkeyPatch, scene: Scene, *words: str) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", scene.tracking_uri)
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(scene.folder / "home"))
    monkeypatch.setattr("sys.argv", ["orchestrator", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_version_climbs_and_the_store_the_alias_and_the_tags_say_so(
    anywhere: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ACTOR_VARIABLE, "ada")
    first, second = anywhere.register("one"), anywhere.register("two")
    anywhere.climb(first)
    for alias in LADDER:
        done = anywhere.promoter.promote(second, alias, reason=f"to {alias}").done
        assert done is not None
        assert anywhere.alias(alias) == second
    entries = anywhere.history.entries()
    assert [stored.entry.sequence for stored in entries] == [1, 2, 3, 4, 5, 6]
    last = entries[-1].entry
    assert (last.kind, last.alias, last.version, last.actor, last.reason) == (
        "promote",
        "production",
        second,
        "ada",
        "to production",
    )
    assert last.release.digest == anywhere.releases[second].digest
    assert last.previous is not None and last.previous.version == first
    assert abs(datetime.now(UTC) - last.at) < timedelta(minutes=5)
    assert {alias: placed.version for alias, placed in last.state.items()} == dict.fromkeys(LADDER, second)
    raw = anywhere.store.read_record(f"{anywhere.model}/.promotion/history/00000005.json")
    assert raw is not None and last.previous_sha256 == hashlib.sha256(raw).hexdigest()
    model = anywhere.client.get_registered_model(anywhere.model)
    assert model.tags[STORE_TAG] == anywhere.store.uri
    assert model.tags[HEAD_TAG] == f"6:{entries[-1].sha256}"
    assert anywhere.client.get_model_version(anywhere.model, second).tags[f"{VERSION_TAG}production"] == "6"


def test_promoting_what_is_there_changes_nothing(scene: Scene) -> None:
    version = scene.register("one", "candidate")
    scene.promoter.promote("candidate", "staging")
    assert scene.promoter.promote(version, "staging").done is None
    assert len(scene.history.entries()) == 1


def test_the_registrys_candidate_may_go_to_staging_and_nothing_may_skip_a_step(scene: Scene) -> None:
    first = scene.register("one", "candidate")
    second = scene.register("two")
    with pytest.raises(SpecError, match=f"version {second} of .* is not in candidate"):
        scene.promoter.promote(second, "staging")
    with pytest.raises(SpecError, match="is not in staging"):
        scene.promoter.promote(first, "production")
    assert scene.history.head() is None
    done = scene.promoter.promote(second, "production", force=True, reason="an emergency").done
    assert done is not None and done.entry.forced == ("is not in staging",)
    with pytest.raises(SpecError, match="is not in candidate and is in production already"):
        scene.promoter.promote(second, "staging")


def test_rollback_goes_back_step_by_step_and_to_a_version_named(anywhere: Scene) -> None:
    versions = [anywhere.register(content) for content in ("one", "two", "three")]
    for version in versions:
        anywhere.promoter.promote(version, "production", force=True)
    assert anywhere.promoter.rollback().version == versions[1]
    assert anywhere.alias() == versions[1]
    assert anywhere.promoter.rollback(reason="that was bad too").version == versions[0]
    with pytest.raises(SpecError, match=r"is the first of .* in production"):
        anywhere.promoter.rollback()
    assert anywhere.promoter.rollback(to=versions[2]).version == versions[2]
    assert anywhere.promoter.rollback().version == versions[1]
    assert anywhere.promoter.rollback(to=versions[1]).done is None
    assert anywhere.alias() == versions[1]
    entries = [stored.entry for stored in anywhere.history.entries()]
    assert [entry.kind for entry in entries] == ["promote"] * 3 + ["rollback"] * 4
    never = anywhere.register("four")
    with pytest.raises(SpecError, match=f"version {never} of .* never was in production"):
        anywhere.promoter.rollback(to=never)
    with pytest.raises(SpecError, match="never had a version in staging"):
        anywhere.promoter.rollback("staging")


def test_rollback_reads_no_byte_of_a_model(anywhere: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in ("one", "two"):
        anywhere.promoter.promote(anywhere.register(content), "production", force=True)
    read: list[str] = []
    store = type(anywhere.store)
    real = store._read

    def watched(self: Any, key: str) -> Iterator[bytes]:
        read.append(key)
        return real(self, key)

    monkeypatch.setattr(store, "_read", watched)
    anywhere.promoter.rollback()
    assert read and not [key for key in read if key.endswith((".safetensors", "config.json"))]


def test_tampered_bytes_are_not_promoted(anywhere: Scene, request: pytest.FixtureRequest) -> None:
    version = anywhere.register("one", "candidate")
    key = f"{anywhere.model}/one/model.safetensors"
    if anywhere.uri.startswith("s3:"):
        bucket, _, prefix = anywhere.uri.removeprefix("s3://").partition("/")
        client = s3_client(request.getfixturevalue("s3_endpoint"))
        kept = client.head_object(Bucket=bucket, Key=f"{prefix}/{key}")["Metadata"]
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"eno" * 1000, Metadata=kept)
    else:
        anywhere.path(key).write_bytes(b"eno" * 1000)
    with pytest.raises(PublishError, match="is not what was published"):
        anywhere.promoter.promote(version, "staging")
    assert anywhere.history.head() is None and anywhere.alias("staging") is None


def test_another_release_under_the_same_name_is_not_promoted(scene: Scene) -> None:
    version = scene.register("one", "candidate")
    folder = scene.path(f"{scene.model}/one")
    listing = json.loads((folder / "release.json").read_bytes())
    body = json.dumps({**listing, "pipeline": "another"}).encode()
    for name, data in (("release.json", body), ("COMPLETE", hashlib.sha256(body).hexdigest().encode())):
        scene.path(f"{scene.model}/one/{name}").write_bytes(data)
    with pytest.raises(PublishError, match="is not the release that was registered"):
        scene.promoter.promote(version, "staging")


def test_a_release_that_lost_a_file_is_neither_promoted_nor_rolled_back_to(scene: Scene) -> None:
    first, second = scene.register("one"), scene.register("two")
    for version in (first, second):
        scene.promoter.promote(version, "production", force=True)
    scene.path(f"{scene.model}/one/config.json").unlink()
    with pytest.raises(PublishError, match="is not complete"):
        scene.promoter.rollback()
    with pytest.raises(PublishError, match=r"config.json is missing"):
        scene.promoter.promote(first, "staging", force=True)
    assert scene.alias() == second


def test_what_this_program_did_not_register_is_not_promoted(scene: Scene) -> None:
    version = scene.register("one")
    scene.client.delete_model_version_tag(scene.model, version, "orchestrator.digest")
    with pytest.raises(SpecError, match="was not registered by this program"):
        scene.promoter.promote(version, "candidate")
    with pytest.raises(SpecError, match="has no version 9"):
        scene.promoter.promote("9", "candidate")
    with pytest.raises(SpecError, match="there is no registered model 'nobody'"):
        Promoter("nobody", scene.settings).promote("1", "candidate")
    with pytest.raises(SpecError, match="none of the aliases"):
        scene.promoter.promote(version, "champion")


def test_expect_is_a_compare_and_swap_for_people(scene: Scene) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "candidate", expect="none")
    with pytest.raises(
        ConflictError, match=f"candidate of .* is at version {first} since entry 1, not at none"
    ) as refused:
        scene.promoter.promote(second, "candidate", expect="none")
    assert refused.value.exit_code == 6
    scene.promoter.promote(second, "candidate", expect=first)


def test_registering_moves_the_candidate_and_reconcile_leaves_it_there(scene: Scene) -> None:
    first = scene.register("one")
    scene.promoter.promote(first, "candidate")
    second = scene.register("two", "candidate")
    with pytest.raises(SpecError, match="is not in candidate"):
        scene.promoter.promote(first, "staging")
    assert scene.promoter.reconcile().repaired == ()
    assert scene.alias("candidate") == second
    scene.promoter.promote("candidate", "staging")
    scene.client.delete_registered_model_alias(scene.model, "candidate")
    assert len(scene.promoter.reconcile().repaired) == 1
    assert scene.alias("candidate") == first  # the last that anybody recorded


@pytest.mark.parametrize("alias", ["staging", "production"])
def test_a_specification_cannot_promote(alias: str) -> None:
    from orchestrator_serving.release import Release

    with pytest.raises(ValidationError, match="`orchestrator promote` takes it further"):
        Release(alias=alias)


# What the registry lost, and what a crash left


@pytest.mark.parametrize("lost", ["alias", "moved", "version tag", "model tags"])
def test_reconcile_mends_the_registry(scene: Scene, lost: str) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.climb(first)
    if lost == "alias":
        scene.client.delete_registered_model_alias(scene.model, "production")
    elif lost == "moved":
        scene.client.set_registered_model_alias(scene.model, "production", second)
    elif lost == "version tag":
        scene.client.delete_model_version_tag(scene.model, first, f"{VERSION_TAG}production")
    else:
        scene.client.delete_registered_model_tag(scene.model, STORE_TAG)
        scene.client.delete_registered_model_tag(scene.model, HEAD_TAG)
    found = scene.promoter.reconcile()
    said = {
        "alias": "production was at nothing in the registry",
        "moved": f"production was at version {second} in the registry",
        "version tag": "production: the tags about entry 3 were missing",
        "model tags": "the tags about entry",
    }[lost]
    assert any(said in line for line in found.repaired) and not found.problems
    assert scene.alias() == first
    assert scene.client.get_registered_model(scene.model).tags[STORE_TAG] == scene.store.uri
    again = scene.promoter.reconcile()
    assert (again.repaired, again.problems, again.unrecorded) == ((), (), ())


def test_reconcile_says_what_it_cannot_mend(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "candidate")
    scene.promoter.promote(second, "production", force=True)
    scene.client.set_registered_model_alias(scene.model, "staging", first)
    scene.client.delete_model_version(scene.model, second)
    found = scene.promoter.reconcile()
    assert [f"staging is at version {first} in the registry, and no promotion put it there"] == list(found.unrecorded)
    assert [problem.where for problem in found.problems] == ["production"]
    assert f"has no version {second}" in found.problems[0].what
    assert run(monkeypatch, scene, "reconcile", scene.model) == 6
    assert f"error: production: model '{scene.model}' has no version {second}" in capfd.readouterr().err


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("rolls_back", [False, True], ids=["promote", "rollback"])
@pytest.mark.parametrize("point", ["bytes", "before entry", "after entry", "after alias", "after version tag"])
def test_a_crash_between_two_writes_is_made_up_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, point: str, rolls_back: bool
) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "production", force=True)
    if rolls_back:
        scene.promoter.promote(second, "production", force=True)
    before, after = (second, first) if rolls_back else (first, second)
    entries = len(scene.history.entries())
    client, store = type(scene.client), type(scene.store)

    def die(*ignored: Any, **also: Any) -> Any:
        raise Killed

    def after_it(cls: Any, name: str) -> None:
        real = getattr(cls, name)

        def call(*values: Any, **options: Any) -> Any:
            real(*values, **options)
            raise Killed

        patched.setattr(cls, name, call)

    with monkeypatch.context() as patched:
        if point == "bytes":
            patched.setattr(store, "read_release" if rolls_back else "verify", die)
        elif point == "before entry":
            patched.setattr(store, "create_record", die)
        elif point == "after entry":
            after_it(store, "create_record")
        else:
            after_it(client, "set_registered_model_alias" if point == "after alias" else "set_model_version_tag")
        with pytest.raises(Killed):
            scene.promoter.rollback() if rolls_back else scene.promoter.promote(second, "production", force=True)
    happened = point not in ("bytes", "before entry")
    assert len(scene.history.entries()) == entries + happened
    found = scene.promoter.reconcile()
    assert not found.problems and bool(found.repaired) == (point in ("after entry", "after alias"))
    assert scene.alias() == (after if happened else before)
    assert scene.promoter.reconcile().repaired == ()
    head = scene.history.head()
    assert head is not None and head.entry.state["production"].version == scene.alias()
    # And it goes on from there.
    scene.promoter.promote(after, "production", force=True)
    assert scene.alias() == after


def test_a_registry_that_fails_after_the_entry_is_said_and_mended(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = scene.register("one", "candidate")
    with monkeypatch.context() as patched:

        def fail(*ignored: Any, **also: Any) -> None:
            raise OSError("the network is down")

        patched.setattr(type(scene.client), "set_registered_model_alias", fail)
        with pytest.raises(PublishError, match=r"is in staging \(entry 1 of the history\), but the registry") as failed:
            scene.promoter.promote(version, "staging")
    assert "orchestrator reconcile" in str(failed.value)
    assert scene.promoter.reconcile().repaired == (
        f"staging was at nothing in the registry, is at version {version} again",
    )


# A history that somebody changed


def test_a_changed_entry_is_found(scene: Scene) -> None:
    scene.climb(scene.register("one"))
    path = scene.path(f"{scene.model}/.promotion/history/00000002.json")
    entry = json.loads(path.read_bytes())
    path.write_bytes(json.dumps({**entry, "actor": "somebody else"}).encode())
    for use in (scene.history.entries, scene.history.head, scene.anew().rollback, scene.anew().reconcile):
        with pytest.raises(PublishError, match="entry 3 does not follow the entry before it"):
            use()


def test_a_history_that_lost_its_end_or_was_replaced_is_found(scene: Scene) -> None:
    version = scene.register("one")
    scene.climb(version)
    last = scene.path(f"{scene.model}/.promotion/history/00000003.json")
    entry = json.loads(last.read_bytes())
    last.unlink()
    with pytest.raises(PublishError, match="the registry knows of 3 entries, and it has 2"):
        scene.anew().promote(version, "production")
    with pytest.raises(PublishError, match="the registry knows of 3 entries"):
        scene.anew().reconcile()
    last.write_bytes(json.dumps({**entry, "nonce": "another"}).encode())
    with pytest.raises(PublishError, match="its entry 3 was replaced"):
        scene.anew().rollback()
    scene.path(f"{scene.model}/.promotion/history/00000001.json").unlink()
    with pytest.raises(PublishError, match="entry 1 is missing"):
        scene.history.entries()


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 2},
        {"sequence": "1"},
        {"sequence": True},
        {"model": "another"},
        {"time": "yesterday"},
        {"version": "-1"},
        {"state": {}},
        {"extra": 1},
        {"previous_sha256": "0" * 64},
        {"release": {"name": "x", "uri": "file:///x", "digest": "short"}},
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"sequence": 1',
        b"x" * ((1 << 20) + 1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_entry_is_refused(scene: Scene, change: Any) -> None:
    scene.promoter.promote(scene.register("one"), "candidate")
    path = scene.path(f"{scene.model}/.promotion/history/00000001.json")
    entry = json.loads(path.read_bytes())
    path.write_bytes(change if isinstance(change, bytes) else json.dumps({**entry, **change}).encode())
    with pytest.raises(PublishError, match=r"is not an entry of this history|is no record"):
        scene.history.head()


@pytest.mark.parametrize("model", ["../other", ".hidden", "a/../b", "", "a//b"])
def test_a_name_cannot_lead_out_of_the_store(scene: Scene, model: str) -> None:
    with pytest.raises(SpecError):
        History(scene.store, model)


# When the store is not there, or not writable


def test_a_bucket_that_may_not_be_written_to_leaves_everything_as_it_was(
    s3_bucket: str, s3_endpoint: str, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(f"s3://{s3_bucket}/models", tmp_path, tracking_uri)
    version = scene.register("one", "candidate")
    with FaultyProxy(s3_endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        proxy.answer("PUT", ".promotion", 403, "AccessDenied", times=100)
        with pytest.raises(PublishError, match="denied PutObject"):
            scene.promoter.promote(version, "staging")
        assert scene.alias("staging") is None and scene.history.head() is None


def test_an_answer_that_got_lost_does_not_make_a_conflict(
    s3_bucket: str, s3_endpoint: str, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(f"s3://{s3_bucket}/models", tmp_path, tracking_uri)
    version = scene.register("one", "candidate")
    with FaultyProxy(s3_endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        proxy.answer("PUT", ".promotion", 500, "InternalError", times=1, after=True)
        assert scene.promoter.promote(version, "staging").done is not None
        assert proxy.answers_left() == 0
        assert len(scene.history.entries()) == 1


def test_a_folder_that_may_not_be_written_to_leaves_everything_as_it_was(scene: Scene) -> None:
    version = scene.register("one", "candidate")
    scene.path(f"{scene.model}/.promotion").write_text("in the way")
    with pytest.raises(PublishError, match="cannot write"):
        scene.promoter.promote(version, "staging")
    assert scene.alias("staging") is None


def test_a_store_that_does_not_answer_is_named(
    s3_bucket: str, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(f"s3://{s3_bucket}/models", tmp_path, tracking_uri)
    version = scene.register("one", "candidate")
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(PublishError, match=r"no answer, or half of one, from http://127.0.0.1:9"):
        scene.promoter.promote(version, "staging")
    assert scene.alias("staging") is None


def test_a_registry_that_does_not_answer_stops_a_rollback_before_it_happens(scene: Scene) -> None:
    for content in ("one", "two"):
        scene.promoter.promote(scene.register(content), "production", force=True)
    settings = type(scene.settings)(scene.folder / "home", "http://127.0.0.1:9")
    with pytest.raises(PreflightError, match="cannot be reached"):
        Promoter(scene.model, settings, scene.uri).rollback()
    assert len(scene.history.entries()) == 2


def test_where_the_history_is_does_not_hang_on_the_registry(scene: Scene, tmp_path: Path) -> None:
    first = scene.register("one")
    scene.climb(first)
    scene.client.delete_registered_model_tag(scene.model, STORE_TAG)
    scene.client.delete_registered_model_tag(scene.model, HEAD_TAG)
    elsewhere = Scene((tmp_path / "elsewhere").as_uri(), tmp_path, scene.tracking_uri, model=scene.model)
    second = elsewhere.register("two")
    # Releases in two stores, a history in one of them: that one is meant, and it goes on there.
    scene.anew().promote(second, "production", force=True)
    assert scene.history.head() is not None and elsewhere.history.head() is None
    assert scene.promoter.rollback().version == first


# Approvals


def approve(scene: Scene, version: str, **changes: Any) -> None:
    values = {"by": "ada", "lasts": timedelta(hours=1), **changes}
    digest = values.pop("digest", scene.releases[version].digest)
    alias = values.pop("alias", "production")
    Approvals(scene.store, scene.model).decide(version, digest, alias, **values)


def test_an_approval_lets_a_release_pass_and_is_in_the_history(anywhere: Scene) -> None:
    version = anywhere.register("one")
    anywhere.climb(version, "staging")
    with pytest.raises(GateError, match="is not approved for production") as refused:
        anywhere.promoter.promote(version, "production", require_approval=True)
    assert refused.value.exit_code == 5 and "orchestrator approve" in str(refused.value)
    approve(anywhere, version, reason="looked at the report")
    done = anywhere.promoter.promote(version, "production", require_approval=True).done
    assert done is not None and done.entry.approval is not None and done.entry.approval.by == "ada"
    raw = anywhere.store.read_record(done.entry.approval.key)
    assert raw is not None and hashlib.sha256(raw).hexdigest() == done.entry.approval.sha256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"digest": "0" * 64}], "is not approved"),
        ([{"alias": "staging"}], "is not approved"),
        ([{"lasts": timedelta(seconds=-1)}], "approval by ada expired at"),
        ([{"approve": False, "reason": "too slow"}], "ada rejected .* too slow"),
        ([{}, {"by": "grace", "approve": False}], "grace rejected"),
    ],
    ids=["another release", "another alias", "expired", "rejected", "taken back"],
)
def test_an_approval_that_does_not_hold(scene: Scene, changes: list[dict[str, Any]], said: str) -> None:
    version = scene.register("one")
    scene.climb(version, "staging")
    for change in changes:
        approve(scene, version, **change)
    for force in (False, True):
        with pytest.raises(GateError, match=said):
            scene.promoter.promote(version, "production", require_approval=True, force=force)
    assert scene.alias() is None


def test_an_approval_from_the_future_means_that_clocks_disagree(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    version = scene.register("one")
    with monkeypatch.context() as patched:
        tomorrow = written(datetime.now(UTC) + timedelta(days=1))
        patched.setattr("orchestrator.promotion.approval.written", lambda time: tomorrow)
        approve(scene, version)
    with pytest.raises(GateError, match="one of two clocks is wrong"):
        scene.promoter.promote(version, "production", force=True, require_approval=True)


def test_something_else_among_the_approvals_is_no_approval(scene: Scene) -> None:
    version = scene.register("one")
    approve(scene, version)
    folder = f"{scene.model}/.promotion/approvals/{scene.releases[version].digest}/production"
    scene.path(f"{folder}/000002.json").write_bytes(scene.path(f"{folder}/000001.json").read_bytes()[:-1])
    with pytest.raises(PublishError, match="no decision about this release"):
        scene.promoter.promote(version, "production", force=True, require_approval=True)


@pytest.mark.parametrize("text", ["", "1", "h", "0h", "-1h", "1.5h", "24 h", "9999999h", "999999w"])
def test_a_duration_that_is_none(text: str) -> None:
    with pytest.raises(SpecError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "\udcff", "x" * 1001])
def test_a_text_that_no_record_should_hold(scene: Scene, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    version = scene.register("one")
    for call in (
        lambda: scene.promoter.promote(version, "candidate", reason=text),
        lambda: approve(scene, version, reason=text),
        lambda: approve(scene, version, by=text),
    ):
        with pytest.raises(SpecError, match="is too long, or holds line breaks"):
            call()
    assert scene.history.head() is None and scene.store.list_records(f"{scene.model}/.promotion/approvals") == []
    with pytest.raises(SpecError, match=ACTOR_VARIABLE):
        actor({ACTOR_VARIABLE: text})


def test_other_files_beside_the_entries_do_not_matter(scene: Scene) -> None:
    scene.promoter.promote(scene.register("one"), "candidate")
    for name in ("00000000.json", "000000001.json", "1.json", "notes.txt", "٠٠٠٠٠٠٠٢.json"):
        scene.path(f"{scene.model}/.promotion/history/{name}").write_text("x")
    assert [stored.entry.sequence for stored in scene.history.entries()] == [1]
    assert scene.history.head() == scene.history.entries()[0]


def test_who_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert actor({ACTOR_VARIABLE: "ci/42"}) == "ci/42"
    assert "@" in actor({ACTOR_VARIABLE: " "})


# The policy, and who is told


def set_policy(scene: Scene, text: str) -> None:
    (scene.folder / "home" / "promotion.yaml").write_text(text)


def test_a_policy_asks_for_approvals_by_certain_people(scene: Scene) -> None:
    set_policy(
        scene, f"models:\n  {scene.model[:8]}*: {{require_approval: [production], approvers: [grace]}}\n  '*': {{}}\n"
    )
    version = scene.register("one")
    scene.climb(version, "staging")
    approve(scene, version)
    with pytest.raises(GateError, match="not approved for production by grace; ada may not decide"):
        scene.promoter.promote(version, "production")
    approve(scene, version, by="grace")
    approve(scene, version, by="ada", approve=False)
    assert scene.promoter.promote(version, "production").done is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [", "not YAML"),
        ("models: {m: {require_aproval: [production]}}", "require_aproval: Extra inputs"),
        ("models: {m: {require_approval: [prod]}}", r"yaml:1: models.m.require_approval\[0\]: Input should be"),
        ("models: {m: {webhook: 'ftp://x'}}", "webhook"),
        ("models: {m: {webhook: 'https://user:secret@x'}}", "webhook"),
        ("", "Input should be"),
        ("models:\n  m: {require_approval: [production]}\n  m: {}\n", r"yaml:3: models.m: this key is given twice"),
        ("models: {m: {require_approval: [production], require_approval: []}}", "require_approval: this key is given"),
        ("models: {}\nmodels: {m: {}}\n", "yaml:2: models: this key is given twice"),
        ("models: {1: {}}", "this key is no text"),
        ("[" * 2000, "nested too deeply|not YAML"),
    ],
)
def test_a_policy_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "promotion.yaml").write_text(text)
    with pytest.raises(SpecError, match=said) as refused:
        policy_for("m", tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "user:secret" not in str(refused.value)


def test_a_policy_that_is_named_has_to_be_there(tmp_path: Path) -> None:
    assert policy_for("m", tmp_path).require_approval == ()
    with pytest.raises(PreflightError, match="cannot be read"):
        policy_for("m", tmp_path, {VARIABLE: str(tmp_path / "nowhere.yaml")})
    with pytest.raises(PreflightError, match="cannot be read"):
        policy_for("m", tmp_path, {VARIABLE: "~no-such-user/promotion.yaml"})


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]], list[int]]]:
    """A web server that takes notes; it answers with the codes in the list, then 204."""
    taken: list[tuple[dict[str, str], bytes]] = []
    codes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(codes.pop(0) if codes else 204)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/promotions?token=hidden", taken, codes
    server.shutdown()
    server.server_close()


def test_a_webhook_is_signed_as_the_standard_says(scene: Scene, receiver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, taken, codes = receiver
    monkeypatch.setattr(notify_module, "PAUSE_SECONDS", 0.01)
    secret = base64.b64encode(b"a secret of both").decode()
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    version = scene.register("one")
    with pytest.raises(PreflightError, match="ORCHESTRATOR_WEBHOOK_SECRET is not set"):
        scene.promoter.promote(version, "candidate")
    assert scene.history.head() is None
    monkeypatch.setenv("ORCHESTRATOR_WEBHOOK_SECRET", f"whsec_{secret}")
    codes += [503, 429]
    done = scene.promoter.promote(version, "candidate")
    assert [notice.problem for notice in done.notices] == [None]
    assert len(taken) == 3
    headers, body = taken[-1]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(b"a secret of both", signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert done.done is not None and headers["webhook-id"] == done.done.sha256
    document = json.loads(body)
    assert (document["event"], document["version"], document["alias"]) == ("model.promote", version, "candidate")
    assert document["release"]["digest"] == scene.releases[version].digest


@pytest.mark.parametrize(
    ("code", "said", "attempts"), [(404, "HTTP 404", 1), (307, "HTTP 307", 1), (500, "HTTP 500, 3 times", 3)]
)
def test_a_webhook_that_fails_is_reported_and_the_promotion_stands(
    scene: Scene,
    receiver: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    code: int,
    said: str,
    attempts: int,
) -> None:
    url, taken, codes = receiver
    codes += [code] * 3
    monkeypatch.setattr(notify_module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("ORCHESTRATOR_WEBHOOK_SECRET", "s3cret-of-both")
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    version = scene.register("one")
    assert run(monkeypatch, scene, "promote", scene.model, version, "--to", "candidate") == 0
    written_out = capfd.readouterr()
    assert f"was not told: {said}; the promotion stands" in written_out.err
    assert "hidden" not in written_out.err + written_out.out and "s3cret" not in written_out.err + written_out.out
    assert len(taken) == attempts
    assert scene.alias("candidate") == version


def test_a_webhook_to_nowhere_and_a_command(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify_module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("ORCHESTRATOR_WEBHOOK_SECRET", "s3cret-of-both")
    script = scene.folder / "deploy.sh"
    script.write_text(f"#!/bin/sh\ncat > {scene.folder}/told\nenv > {scene.folder}/env\nexit $CODE\n")
    script.chmod(0o755)
    set_policy(scene, f"models: {{'*': {{webhook: 'http://127.0.0.1:9/x', command: ['{script}']}}}}\n")
    monkeypatch.setenv("CODE", "0")
    version = scene.register("one")
    hook, command = scene.promoter.promote(version, "candidate").notices
    assert hook.target == "http://127.0.0.1:9" and hook.problem == "Connection refused, 3 times"
    assert command.problem is None
    assert json.loads((scene.folder / "told").read_text())["version"] == version
    assert "s3cret" not in (scene.folder / "env").read_text()
    monkeypatch.setenv("CODE", "3")
    assert scene.promoter.promote(version, "staging").notices[1].problem == "exit code 3"
    monkeypatch.setattr(notify_module, "COMMAND_SECONDS", 0.05)
    script.write_text("#!/bin/sh\nexec sleep 5\n")
    problem = scene.promoter.promote(version, "production").notices[1].problem
    assert problem is not None and "was ended" in problem
    script.unlink()
    assert scene.promoter.promote(scene.register("two"), "candidate").notices[1].problem == "No such file or directory"


# What was where at a time


def entries_at(*minutes: int, alias: str = "production") -> list[Entry]:
    """A history whose writers' clocks showed so many minutes; the version is the sequence number."""
    start = datetime(2026, 11, 29, 18, tzinfo=UTC)
    made = []
    for number, minute in enumerate(minutes, start=1):
        release = history_module.ReleaseRef(name="m/x", uri="file:///r/m/x", digest="0" * 64)
        placed = history_module.Placement(version=str(number), release=release, since=number, promoted=number)
        made.append(
            Entry(
                sequence=number,
                time=written(start + timedelta(minutes=minute)),
                kind="promote",
                model="m",
                alias=alias,
                version=str(number),
                release=release,
                previous=None,
                actor="a@b",
                reason=None,
                approval=None,
                previous_sha256=None if number == 1 else "0" * 64,
                state={alias: placed},
                nonce="0",
            )
        )
    return made


@pytest.mark.parametrize(
    ("minutes", "asked", "version", "others"),
    [
        ((0, 10, 20), -1, None, []),
        ((0, 10, 20), 0, "1", []),
        ((0, 10, 20), 15, "2", []),
        ((0, 10, 20), 99, "3", []),
        ((0, 30, 10, 40), 5, "1", []),  # the second clock is ahead, or the third behind
        ((0, 30, 10, 40), 20, "1", ["2", "3"]),
        ((0, 30, 10, 40), 30, "3", []),
        ((0, 30, 10, 40), 50, "4", []),
        ((20, 0), 10, None, ["1", "2"]),
    ],
)
def test_what_was_in_production_at_a_time(
    minutes: tuple[int, ...], asked: int, version: str | None, others: list[str]
) -> None:
    entries = entries_at(*minutes)
    answer = timeline.at(entries, "production", datetime(2026, 11, 29, 18, tzinfo=UTC) + timedelta(minutes=asked))
    assert (answer.entry.version if answer.entry else None) == version
    assert [other.version for other in answer.others] == others


def test_entries_of_other_aliases_are_no_answer_and_clocks_are_told() -> None:
    entries = entries_at(0, 30, 10)
    when = datetime(2027, 1, 1, tzinfo=UTC)
    assert timeline.at(entries, "staging", when) == timeline.Answer(None)
    assert [(one.sequence, after.sequence) for one, after in timeline.disagreements(entries)] == [(2, 3)]


@pytest.mark.parametrize(
    ("text", "hour"), [("2026-11-29T18:30", 18), ("2026-11-29T18:30+01:00", 17), ("2026-11-29T18:30Z", 18)]
)
def test_a_time_without_an_offset_is_utc(text: str, hour: int) -> None:
    assert timeline.parse_moment(text) == datetime(2026, 11, 29, hour, 30, tzinfo=UTC)
    with pytest.raises(SpecError, match="is no time"):
        timeline.parse_moment("yesterday")


# The command line


def test_the_commands(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv(ACTOR_VARIABLE, "ada")
    first, second = scene.register("one", "candidate"), scene.register("two")
    model = scene.model

    def json_of(*words: str) -> Any:
        capfd.readouterr()
        assert run(monkeypatch, scene, *words, "--json") == 0
        return json.loads(capfd.readouterr().out)

    assert run(monkeypatch, scene, "promote", model, "candidate", "--to", "staging", "--reason", "a test") == 0
    assert f"{model} version {first} is in staging; the first there; entry 1" in capfd.readouterr().out
    approved = json_of("approve", model, first, "--for", "production", "--by", "grace", "--expires", "7d")
    assert approved["digest"] == scene.releases[first].digest
    document = json_of("promote", model, "staging", "--to", "production", "--require-approval")
    assert document["changed"] and document["entry"]["approval"]["by"] == "grace"
    before = written(datetime.now(UTC))
    json_of("promote", model, second, "--to", "production", "--force")
    assert json_of("rollback", model, "--reason", "slow")["version"] == first
    document = json_of("history", model)
    assert [entry["kind"] for entry in document["entries"]] == ["promote", "promote", "promote", "rollback"]
    assert document["now"]["production"]["version"] == first
    answer = json_of("history", model, "--at", before)
    assert (answer["version"], answer["certain"]) == (first, True)
    assert json_of("history", model, "--at", "2020-01-01")["version"] is None
    assert len(json_of("history", model, "--alias", "staging")["entries"]) == 1
    found = json_of("reconcile", model)
    assert (found["repaired"], found["problems"]) == ([], [])
    assert found["unrecorded"] == []
    assert run(monkeypatch, scene, "history", model) == 0
    out = capfd.readouterr().out
    assert "rollback" in out and "forced: is not in staging" in out and "approved by grace" in out
    assert run(monkeypatch, scene, "approve", model, second, "--for", "production", "--by", "grace", "--reject") == 0
    assert "rejected for production by grace" in capfd.readouterr().out
    assert run(monkeypatch, scene, "promote", model, second, "--to", "production", "--require-approval", "--force") == 5
    assert run(monkeypatch, scene, "promote", model, second, "--to", "production") == 2
    assert run(monkeypatch, scene, "promote", model, second, "--to", "staging", "--expect", "none", "--force") == 6
    assert run(monkeypatch, scene, "history", model, "--at", "noon") == 2


def test_history_needs_no_registry(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    scene.promoter.promote(scene.register("one"), "candidate")
    monkeypatch.setattr(scene, "tracking_uri", "http://127.0.0.1:9")
    assert run(monkeypatch, scene, "history", scene.model, "--store", scene.uri) == 0
    assert "version 1" in capfd.readouterr().out
    assert run(monkeypatch, scene, "history", scene.model) == 3
    monkeypatch.setattr(scene, "model", "never")
    assert run(monkeypatch, scene, "history", "never", "--store", scene.uri) == 2
    assert "holds neither a history nor a release of 'never'" in capfd.readouterr().err
    scene.publish("one")
    assert run(monkeypatch, scene, "history", "models:/never", "--store", scene.uri) == 0
    assert "never: nothing was promoted yet" in capfd.readouterr().out


def test_clocks_that_disagree_are_said(scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "production", force=True)
    with monkeypatch.context() as patched:
        yesterday = written(datetime.now(UTC) - timedelta(days=1))
        patched.setattr(history_module, "written", lambda time: yesterday)
        scene.promoter.promote(second, "production", force=True)
    when = written(datetime.now(UTC) - timedelta(hours=1))
    assert run(monkeypatch, scene, "history", scene.model, "--at", when) == 0
    shown = capfd.readouterr()
    assert "note: clocks disagreed: entry 2" in shown.err
    assert "or, as clocks disagreed by then" in shown.out
    assert run(monkeypatch, scene, "history", scene.model, "--at", "2099-01-01", "--json") == 0
    assert json.loads(capfd.readouterr().out)["version"] == second


def test_errors_are_of_this_project(scene: Scene) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: Promoter(scene.model, scene.settings).rollback(),
        lambda: Promoter(scene.model, scene.settings, "ftp://x").rollback(),
        lambda: Promoter("../x", scene.settings, scene.uri).rollback(),
    ]
    for call in calls:
        with pytest.raises(OrchestratorError):
            call()
