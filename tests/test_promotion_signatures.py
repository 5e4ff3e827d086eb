"""Promotion demands signatures: of releases in a real store, signed with real keys, registered in a real MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError, PreflightError, PublishError
from orchestrator.promotion.history import parse_record
from orchestrator.promotion.signature import SIGNED_BY_TAG
from orchestrator.release import SIGNATURE
from orchestrator.signing import VERIFY_KEY_VARIABLE, VerifyKey
from tests.promotion_scene import Scene, anywhere, scene
from tests.test_promotion import run
from tests.test_signing import make_keys

__all__ = ["anywhere", "scene"]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path, "mine")


def nothing_moved(scene: Scene) -> bool:
    return scene.history.head() is None and scene.alias("staging") is None and scene.alias() is None


def test_a_signed_release_is_promoted_and_the_history_says_by_which_key(
    anywhere: Scene, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (anywhere.register(content, "candidate", signing_key=keys[0]) for content in ("one", "two"))
    signer = VerifyKey.read(keys[1]).fingerprint
    anywhere.promoter.promote(first, "production", force=True, verify_key=keys[1])
    monkeypatch.setenv(VERIFY_KEY_VARIABLE, str(keys[1]))
    anywhere.promoter.promote(second, "production", force=True)
    anywhere.promoter.rollback()
    monkeypatch.delenv(VERIFY_KEY_VARIABLE)
    anywhere.promoter.promote(second, "production", force=True)
    said = [stored.entry.signature for stored in anywhere.history.entries()]
    assert [(one.signed_by, one.verified) for one in said if one] == [(signer, True)] * 3 + [(signer, False)]


@pytest.mark.parametrize("how", ["unsigned", "other key", "stripped", "re-signed", "about other files", "forged"])
def test_what_the_key_has_not_signed_is_refused_before_anything_moves(
    scene: Scene, keys: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    other = make_keys(tmp_path, "other")
    key = {"unsigned": None, "other key": other[0]}.get(how, keys[0])
    version = scene.register("one", "candidate", signing_key=key)
    release = scene.releases[version]
    name = f"{release.uri.removeprefix(scene.store.uri + '/')}/{SIGNATURE}"
    signature = scene.store.read_record(name)
    if how in ("stripped", "re-signed", "forged", "about other files"):
        assert signature is not None
        forged = signature.replace(b'"sig":"M', b'"sig":"N')
        elsewhere = scene.releases[scene.register("two", signing_key=keys[0])]
        about = scene.store.read_record(f"{elsewhere.uri.removeprefix(scene.store.uri + '/')}/{SIGNATURE}")
        replaced = {
            "stripped": None,
            "re-signed": _signed_by(scene, version, other[0]),
            "about other files": about,
            "forged": forged,
        }
        _put(scene, name, replaced[how])
    said = {
        "unsigned": "is not signed, and a signature is demanded",
        "stripped": "is not signed, and a signature is demanded",
        "other key": "not by the one demanded",
        "re-signed": "not by the one demanded",
        "about other files": "about other files than those published",
        "forged": "forged or damaged",
    }
    for call in (
        lambda: scene.anew().promote(version, "staging", verify_key=keys[1]),
        lambda: scene.anew().promote(version, "production", verify_key=keys[1], force=True),
    ):
        with pytest.raises(PublishError, match=said[how]) as error:
            call()
        assert error.value.problems[0].remedy
    assert nothing_moved(scene)


def _signed_by(scene: Scene, version: str, key: Path) -> bytes:
    from orchestrator.signing import SigningKey

    release = scene.releases[version]
    return SigningKey.read(key).sign(release, release.uri.rpartition("/")[2])


def _put(scene: Scene, key: str, data: bytes | None) -> None:
    """Replace an object behind the store's back; None: remove it."""
    path = scene.path(key)
    path.unlink()
    if data is not None:
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["stripped", "re-signed", "not a fingerprint"])
def test_also_where_no_key_is_demanded_a_release_keeps_the_signature_it_was_registered_with(
    scene: Scene, keys: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    version = scene.register("one", "candidate", signing_key=keys[0])
    key = f"{scene.releases[version].uri.removeprefix(scene.store.uri + '/')}/{SIGNATURE}"
    if how == "not a fingerprint":
        bundle = json.loads(scene.path(key).read_bytes())
        bundle["verificationMaterial"]["publicKey"]["hint"] = "\x1b[2Jada"
        _put(scene, key, json.dumps(bundle).encode())
    else:
        other = make_keys(tmp_path, "other")[0]
        _put(scene, key, _signed_by(scene, version, other) if how == "re-signed" else None)
    with pytest.raises(PublishError, match=r"was registered as signed by|names no key") as error:
        scene.promoter.promote(version, "staging")
    assert "\x1b" not in str(error.value) and nothing_moved(scene)


def test_rollback_to_what_the_key_has_not_signed_is_refused(scene: Scene, keys: tuple[Path, Path]) -> None:
    unsigned, signed = scene.register("one"), scene.register("two", signing_key=keys[0])
    for version in (unsigned, signed):
        scene.promoter.promote(version, "production", force=True)
    with pytest.raises(PublishError, match="is not signed, and a signature is demanded"):
        scene.promoter.rollback(verify_key=keys[1])
    assert (scene.alias(), len(scene.history.entries())) == (signed, 2)
    assert scene.promoter.rollback().version == unsigned


def test_what_is_there_already_is_not_said_to_be_signed(scene: Scene, keys: tuple[Path, Path]) -> None:
    version = scene.register("one", "candidate")
    scene.promoter.promote(version, "staging")
    with pytest.raises(PublishError, match="is not signed"):
        scene.promoter.promote(version, "staging", verify_key=keys[1])


def test_the_policys_keys_are_demanded_and_nobody_gets_around_them(
    scene: Scene, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was changed stays beside the new one, so that what it has signed can be rolled back to."""
    new, stranger = make_keys(tmp_path, "new"), make_keys(tmp_path, "stranger")
    versions = [scene.register(str(number), signing_key=pair[0]) for number, pair in enumerate((keys, new, stranger))]
    for pair in (keys, new):
        (scene.folder / "home" / pair[1].name).write_bytes(pair[1].read_bytes())
    policy = {"models": {"*": {"verify_keys": ["mine.pub", "new.pub"]}}}
    (scene.folder / "home" / "promotion.yaml").write_text(json.dumps(policy))
    for version in versions[:2]:
        assert scene.promoter.promote(version, "production", force=True).done
    with pytest.raises(PublishError, match="not by the one demanded"):
        scene.promoter.promote(versions[2], "production", force=True)
    monkeypatch.setenv(VERIFY_KEY_VARIABLE, str(stranger[1]))
    with pytest.raises(PreflightError, match=r"none of those that promotion.yaml demands"):
        scene.promoter.promote(versions[2], "production", force=True)
    monkeypatch.delenv(VERIFY_KEY_VARIABLE)
    assert scene.promoter.rollback().version == versions[0]
    with pytest.raises(PublishError, match="not by the one demanded"):
        scene.promoter.promote(versions[1], "production", force=True, verify_key=keys[1])
    (scene.folder / "home" / "mine.pub").unlink()
    with pytest.raises(PreflightError, match="cannot be read"):
        scene.promoter.rollback()


def test_the_commands_say_who_signed(
    scene: Scene, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    unsigned, signed = scene.register("one", "candidate"), scene.register("two", signing_key=keys[0])
    key, model = ("--verify-key", str(keys[1])), scene.model
    assert run(monkeypatch, scene, "promote", model, unsigned, "--to", "staging", *key) == 6
    said = capfd.readouterr().err
    assert "is not signed, and a signature is demanded; have it published again" in said and "Traceback" not in said
    assert run(monkeypatch, scene, "promote", model, unsigned, "--to", "staging", "--verify-key", "/nowhere") == 3
    assert nothing_moved(scene)
    for number in (unsigned, signed):
        assert run(monkeypatch, scene, "promote", model, number, "--to", "production", "--force") == 0
    assert run(monkeypatch, scene, "rollback", model, *key) == 6
    monkeypatch.setenv(VERIFY_KEY_VARIABLE, str(keys[1]))
    assert run(monkeypatch, scene, "rollback", model, "--to", signed) == 0
    capfd.readouterr()
    assert run(monkeypatch, scene, "history", model) == 0
    assert f"signed by {VerifyKey.read(keys[1]).fingerprint[:16]}, not verified" in capfd.readouterr().out
    target = str(scene.folder / "pulled")
    assert run(monkeypatch, scene, "pull", scene.releases[unsigned].uri, target) == 6
    assert run(monkeypatch, scene, "pull", scene.releases[signed].uri, target) == 0


def test_entries_from_before_signatures_are_entries(scene: Scene) -> None:
    from orchestrator.promotion.history import Entry

    scene.promoter.promote(scene.register("one"), "candidate")
    raw = scene.store.read_record(f"{scene.model}/.promotion/history/00000001.json")
    assert raw is not None
    document = json.loads(raw)
    del document["signature"]
    entry = parse_record(Entry, json.dumps(document).encode())
    assert entry is not None and entry.signature is None


def test_refusals_are_of_this_project(scene: Scene, tmp_path: Path) -> None:
    version = scene.register("one")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OrchestratorError, match="cannot be read"):
            scene.promoter.promote(version, "candidate", verify_key=path)
    assert SIGNED_BY_TAG == "orchestrator.signed_by"
