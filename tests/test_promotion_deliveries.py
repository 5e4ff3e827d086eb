"""Who is told of a promotion, and what is told later: real web servers, real stores, processes that are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PublishError
from orchestrator.promotion import notify as notify_module
from orchestrator.promotion.deliveries import Deliveries
from orchestrator.registry import ModelRegistry
from tests.promotion_scene import Scene, anywhere, scene
from tests.test_promotion import Killed, run, set_policy

__all__ = ["anywhere", "scene"]


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, Any]], list[int]]]:
    """A receiver: its address, what it took as (webhook-id, document), and the codes that it answers first."""
    taken: list[tuple[str, Any]] = []
    codes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            code = codes.pop(0) if codes else 204
            if code < 300:
                taken.append((self.headers["webhook-id"], json.loads(body)))
            self.send_response(code)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setattr(notify_module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("ORCHESTRATOR_WEBHOOK_SECRET", "s3cret-of-both")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/promotions?token=hidden", taken, codes
    server.shutdown()
    server.server_close()


def told(scene: Scene) -> list[str]:
    return scene.store.list_records(f"{scene.model}/.promotion/deliveries")


def test_what_a_receiver_took_is_recorded_and_not_told_again(anywhere: Scene, hook: Any) -> None:
    url, taken, _ = hook
    set_policy(anywhere, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    done = anywhere.promoter.promote(anywhere.register("one"), "candidate").done
    assert done is not None and done.entry.tells == ("webhook",)
    assert [delivery for delivery, _ in taken] == [done.sha256]
    assert told(anywhere) == ["00000001-webhook.json"]
    record = anywhere.store.read_record(f"{anywhere.model}/.promotion/deliveries/00000001-webhook.json")
    assert record is not None and json.loads(record)["entry_sha256"] == done.sha256
    assert b"hidden" not in record and b"s3cret" not in record
    for _ in range(2):
        found = anywhere.anew().reconcile()
        assert (found.repaired, found.problems) == ((), ())
    assert len(taken) == 1


def test_a_webhook_that_was_down_is_told_by_reconcile_under_the_same_id(
    scene: Scene, hook: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    url, taken, codes = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    version = scene.register("one")
    codes += [500] * 3
    assert run(monkeypatch, scene, "promote", scene.model, version, "--to", "candidate") == 0
    said = capfd.readouterr().err
    assert "was not told: HTTP 500, 3 times" in said and f"`orchestrator reconcile {scene.model}` tries again" in said
    assert (taken, told(scene)) == ([], [])
    codes += [404]
    assert run(monkeypatch, scene, "reconcile", scene.model) == 6
    said = capfd.readouterr().err
    assert "candidate: http://127.0.0.1" in said and "was not told: HTTP 404" in said and "hidden" not in said
    assert run(monkeypatch, scene, "reconcile", scene.model) == 0
    assert "was told of entry 1" in capfd.readouterr().out
    head = scene.history.head()
    assert head is not None and [delivery for delivery, _ in taken] == [head.sha256]
    assert run(monkeypatch, scene, "reconcile", scene.model) == 0
    assert "nothing to repair" in capfd.readouterr().out and len(taken) == 1


def test_a_promotion_that_the_registry_did_not_show_is_told_once_it_does(
    scene: Scene, hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, taken, _ = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}', command: [/bin/sh, -c, 'cat >> {scene.folder}/told']}}}}\n")
    version = scene.register("one")
    with monkeypatch.context() as patched:

        def fail(*ignored: Any, **also: Any) -> None:
            raise OSError("the network is down")

        patched.setattr(type(scene.client), "set_registered_model_alias", fail)
        with pytest.raises(PublishError, match="orchestrator reconcile"):
            scene.promoter.promote(version, "production", force=True)
    assert taken == [] and not (scene.folder / "told").exists()
    found = scene.anew().reconcile()
    assert not found.problems
    assert [line.partition(":")[0] for line in found.repaired] == [
        f"production was at nothing in the registry, is at version {version} again",
        "production",
        "production",
    ]
    assert [document["version"] for _, document in taken] == [version]
    assert json.loads((scene.folder / "told").read_text())["version"] == version
    assert told(scene) == ["00000001-command.json", "00000001-webhook.json"]
    assert scene.anew().reconcile().repaired == ()


def test_who_is_killed_before_the_delivery_is_recorded_is_made_up_for(scene: Scene, hook: Any) -> None:
    url, taken, _ = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    version = scene.register("one")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.home import Settings\n"
        "from orchestrator.promotion.deliveries import Deliveries\n"
        "from orchestrator.promotion.promoter import Promoter\n"
        "Deliveries.add = lambda *a, **o: os.kill(os.getpid(), signal.SIGKILL)\n"
        "home, tracking, model, version = sys.argv[1:]\n"
        "Promoter(model, Settings(Path(home), tracking)).promote(version, 'candidate')\n"
    )
    words = [str(scene.folder / "home"), scene.tracking_uri, scene.model, version]
    done = subprocess.run([sys.executable, "-c", script, *words], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL and len(scene.history.entries()) == 1
    assert not scene.anew().reconcile().problems
    (first, document), again = taken  # twice, and the receiver knows it by its id
    assert again == (first, document)
    assert scene.anew().reconcile().repaired == () and told(scene) == ["00000001-webhook.json"]


@pytest.mark.parametrize("owner", [ModelRegistry, Deliveries], ids=["before the alias", "before the webhook"])
def test_who_ends_before_anybody_is_told_is_made_up_for(
    scene: Scene, hook: Any, monkeypatch: pytest.MonkeyPatch, owner: type
) -> None:
    url, taken, _ = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    version = scene.register("one")
    with monkeypatch.context() as patched:

        def die(*ignored: Any, **also: Any) -> None:
            raise Killed

        patched.setattr(owner, "show_promotion" if owner is ModelRegistry else "has", die)
        with pytest.raises(Killed):
            scene.promoter.promote(version, "candidate")
    assert (taken, len(scene.history.entries())) == ([], 1)
    assert not scene.anew().reconcile().problems
    assert [document["version"] for _, document in taken] == [version]
    assert scene.anew().reconcile().repaired == () and told(scene) == ["00000001-webhook.json"]


def test_what_no_longer_holds_is_not_told_late(scene: Scene, hook: Any) -> None:
    """A receiver that deploys what it hears of must not hear of a version that was rolled back."""
    url, taken, codes = hook
    first, second = scene.register("one"), scene.register("two")
    scene.promoter.promote(first, "production", force=True)  # nobody was to be told of this
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    codes += [400]
    assert scene.promoter.promote(second, "production", force=True).notices[0].problem == "HTTP 400"
    scene.promoter.rollback()
    assert [(document["event"], document["version"]) for _, document in taken] == [("model.rollback", first)]
    assert scene.anew().reconcile().repaired == () and len(taken) == 1
    assert scene.anew().promote(second, "staging", force=True).notices[0].told
    assert told(scene) == ["00000003-webhook.json", "00000004-webhook.json"]


def test_a_policy_that_no_longer_names_a_receiver_says_so(scene: Scene, hook: Any) -> None:
    url, taken, codes = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    codes += [400]
    scene.promoter.promote(scene.register("one"), "candidate")
    set_policy(scene, "models: {}\n")
    found = scene.anew().reconcile()
    assert "candidate: a webhook was not told: promotion.yaml names none here; entry 1" in found.unrecorded[0]
    assert (found.repaired, found.problems, taken) == ((), (), [])


def test_a_delivery_that_cannot_be_recorded_is_said_and_the_promotion_stands(
    scene: Scene, hook: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    url, taken, _ = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    version = scene.register("one")
    scene.path(f"{scene.model}/.promotion").mkdir()
    scene.path(f"{scene.model}/.promotion/deliveries").write_text("in the way")
    assert run(monkeypatch, scene, "promote", scene.model, version, "--to", "candidate") == 0
    assert "was told, but that could not be recorded" in capfd.readouterr().err
    assert len(taken) == 1 and scene.alias("candidate") == version


@pytest.mark.parametrize("data", [b"{}", b"\xff", b"[" * 5000])
def test_something_else_among_the_deliveries_is_refused(scene: Scene, hook: Any, data: bytes) -> None:
    url, taken, _ = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    scene.promoter.promote(scene.register("one"), "candidate")
    scene.path(f"{scene.model}/.promotion/deliveries/00000001-webhook.json").write_bytes(data)
    stored = scene.history.entries()[0]
    with pytest.raises(PublishError, match="does not say who was told of entry 1"):
        Deliveries(scene.store, scene.model).has(stored, "webhook")
    (problem,) = scene.anew().reconcile().problems
    assert "does not say who was told" in problem.what and len(taken) == 1


def test_a_secret_that_is_missing_stops_reconcile_from_telling_and_nothing_else(
    scene: Scene, hook: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, taken, codes = hook
    set_policy(scene, f"models: {{'*': {{webhook: '{url}'}}}}\n")
    codes += [400]
    version = scene.register("one")
    scene.promoter.promote(version, "production", force=True)
    scene.client.delete_registered_model_alias(scene.model, "production")
    monkeypatch.delenv("ORCHESTRATOR_WEBHOOK_SECRET")
    found = scene.anew().reconcile()
    assert "ORCHESTRATOR_WEBHOOK_SECRET is not set" in found.problems[0].what
    assert len(found.repaired) == 1 and scene.alias() == version and taken == []
