"""The bill of materials of a release: CycloneDX 1.6 in JSON, with the sha256 of every file but its own.

Specification: cyclonedx.org/docs/1.6/json. Deterministic: the serial number follows from the files, and there is no
timestamp.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.canonical import digest_of
from orchestrator.errors import PublishError
from orchestrator.provenance import Provenance
from orchestrator.release import StoredFile

BILL = "bom.cdx.json"
_NAMESPACE = uuid.UUID("5b6e9a0e-6c0f-5d5e-9f57-4c7f3d0c6a11")  # of serial numbers; arbitrary, never changed


def write_bill(folder: Path, files: Mapping[str, str], provenance: Provenance) -> None:
    """Write the bill of `folder`. files: key -> sha256 (hex) of every file in it."""
    content = digest_of(dict(files))
    parts = [
        _source(provenance),
        *(_data_set(digest, stages) for digest, stages in provenance.data_sets().items()),
        *(_package(name, version, "method") for name, version in sorted(provenance.plugins().items())),
        *(
            _package(name, version, "library")
            for name, version in sorted(provenance.libraries.items())
            if name not in provenance.plugins()
        ),
        *(_file(key, sha256, runs=key in provenance.code) for key, sha256 in sorted(files.items())),
    ]
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}",
        "version": 1,
        "metadata": {"component": _model(provenance, content)},
        "components": parts,
        "dependencies": [
            {"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }
    text = json.dumps(bill, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / BILL).write_text(text + "\n", encoding="utf-8")


def check_bill(uri: str, data: bytes, files: Sequence[StoredFile]) -> None:
    """Raise PublishError unless the bill `data` of the release `uri` lists exactly its files, with their sha256."""
    remedy = "do not use this release: whoever made it can publish another with a bill that fits"
    try:
        listed = {
            str(component["name"]): entry["content"]
            for component in json.loads(data)["components"]
            if component["type"] == "file"
            for entry in component["hashes"]
            if entry["alg"] == "SHA-256"
        }
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PublishError(f"the {BILL} of {uri} is no bill of materials", remedy=remedy) from None
    published = {file.key: file.sha256 for file in files if file.key != BILL}
    for key in sorted(set(listed) | set(published)):
        if listed.get(key) != published.get(key):
            raise PublishError(f"the {BILL} of {uri} does not fit {key!r}", remedy=remedy)


def _model(provenance: Provenance, content: str) -> dict[str, Any]:
    metrics = [
        {"type": f"{evidence.method}.{name}", "value": f"{value:.4g}"}
        for evidence in provenance.evidence
        for name, value in evidence.metrics.items()
    ]
    parameters = {
        "task": "text-generation",
        "modelArchitecture": provenance.architecture,
        "datasets": [{"ref": f"data:{digest}"} for digest in provenance.data_sets()],
    }
    steps = [
        {"name": f"orchestrator:step:{at}", "value": f"{entry['stage']} {entry['method']} {entry['fingerprint']}"}
        for at, entry in enumerate(provenance.lineage)
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": provenance.name,
        "version": content[:16],
        **_licences(provenance.licence),
        "modelCard": {
            "modelParameters": parameters,
            **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        },
        "properties": [{"name": "orchestrator:content", "value": content}, *steps],
    }


def _source(provenance: Provenance) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": provenance.hub_id or "source model",
        **_licences(provenance.licence),
        "properties": [{"name": "orchestrator:digest", "value": provenance.source_digest}],
    }


def _data_set(digest: str, stages: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"data:{digest}",
        "name": f"text {digest[:16]}",
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "properties": [{"name": "orchestrator:read-by", "value": stage} for stage in stages],
    }


def _package(name: str, version: str, role: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": f"package:{name}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}",
        "properties": [{"name": "orchestrator:role", "value": role}],
    }


def _file(key: str, sha256: str, *, runs: bool) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{key}",
        "name": key,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        **({"properties": [{"name": "orchestrator:role", "value": "code that runs with the model"}]} if runs else {}),
    }


def _licences(licence: str | None) -> dict[str, Any]:
    return {"licenses": [{"license": {"name": licence}}]} if licence else {}
