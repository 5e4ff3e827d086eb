"""Checks for a `Publisher`: a small bundle goes to its `uri`, by default a folder that is removed afterwards."""

from __future__ import annotations

from pathlib import Path

from orchestrator.canonical import file_sha256
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.errors import PublishError
from orchestrator.method import Publisher
from orchestrator.store import open_store

NAME = "conformance/0123456789abcdef"
MANIFEST = {"schema": 1, "pipeline": "conformance", "invariants": {}}


def check_publisher(method: Publisher, laboratory: Laboratory, findings: Findings) -> None:
    """The checks P1 to P4 and C7."""
    if method.uri is None:
        uri = (laboratory.folder / "releases").as_uri()
        method = type(method).model_validate({**method.model_dump(), "uri": uri})
    bundle = _bundle(laboratory.folder / "bundle", "first")
    listed = {path: file_sha256(bundle / path) for path in _files(bundle)}
    with findings.attempt("P2 finds", "`find` before anything was published"):
        nothing = method.find(NAME)
        findings.expect("P2 finds", nothing is None, f"`find` of an unused name returned {nothing!r}; return None")
    with findings.attempt("P1 publishes", "`publish`"), left_alone(findings, "`publish`", seed=0):
        release = method.publish(bundle, MANIFEST, NAME)
        found = {file.key: file.sha256 for file in release.files}
        findings.expect(
            "P1 publishes",
            found == listed,
            f"the release lists {sorted(found)}, the bundle holds {sorted(listed)}; publish every file, unchanged",
        )
        findings.expect(
            "P1 publishes",
            {path: file_sha256(bundle / path) for path in _files(bundle)} == listed,
            "`publish` changed the bundle; work on a copy",
        )
    if findings.failed("P1 publishes"):
        return
    if not findings.expect(
        "P1 publishes",
        release.uri.endswith(f"/{NAME}"),
        f"the release {NAME} has the address {release.uri}; its address ends with its name",
    ):
        return
    with findings.attempt("P1 publishes", "`orchestrator pull` of the release"):
        root = release.uri.removesuffix(f"/{NAME}")
        fetched = laboratory.folder / "fetched"
        open_store(root).fetch(NAME, fetched)
        same = {path: file_sha256(fetched / path) for path in listed} == listed
        findings.expect("P1 publishes", same, f"what was fetched from {release.uri} is not what was published")
    with findings.attempt("P2 finds", "`find`"):
        again = method.find(NAME)
        findings.expect("P2 finds", again == release, f"`find` returned {again!r}, `publish` had returned {release!r}")
    with findings.attempt("P3 idempotent", "`publish` of the same bundle for the second time"):
        second = method.publish(bundle, MANIFEST, NAME)
        findings.expect("P3 idempotent", second == release, f"the second time it returned {second!r}, not {release!r}")
    _check_immutable(method, laboratory, findings)


def _check_immutable(method: Publisher, laboratory: Laboratory, findings: Findings) -> None:
    first = method.find(NAME)
    other = _bundle(laboratory.folder / "other-bundle", "second")
    with findings.attempt("P4 immutable", "`publish` of other files under the same name"):
        try:
            method.publish(other, MANIFEST, NAME)
        except PublishError:
            pass
        else:
            findings.fail("P4 immutable", "other files were published over a release; raise PublishError instead")
        findings.expect("P4 immutable", method.find(NAME) == first, "the first release is no longer what it was")


def _bundle(folder: Path, content: str) -> Path:
    (folder / "serving" / "engine").mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"model_type": "llama", "content": "{content}"}}\n', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(content.encode() * 1000)
    (folder / "serving" / "engine" / "engine.yaml").write_text("port: 8000\n", encoding="utf-8")
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
