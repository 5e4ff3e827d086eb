"""What a reference on the command line means: a digest, a path, or a name in the model registry."""

from __future__ import annotations

from orchestrator.artifact import Artifact, ArtifactStore
from orchestrator.errors import SpecError
from orchestrator.home import Settings


def find_artifact(reference: str, settings: Settings) -> tuple[Artifact, dict[str, str] | None]:
    """Return the artifact, and of one that is registered what the registry says. Raises `SpecError`."""
    store = ArtifactStore(settings.home)
    if not reference.startswith("models:/"):
        return store.find(reference), None
    from orchestrator.registry import ModelRegistry

    registered = ModelRegistry(settings.tracking_uri).resolve(reference)
    facts = {"name": registered.name, "version": registered.version, "release": registered.source}
    digest = registered.tags.get("orchestrator.artifact")
    if digest is None:
        raise SpecError(f"{reference} was not registered by this program", remedy="give a digest or a path")
    return store.find(digest), facts
