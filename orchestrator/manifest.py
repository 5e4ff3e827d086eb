"""The form of an artifact's manifest.json. Somebody else may have written it, so nothing in it is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, JsonValue, ValidationError

MOST_BYTES = 64 << 20

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Table = dict[str, JsonValue]


class FileEntry(BaseModel):
    """A file of an artifact."""

    model_config = ConfigDict(strict=True, extra="allow")

    sha256: Hash
    bytes: Annotated[int, Field(ge=0)]


class PluginEntry(BaseModel):
    """Where the method came from."""

    model_config = ConfigDict(strict=True, extra="allow")

    distribution: str
    version: str


class Identity(BaseModel):
    """What decided the result."""

    model_config = ConfigDict(strict=True, extra="allow")

    parameters: Table
    plugin: PluginEntry
    environment: dict[str, str] = {}
    trust_remote_code: dict[Annotated[str, Field(pattern=r"^[^/]+\.py$")], Hash] = {}


class Manifest(BaseModel):
    """What every reader of a manifest relies on; more may stand in it."""

    model_config = ConfigDict(strict=True, extra="allow")

    kind: str
    stage: str
    method: str
    fingerprint: str
    identity: Identity
    inputs: dict[str, str]
    invariants: Table
    metrics: dict[str, Annotated[float, AllowInfNan(False)]]
    files: dict[str, FileEntry]


def read_manifest(data: bytes) -> Mapping[str, Any]:
    """Return what a manifest says. Raises `ValueError` with everything that is wrong with its form."""
    try:
        Manifest.model_validate_json(data)
        content = json.loads(data)
    except ValidationError as error:
        items = error.errors(include_url=False)[:5]
        raise ValueError("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in items)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    return content
