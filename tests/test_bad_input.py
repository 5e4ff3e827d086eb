"""What an impatient user meets: each fault is refused with what is wrong, where, and what to do; nothing is half done.

Real servers: moto's with authentication switched on, a socket that takes connections and never answers, MLflow's
registry over sqlite. The commands run as at a shell, in this process.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator import store_s3
from orchestrator.errors import GateError, PreflightError, PublishError, SpecError
from orchestrator.promotion import history as history_module
from orchestrator.promotion import notify as notify_module
from orchestrator.promotion import timeline
from orchestrator.promotion.history import ApprovalRef, Change, History, ReleaseRef, written
from orchestrator.promotion.policy import policy_for
from orchestrator.promotion.promoter import HEAD_TAG, STORE_TAG
from orchestrator.registry import DIGEST_TAG
from tests import s3_server
from tests.promotion_scene import Scene, scene
from tests.s3_server import free_port, use_endpoint
from tests.test_promotion import approve, run

__all__ = ["scene"]

READER = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
ADMIN = {"Effect": "Allow", "Action": "*", "Resource": "*"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, str]]]:
    """An S3 server that checks signatures and policies: user -> (key id, secret); its address is "endpoint"."""
    import boto3

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "6")  # so many calls make the users
        with s3_server.serve(tmp_path_factory.mktemp("guarded") / "moto.log") as endpoint:
            iam: Any = boto3.client(
                "iam", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
            )
            users = {"endpoint": (endpoint, "")}
            for name, statement in (("admin", ADMIN), ("reader", READER)):
                iam.create_user(UserName=name)
                policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
                iam.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=policy)
                key = iam.create_access_key(UserName=name)["AccessKey"]
                users[name] = key["AccessKeyId"], key["SecretAccessKey"]
            yield users


def be(monkeypatch: pytest.MonkeyPatch, guarded: dict[str, tuple[str, str]], user: str) -> None:
    use_endpoint(monkeypatch, guarded["endpoint"][0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", guarded[user][0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", guarded[user][1])


@pytest.fixture
def bucket(
    guarded: dict[str, tuple[str, str]], tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    """Two versions in a bucket of that server, the first in production."""
    import boto3

    be(monkeypatch, guarded, "admin")
    name = f"guarded-{time.time_ns()}"
    client: Any = boto3.Session().client(
        "s3", endpoint_url=guarded["endpoint"][0]
    )  # the default session keeps its first keys
    client.create_bucket(Bucket=name)
    (tmp_path / "home").mkdir()
    scene = Scene(f"s3://{name}/models", tmp_path, tracking_uri)
    scene.promoter.promote(scene.register("one"), "production", force=True)
    scene.register("two", "candidate")
    return scene


def commands(scene: Scene) -> dict[str, tuple[str, ...]]:
    """Every command that asks the store of a release."""
    model = scene.model
    return {
        "promote": ("promote", model, "2", "--to", "staging"),
        "rollback": ("rollback", model, "--to", "1"),
        "approve": ("approve", model, "2", "--for", "staging", "--by", "ada"),
        "history": ("history", model),
        "reconcile": ("reconcile", model),
        "pull": ("pull", f"models:/{model}/2", str(scene.folder / "pulled")),
    }


def refused(capfd: Any) -> str:
    """What was said: one message or more, each with a remedy; never a traceback."""
    said: str = capfd.readouterr().err
    assert "error: " in said and "; " in said and "Traceback" not in said and "fault of compression" not in said, said
    return said


@contextmanager
def silence() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        taken: list[Any] = []

        def take() -> None:
            while True:
                try:
                    taken.append(listening.accept())
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


# The bucket


def test_wrong_credentials_and_a_missing_bucket_are_named(
    bucket: Scene, guarded: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    wrong, key, secret = "wrong-very-secret", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
    faults: dict[tuple[str, ...], str] = {
        (secret,): "does not accept the AWS credentials",
        (key, secret): "does not accept the AWS credentials",
        (): "no AWS credentials were found",
    }
    for changed, said in faults.items():
        with monkeypatch.context() as patched:
            for variable in changed:
                patched.setenv(variable, wrong)
            if not changed:
                patched.delenv(secret)
            for name, words in commands(bucket).items():
                if name in ("promote", "pull") or changed == (secret,):
                    assert run(patched, bucket, *words) == 6, name
                    message = refused(capfd)
                    assert said in message and wrong not in message, message
    assert (len(bucket.history.entries()), bucket.alias(), bucket.alias("staging")) == (1, "1", None)
    assert not (bucket.folder / "pulled").exists()
    empty(bucket, guarded["endpoint"][0])
    for name, words in commands(bucket).items():
        assert run(monkeypatch, bucket, *words) == 6, name
        assert "there is no bucket" in refused(capfd)


def empty(scene: Scene, endpoint: str) -> None:
    """Delete the bucket, with all that is in it."""
    import boto3

    name = scene.uri.removeprefix("s3://").partition("/")[0]
    bucket: Any = boto3.Session().resource("s3", endpoint_url=endpoint).Bucket(name)
    bucket.objects.all().delete()
    bucket.delete()


def test_who_may_only_read_can_look_and_change_nothing(
    bucket: Scene, guarded: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    be(monkeypatch, guarded, "reader")
    for name, words in commands(bucket).items():
        code = run(monkeypatch, bucket, *words)
        if name in ("promote", "approve"):
            said = refused(capfd)
            assert code == 6 and "denied PutObject on bucket" in said and "s3:PutObject" in said
        else:
            assert code == 0, name  # production is at version 1 already
    be(monkeypatch, guarded, "admin")
    assert (len(bucket.history.entries()), bucket.alias("staging")) == (1, None)
    assert bucket.store.list_records(f"{bucket.model}/.promotion/approvals") == []


def test_a_server_that_never_answers_is_given_up_in_seconds(
    bucket: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(store_s3, "SILENCE_SECONDS", 0.3)
    with silence() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for name, words in commands(bucket).items():
            if name not in ("promote", "history", "pull"):
                continue
            began = time.monotonic()
            assert run(monkeypatch, bucket, *words) == 6, name
            assert time.monotonic() - began < 20
            assert f"no answer, or half of one, from {endpoint}" in refused(capfd)
    assert bucket.alias("staging") is None


def test_a_registry_that_never_answers_or_is_not_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    scene.promoter.promote(scene.register("one"), "candidate")
    monkeypatch.setattr("orchestrator.tracking.PROBE_SECONDS", 0.3)
    with silence() as address:
        for uri in (address, f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid:5000", "nonsense"):
            monkeypatch.setattr(scene, "tracking_uri", uri)
            for name, words in commands(scene).items():
                assert run(monkeypatch, scene, *words) == 3, name
                assert "MLFLOW_TRACKING_URI" in refused(capfd)
    assert len(scene.history.entries()) == 1


# The disk


def test_a_disk_that_is_full_leaves_nothing_half_done(scene: Scene) -> None:
    """The kernel refuses to write: here by a limit on files, as of a process, which needs no disk of its own."""
    version = scene.register("one", "candidate")
    release = scene.releases[version]
    promoter = scene.promoter
    promoter.resolve(version)  # MLflow's database is open, and only read until the entry is there
    calls: tuple[Callable[[], object], ...] = (
        lambda: scene.store.fetch(f"{scene.model}/one", scene.folder / "pulled"),
        lambda: promoter.promote(version, "staging"),
        lambda: approve(scene, version),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for call in calls:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(PublishError, match="disk is not full") as error:
                call()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert scene.store.uri in str(error.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(PreflightError, match="disk is not full"):  # found while planning
            scene.store.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert scene.history.head() is None and scene.alias("staging") is None
    assert not [path for path in scene.folder.iterdir() if "pulled" in path.name]
    assert list(scene.path(".incoming").iterdir()) == []
    assert scene.anew().promote(version, "staging").done
    assert scene.store.verify(f"{scene.model}/one") == release


# The registry


def test_a_registry_that_lost_an_alias_is_said_and_the_history_goes_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    first, second = scene.register("one"), scene.register("two", "candidate")
    scene.climb(first)
    scene.client.set_registered_model_alias(scene.model, "production", second)
    scene.client.delete_registered_model_alias(scene.model, "staging")
    capfd.readouterr()
    assert run(monkeypatch, scene, "history", scene.model) == 0
    shown = capfd.readouterr().err
    assert f"note: staging is at version none in the registry, not at {first}" in shown
    assert f"note: production is at version {second} in the registry, not at {first}" in shown and "reconcile" in shown
    # `staging` means what was decided, not where the registry's alias is
    assert scene.anew().resolve("staging")[0] == scene.anew().resolve("production")[0] == first
    assert scene.anew().promote("staging", "production").done is None
    assert scene.alias() == first
    assert run(monkeypatch, scene, "reconcile", scene.model) == 0
    assert "staging was at nothing in the registry" in capfd.readouterr().out
    assert run(monkeypatch, scene, "history", scene.model) == 0
    assert "note" not in capfd.readouterr().err


def test_a_registry_that_lost_a_version_a_tag_or_the_model(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    first, second = scene.register("one"), scene.register("two")
    for version in (first, second):
        scene.promoter.promote(version, "production", force=True)
    model, client = scene.model, scene.client
    client.delete_model_version(model, first)
    assert run(monkeypatch, scene, "rollback", model) == 2
    assert f"has no version {first}; known versions: {second}" in refused(capfd)
    assert run(monkeypatch, scene, "promote", model, first, "--to", "staging") == 2
    refused(capfd)
    client.set_model_version_tag(model, second, DIGEST_TAG, "no digest")
    assert run(monkeypatch, scene, "promote", model, second, "--to", "staging", "--force") == 6
    assert "that is no digest: 'no digest'" in refused(capfd)
    assert run(monkeypatch, scene, "reconcile", model) == 6
    assert "registered for another release than was put into production" in refused(capfd)
    client.delete_model_version_tag(model, second, DIGEST_TAG)
    assert run(monkeypatch, scene, "promote", model, second, "--to", "staging", "--force") == 2
    assert "was not registered by this program" in refused(capfd)
    client.delete_registered_model(model)
    for words in commands(scene).values():
        assert run(monkeypatch, scene, *words) == 2
        assert "there is no registered model" in refused(capfd)
    assert len(scene.history.entries()) == 2
    again = scene.register("two")  # what the model was is known to the store
    assert len(scene.anew().read()[1]) == 2 and scene.anew().resolve(again)[0] == again


def test_a_release_of_another_model_is_not_promoted(scene: Scene) -> None:
    foreign = Scene(scene.uri, scene.folder, scene.tracking_uri).publish("one")
    scene.client.create_registered_model(scene.model)
    made = scene.client.create_model_version(scene.model, foreign.uri, None, {DIGEST_TAG: foreign.digest})
    with pytest.raises(PublishError, match=f"is a release of 'model-.*', not of '{scene.model}'"):
        scene.promoter.promote(str(made.version), "candidate")
    with pytest.raises(SpecError, match="names no model version"):
        scene.promoter.promote("models:/other/1", "candidate")
    assert scene.history.head() is None


# The history


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_an_entry_in_the_middle_that_was_changed_or_removed_is_noticed_and_nothing_is_promoted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any, how: str
) -> None:
    versions = [scene.register(str(number)) for number in range(5)]
    for version in versions[:4]:
        scene.promoter.promote(version, "production", force=True)
    entry = scene.path(f"{scene.model}/.promotion/history/00000002.json")
    if how == "removed":
        entry.unlink()
    else:
        entry.write_bytes(entry.read_bytes().replace(b'"reason":null', b'"reason":"nothing"'))
    for words in (
        ("history", scene.model),
        ("history", scene.model, "--store", scene.uri),
        ("promote", scene.model, versions[4], "--to", "production", "--force"),
        ("reconcile", scene.model),
    ):
        assert run(monkeypatch, scene, *words) == 6
        assert "is damaged: entry" in refused(capfd)
    assert scene.alias() == versions[3]


def test_a_history_that_lost_its_end_is_noticed_by_history_too(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for content in ("one", "two"):
        scene.promoter.promote(scene.register(content), "production", force=True)
    scene.path(f"{scene.model}/.promotion/history/00000002.json").unlink()
    assert run(monkeypatch, scene, "history", scene.model) == 6
    assert "the registry knows of 2 entries, and it has 1" in refused(capfd)


@pytest.mark.parametrize("anchored", [True, False])
def test_a_second_history_is_not_begun_elsewhere(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, anchored: bool
) -> None:
    version = scene.register("one")
    scene.climb(version, "staging")
    if not anchored:
        for tag in (STORE_TAG, HEAD_TAG):
            scene.client.delete_registered_model_tag(scene.model, tag)
    words = ("promote", scene.model, version, "--to", "production", "--store", str(tmp_path / "elsewhere"))
    assert run(monkeypatch, scene, *words) in (2, 6)
    refused(capfd)
    assert not (tmp_path / "elsewhere").exists() and scene.alias() is None


# Clocks and approvals


def test_an_approval_is_for_one_promotion(scene: Scene) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "production", force=True)
    approve(scene, second)
    done = scene.promoter.promote(second, "production", force=True, require_approval=True).done
    assert done is not None and done.entry.approval is not None and done.entry.approval.expires is not None
    assert scene.promoter.promote(second, "production", require_approval=True).done is None  # nothing is to be decided
    scene.promoter.rollback()
    with pytest.raises(GateError, match="was for one promotion: entry 2 of the history"):
        scene.anew().promote(second, "production", force=True, require_approval=True)
    approve(scene, second)
    assert scene.anew().promote(second, "production", force=True, require_approval=True).done


def test_an_approval_that_expires_while_the_entry_is_written_does_not_count(tmp_path: Path) -> None:
    from orchestrator.store import open_store

    history = History(open_store(str(tmp_path)), "m")
    soon = ApprovalRef(key="k", sha256="0" * 64, by="ada", expires=written(datetime.now(UTC)))
    release = ReleaseRef(name="m/a", uri="file:///r/m/a", digest="0" * 64)
    with pytest.raises(GateError, match="expired at"):
        history.append(None, Change("promote", "production", "1", release, approval=soon))
    assert history.head() is None


def test_an_entry_from_the_future_is_said_and_now_is_certain(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "production", force=True)
    between = written(datetime.now(UTC))
    with monkeypatch.context() as patched:
        tomorrow = written(datetime.now(UTC) + timedelta(days=1))
        patched.setattr(history_module, "written", lambda time: tomorrow)
        scene.promoter.promote(second, "production", force=True)
    capfd.readouterr()
    for when, version, certain in (
        (written(datetime.now(UTC) + timedelta(seconds=5)), second, True),
        (between, first, True),
    ):
        assert run(monkeypatch, scene, "history", scene.model, "--at", when, "--json") == 0
        shown = capfd.readouterr()
        document = json.loads(shown.out)
        assert (document["version"], document["certain"]) == (version, certain)
        assert "note: clocks disagree: entry 2" in shown.err
    assert run(monkeypatch, scene, "rollback", scene.model) == 0  # the order is that of the entries


@pytest.mark.parametrize("text", ["0001-01-01T00:00+10:00", "9999-12-31T23:59-10:00"])
def test_a_time_outside_of_the_calendar(text: str) -> None:
    with pytest.raises(SpecError, match="outside of the calendar"):
        timeline.parse_moment(text)


def test_the_exact_instant_of_an_entry_counts_in_any_time_zone(scene: Scene, capfd: Any, monkeypatch: Any) -> None:
    first, second = scene.register("one"), scene.register("two")
    for version in (first, second):
        scene.promoter.promote(version, "production", force=True)
    moment = scene.history.entries()[1].entry.at
    for offset in (0, 330, -720):
        shifted = moment + timedelta(minutes=offset)
        sign = "+" if offset >= 0 else "-"
        tail = f"{sign}{abs(offset) // 60:02}:{abs(offset) % 60:02}"
        for step, version in ((0, second), (-1, first)):
            text = (shifted + timedelta(microseconds=step)).strftime("%Y-%m-%dT%H:%M:%S.%f") + tail
            capfd.readouterr()
            assert run(monkeypatch, scene, "history", scene.model, "--at", text, "--json") == 0
            assert json.loads(capfd.readouterr().out)["version"] == version


# Who is told


def test_a_receiver_that_answers_for_ever_does_not_hold_the_promotion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify_module, "DELIVERY_SECONDS", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4)

        def drip() -> None:
            peer, _ = listening.accept()
            for _ in range(200):
                try:
                    peer.sendall(b"x")
                except OSError:
                    return
                time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/secret-path"
        problem = notify_module.post(address, {}, "id", b"key")
        assert problem == "no whole answer within 0.5 s" and time.monotonic() - began < 5


def test_what_a_command_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify_module, "COMMAND_SECONDS", 0.5)
    words = ("/bin/sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    assert notify_module._run(words, {}, dict(os.environ)) == "it took more than 0.5 s and was ended"
    number = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what the command started still runs")


def test_a_policy_that_is_no_yaml_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "promotion.yaml").write_text("models:\n  x:\n    webhook: https://host/secret-token: [\n")
    with pytest.raises(SpecError, match=r"promotion.yaml:\d: this is not YAML") as error:
        policy_for("x", tmp_path, {})
    assert "secret-token" not in str(error.value)
