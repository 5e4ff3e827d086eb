"""Publish a release to a folder or an S3 bucket: create-only, every file with its sha256, `COMPLETE` last.

The store behind it (orchestrator.store) decides what is complete; a release that is not is invisible.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_serializer, field_validator

from orchestrator.api import PreflightError, Publisher, Stage, key_fingerprint, open_store
from orchestrator.api import Release as StoredRelease


class Release(Publisher):
    """Publishes below `uri`; the core fills in the store's own releases folder where a specification gives none."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "release"
    paper: ClassVar = "No paper: a create-only folder or bucket prefix with a sha256 for every file."

    signing_key: str | None = Field(
        None,
        description="Private key (PEM, P-256, P-384 or P-521) to sign the release with, as OpenSSF model-signing does. "
        "Default: the file that ORCHESTRATOR_SIGNING_KEY names, or no signature.",
    )

    @field_validator("signing_key")
    @classmethod
    def _usable(cls, signing_key: str | None) -> str | None:
        try:
            _ = signing_key and key_fingerprint(signing_key)
        except PreflightError as error:
            raise ValueError(str(error)) from None
        return signing_key

    @field_serializer("signing_key", when_used="json")
    def _public(self, signing_key: str | None) -> str | None:
        """What is recorded of the key, in fingerprints too: its public half's fingerprint, and not where it lies."""
        return None if signing_key is None else key_fingerprint(signing_key)

    def preflight(self) -> None:
        """Check that the store can be written. Raises `PreflightError` or `SpecError`."""
        if self.uri is not None:
            open_store(self.uri).check()

    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> StoredRelease:
        """Publish every file of `bundle` under `name`; an equal release is found and returned. `PublishError`."""
        key = None if self.signing_key is None else Path(self.signing_key)
        return open_store(self._root()).publish(name, bundle, dict(manifest), signing_key=key)

    def find(self, name: str) -> StoredRelease | None:
        """Return the complete release called `name`, or None. Raises `PublishError` if it is damaged."""
        return open_store(self._root()).read_release(name)

    def _root(self) -> str:
        if self.uri is None:
            raise ValueError("the core must fill in `uri` before it publishes or looks for a release")
        return self.uri
