"""A model with releases in a real store and versions in a real registry, for tests of promotion."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from orchestrator.home import Settings
from orchestrator.promotion.history import History
from orchestrator.promotion.promoter import Promoter
from orchestrator.promotion.signature import SIGNED_BY_TAG
from orchestrator.registry import DIGEST_TAG, ModelRegistry
from orchestrator.signing import key_fingerprint
from orchestrator.store import Release, Store, open_store
from orchestrator.tracking import connect


@dataclass
class Scene:
    """uri: the root of the store. folder: of the test's own."""

    uri: str
    folder: Path
    tracking_uri: str
    model: str = field(default_factory=lambda: f"model-{uuid.uuid4().hex[:12]}")
    releases: dict[str, Release] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return Settings(self.folder / "home", self.tracking_uri)

    @cached_property
    def store(self) -> Store:
        return open_store(self.uri)

    @cached_property
    def promoter(self) -> Promoter:
        return self.anew()

    def anew(self) -> Promoter:
        """One that has seen nothing yet, as a new process has."""
        return Promoter(self.model, self.settings)

    @property
    def history(self) -> History:
        return History(self.store, self.model)

    @property
    def client(self) -> Any:
        return connect(self.tracking_uri)

    def publish(self, content: str, signing_key: Path | None = None) -> Release:
        bundle = self.folder / f"bundle-{content}"
        bundle.mkdir()
        (bundle / "model.safetensors").write_bytes(content.encode() * 1000)
        (bundle / "config.json").write_text("{}")
        release = self.store.publish(
            f"{self.model}/{content}", bundle, {"pipeline": self.model}, signing_key=signing_key
        )
        shutil.rmtree(bundle)
        return release

    def register(self, content: str, alias: str | None = None, signing_key: Path | None = None) -> str:
        """Publish a release and register it, as a run does; return its version."""
        release = self.publish(content, signing_key)
        signed = {SIGNED_BY_TAG: key_fingerprint(str(signing_key))} if signing_key else {}
        version = ModelRegistry(self.tracking_uri).register(
            self.model,
            source=release.uri,
            run_id=None,
            tags={DIGEST_TAG: release.digest, **signed},
            alias=alias,
            description="a test",
        )
        self.releases[version] = release
        return version

    def climb(self, version: str, top: str = "production") -> None:
        """Take a version up the ladder."""
        for alias in ("candidate", "staging", "production"):
            self.promoter.promote(version, alias)
            if alias == top:
                return

    def alias(self, alias: str = "production") -> str | None:
        """What MLflow says."""
        return ModelRegistry(self.tracking_uri).alias_version(self.model, alias)

    def path(self, key: str) -> Path:
        """Where a key of a file store is; the file can be written to."""
        path = Path(self.uri.removeprefix("file://")) / key
        if path.is_file():
            path.chmod(0o644)
        return path


@pytest.fixture
def scene(tmp_path: Path, tracking_uri: str) -> Scene:
    """In a folder."""
    (tmp_path / "home").mkdir()
    return Scene((tmp_path / "releases").as_uri(), tmp_path, tracking_uri)


@pytest.fixture(params=["folder", "bucket"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, tracking_uri: str) -> Scene:
    """In a folder, and in a bucket of a real S3 server."""
    (tmp_path / "home").mkdir()
    if request.param == "folder":
        return Scene((tmp_path / "releases").as_uri(), tmp_path, tracking_uri)
    bucket = request.getfixturevalue("s3_bucket")
    return Scene(f"s3://{bucket}/models", tmp_path, tracking_uri)
