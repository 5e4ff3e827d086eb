"""Model versions and aliases in a real MLflow registry (sqlite); through a server: see test_tracking.py."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import PublishError, SpecError
from orchestrator.registry import DIGEST_TAG, HOSTED_FILE, ModelRegistry, RegisteredVersion
from orchestrator.tracking import connect
from tests.mlflow_server import make_database


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    return ModelRegistry(make_database(tmp_path_factory.mktemp("registry")))


def register(registry: ModelRegistry, name: str, digest: str, **changes: Any) -> str:
    values: dict[str, Any] = {
        "source": f"s3://bucket/{name}/{digest}",
        "run_id": None,
        "tags": {DIGEST_TAG: digest, "orchestrator.bits": "4"},
        "alias": "candidate",
        "description": "a test",
    }
    return registry.register(name, **{**values, **changes})


def test_a_version_leads_back_to_its_release(registry: ModelRegistry) -> None:
    assert register(registry, "alpha", "d1") == "1"
    expected = RegisteredVersion(
        name="alpha",
        version="1",
        source="s3://bucket/alpha/d1",
        tags={DIGEST_TAG: "d1", "orchestrator.bits": "4"},
        run_id=None,
        aliases=("candidate",),
    )
    assert registry.resolve("models:/alpha@candidate") == expected
    assert registry.resolve("models:/alpha/1") == expected
    assert connect(registry.uri).get_model_version("alpha", "1").description == "a test"


def test_the_same_release_is_registered_once_and_another_one_anew(registry: ModelRegistry) -> None:
    assert register(registry, "beta", "d1") == "1"
    assert register(registry, "beta", "d2") == "2"
    assert registry.resolve("models:/beta@candidate").version == "2"
    assert register(registry, "beta", "d1") == "1"
    assert registry.resolve("models:/beta@candidate").version == "1"
    assert register(registry, "beta", "d1", source="s3://elsewhere/d1", alias=None) == "3"
    assert registry.resolve("models:/beta@candidate").version == "1"
    assert len(connect(registry.uri).search_model_versions("name = 'beta'")) == 3


def test_a_version_exists_or_not(registry: ModelRegistry) -> None:
    register(registry, "gamma", "d1")
    assert registry.version_exists("gamma", "1")
    assert not registry.version_exists("gamma", "2")
    assert not registry.version_exists("nobody", "1")
    connect(registry.uri).delete_model_version("gamma", "1")
    assert not registry.version_exists("gamma", "1")
    with pytest.raises(SpecError, match="model 'gamma' has no alias 'candidate'"):
        registry.resolve("models:/gamma@candidate")


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("models:/delt@candidate", "did you mean 'delta'"),
        ("models:/delta@candidat", "did you mean 'candidate'"),
        ("models:/delta@other", "known aliases: candidate"),
        ("models:/delta/9", "known versions: 1"),
        ("models:/delta", "models:/NAME@ALIAS"),
        ("models:/delta/one", "models:/NAME@ALIAS"),
        ("delta@candidate", "models:/NAME@ALIAS"),
    ],
)
def test_a_reference_to_nothing_is_refused_with_what_there_is(registry: ModelRegistry, ref: str, said: str) -> None:
    register(registry, "delta", "d1")
    with pytest.raises(SpecError, match=said):
        registry.resolve(ref)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a'b", "a@b", " a"])
def test_a_name_that_could_not_be_referred_to_is_refused(registry: ModelRegistry, name: str) -> None:
    with pytest.raises(SpecError, match="cannot name a registered model"):
        register(registry, name, "d1")


@pytest.mark.parametrize("alias", ["v3", "latest", "with space"])
def test_an_alias_that_mlflow_refuses_is_an_error(registry: ModelRegistry, alias: str) -> None:
    with pytest.raises(PublishError, match="could not register 'epsilon'"):
        register(registry, "epsilon", "d1", alias=alias)


def test_a_folder_of_another_machine_is_not_taken_for_one_of_this(registry: ModelRegistry) -> None:
    register(registry, "zeta", "d1", source=f"{HOSTED_FILE}elsewhere/releases/zeta")
    with pytest.raises(SpecError, match="folder /releases/zeta of the machine 'elsewhere'"):
        registry.resolve("models:/zeta@candidate")


def test_a_version_that_changes_under_our_hands_is_noticed(registry: ModelRegistry) -> None:
    register(registry, "eta", "d1")
    client = connect(registry.uri)
    client.set_model_version_tag("eta", "1", DIGEST_TAG, "tampered")
    with pytest.raises(PublishError, match="not what was written"):
        registry._verify("eta", "1", "s3://bucket/eta/d1", "d1", None)
    assert register(registry, "eta", "d1") == "2"


def test_an_alias_can_be_looked_up_and_moved_back(registry: ModelRegistry) -> None:
    assert registry.alias_version("theta", "candidate") is None
    register(registry, "theta", "d1")
    register(registry, "theta", "d2")
    assert registry.alias_version("theta", "candidate") == "2"
    assert registry.alias_version("theta", "other") is None
    registry.set_alias("theta", "candidate", "1")
    assert registry.alias_version("theta", "candidate") == "1"
    assert registry.resolve("models:/theta@candidate").source == "s3://bucket/theta/d1"
    registry.set_alias("theta", "other", "2")
    assert registry.alias_version("theta", "other") == "2"


@pytest.mark.parametrize(
    ("name", "alias", "version"), [("iota", "candidate", "9"), ("nobody", "candidate", "1"), ("iota", "v3", "1")]
)
def test_an_alias_that_cannot_be_set_is_an_error(registry: ModelRegistry, name: str, alias: str, version: str) -> None:
    register(registry, "iota", "d1")
    with pytest.raises(PublishError, match=f"could not set the alias '{alias}' of '{name}'"):
        registry.set_alias(name, alias, version)
    assert registry.alias_version("iota", "candidate") == "1"
