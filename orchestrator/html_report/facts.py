"""What a report is made of: read from a run's journal and the artifacts of its steps; nothing is computed anew.

A part that cannot be read is not made up and raises nothing: a sentence stands where it would be. The same journal and
artifacts give the same facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.addresses import without_password
from orchestrator.artifact import Artifact, ArtifactStore
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.journal import Journal
from orchestrator.published import PUBLISHED_FILE
from orchestrator.release import is_plain
from orchestrator.report import size_text

CURVES_FILE = "curves.json"  # as `orchestrator.steps` writes them; not imported, because that takes the whole core
INTERVALS_FILE = "intervals.json"  # by metric, [low, high]
LAYERS_FILE = "layers.json"
PLAN_FILE = "kv-plan.json"
MOST_JSON_BYTES = 64 << 20  # a layers.json of 100,000 layers has 30 MB


@dataclass(frozen=True)
class Missing:
    """Something that a report would show, and why it cannot."""

    why: str


@dataclass(frozen=True)
class StepView:
    """One step as a report shows it.

    state: "computed", "cached", "failed", "unfinished" (begun, and no more is known) or "not run".
    gone: why there is no artifact of a step that has a result.
    took, predicted: ``seconds``, ``peak_memory_bytes``, ``disk_bytes``; of a cached step those of its making.
    demands: ``require`` and ``must_not_fall`` of the specification; None where nobody recorded them.
    gates: what these were held against, as `orchestrator.gates.GateResult` has it.
    """

    index: int
    stage: str
    method: str
    state: str
    fingerprint: str
    digest: str | None = None
    artifact: Artifact | None = None
    gone: str | None = None
    took: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    demands: Mapping[str, Any] | None = None
    gates: Sequence[Mapping[str, Any]] = ()
    error: str | None = None

    @property
    def label(self) -> str:
        """The step as people write it."""
        return f"{self.stage} {self.method}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decided the result; {} without an artifact."""
        return dict(self.artifact.manifest["identity"]) if self.artifact else {}

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the step recorded."""
        return self.artifact.metrics if self.artifact else {}


@dataclass(frozen=True)
class RunView:
    """One run, or the steps that an artifact came from.

    run: None if it is not known which run it was. ending: "finished", "failed" or "unfinished"; "" without a run.
    refused: whether a gate ended it. started, ended: seconds since the epoch.
    facts: what the journal says of specification, source model and machine.
    """

    title: str
    run: str | None
    ending: str
    started: float | None
    ended: float | None
    error: str | None
    facts: Mapping[str, Any]
    steps: Sequence[StepView]
    refused: bool = False

    @property
    def gone(self) -> list[str]:
        """The steps whose artifacts are no longer there."""
        return [step.label for step in self.steps if step.gone]


def is_run(home: Path, reference: str) -> bool:
    """Whether a reference is the name of a run."""
    return Path(reference).name == reference and (home / "runs" / f"{reference}.jsonl").is_file()


def read_run(home: Path, run_id: str) -> RunView:
    """Read a run's journal and the artifacts that it names. Raises `SpecError` if there is no such run."""
    if not is_run(home, run_id):
        raise SpecError(f"there is no run {run_id!r} in {home}", remedy="the journals are in its folder runs/")
    events = [event for event in Journal(home, run_id).events() if isinstance(event, dict)]
    if not events:
        raise SpecError(f"the journal of {run_id} says nothing", remedy="run the specification again")
    begun = next((event for event in events if event.get("event") == "run started"), {})
    last = next((event for event in events if event.get("event") in ("run finished", "run failed")), None)
    return RunView(
        title=str(begun.get("pipeline", run_id)),
        run=run_id,
        ending="unfinished" if last is None else "finished" if last["event"] == "run finished" else "failed",
        started=begun.get("time"),
        ended=None if last is None else last.get("time"),
        error=None if last is None else _said(last),
        facts=begun,
        steps=_steps(ArtifactStore(home), begun.get("steps"), events),
        refused=last is not None and last.get("kind") == "GateError",
    )


def _steps(store: ArtifactStore, planned: Any, events: Sequence[Mapping[str, Any]]) -> list[StepView]:
    """The steps of the plan, with what the journal says became of each."""
    finished = {event["step"]: event for event in events if event.get("event") == "step finished"}
    failed = {event["step"]: event for event in events if event.get("event") == "step failed"}
    begun = {event["step"] for event in events if event.get("event") == "step started"}
    named: dict[int, Mapping[str, Any]] = dict(enumerate(planned)) if isinstance(planned, list) else {}
    steps = []
    for index in sorted({*named, *finished, *failed, *begun}):
        plan = named.get(index, {})
        if index in finished:
            steps.append(_finished(store, index, plan, finished[index]))
            continue
        state = "failed" if index in failed else "unfinished" if index in begun else "not run"
        stage, method = str(plan.get("stage", "step")), str(plan.get("method", index + 1))
        error = _said(failed.get(index, {}))
        fingerprint = str(plan.get("fingerprint", ""))
        gates = failed.get(index, {}).get("gates", ())  # those on the KV cache are held before there is an artifact
        demands = plan.get("demands")
        steps.append(StepView(index, stage, method, state, fingerprint, demands=demands, gates=gates, error=error))
    return steps


def _said(event: Mapping[str, Any]) -> str | None:
    """What an event says went wrong, as it may be shown."""
    return without_password(str(event["error"])) if event.get("error") else None


def _finished(store: ArtifactStore, index: int, plan: Mapping[str, Any], event: Mapping[str, Any]) -> StepView:
    digest, cached = str(event["digest"]), bool(event.get("cached"))
    try:
        artifact, gone = store.find(digest), None
    except (OrchestratorError, OSError, ValueError) as error:
        artifact, gone = None, f"artifact {digest[:12]} cannot be read: {error}"
    manifest = artifact.manifest if artifact else plan
    fingerprint = str(plan.get("fingerprint") or manifest.get("fingerprint", ""))
    took = {name: event[name] for name in ("seconds", "peak_memory_bytes", "disk_bytes") if name in event}
    predicted = event.get("predicted")
    if cached:
        took, predicted = _making(store, fingerprint, digest, artifact)
    return StepView(
        index,
        str(manifest.get("stage", "step")),
        str(manifest.get("method", index + 1)),
        "cached" if cached else "computed",
        fingerprint,
        digest,
        artifact,
        gone,
        took,
        predicted or {},
        plan.get("demands"),
        event.get("gates", ()),
    )


def _making(
    store: ArtifactStore, fingerprint: str, digest: str, artifact: Artifact | None
) -> tuple[dict[str, float], Mapping[str, float] | None]:
    """What the step took when the artifact was made, and what was predicted then."""
    record = store.record(fingerprint)
    if record is None or record.digest != digest:
        return {}, None
    size = {"disk_bytes": artifact.bytes} if artifact else {}
    return {"seconds": record.seconds, "peak_memory_bytes": record.peak_memory_bytes, **size}, record.predicted


def read_lineage(home: Path, artifact: Artifact) -> RunView:
    """Read the steps that an artifact came from, where it is not known which run made it."""
    store = ArtifactStore(home)
    found: dict[str, Artifact] = {}

    def visit(one: Artifact) -> None:
        for digest in one.manifest["inputs"].values():
            if digest not in found:
                try:
                    visit(store.find(digest))
                except OrchestratorError:  # the source model, or an artifact that has gone
                    continue
        found[one.digest] = one

    visit(artifact)
    steps = [
        StepView(
            index,
            str(one.manifest["stage"]),
            str(one.manifest["method"]),
            "cached",
            str(one.manifest["fingerprint"]),
            one.digest,
            one,
            None,
            (made := _making(store, str(one.manifest["fingerprint"]), one.digest, one))[0],
            made[1] or {},
        )
        for index, one in enumerate(found.values())
    ]
    name = artifact.manifest["identity"].get("name") or f"artifact {artifact.digest[:12]}"
    return RunView(str(name), None, "", None, None, None, {}, steps)


def run_that_made(home: Path, digest: str) -> str | None:
    """The last run with a step that gave this artifact, computed or found; None if no journal names it."""
    wanted = digest.encode()
    for path in sorted((home / "runs").glob("*.jsonl"), reverse=True):  # run ids begin with their time
        if wanted in path.read_bytes() and any(
            event.get("event") == "step finished" and event.get("digest") == digest
            for event in Journal(home, path.stem).events()
        ):
            return path.stem
    return None


def read_json(artifact: Artifact, name: str) -> Any | Missing | None:
    """A JSON file of an artifact, its bytes compared with the manifest; None if the step wrote none."""
    entry = artifact.manifest["files"].get(name)
    if entry is None:
        return None
    return _verified_json(artifact.path / name, str(entry["sha256"]))


def _verified_json(path: Path, sha256: str) -> Any | Missing:
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            return Missing(f"{path.name} has {size_text(size)}, too much for a page")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            return Missing(f"{path.name} is not what the step wrote: its sha256 differs")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        return Missing(f"{path.name} cannot be read: {error}")


def release_of(step: StepView) -> Mapping[str, Any] | Missing:
    """What a register step published."""
    if step.artifact is None:
        return Missing(step.gone or f"{step.label} has not run")
    found = read_json(step.artifact, PUBLISHED_FILE)
    if isinstance(found, Missing):
        return found
    return found if isinstance(found, dict) else Missing(f"{step.label} left no {PUBLISHED_FILE}")


def kv_plans(step: StepView, release: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | Missing]:
    """The KV plan of each engine in a release, by engine: as the register step kept it, or from a local release."""
    root = urlsplit(str(release.get("uri", "")))
    plans: dict[str, Mapping[str, Any] | Missing] = {}
    for entry in release.get("files", ()):
        key = str(entry["key"])
        parts = key.split("/")
        if not is_plain(key) or len(parts) != 3 or (parts[0], parts[2]) != ("serving", PLAN_FILE):
            continue
        found = read_json(step.artifact, key) if step.artifact else None
        if found is None and root.scheme == "file":
            found = _verified_json(Path(unquote(root.path), *parts), str(entry["sha256"]))
        elif found is None:
            found = Missing(f"it is in the release, as {key}; a page is made without the network")
        plans[parts[1]] = found if isinstance(found, dict | Missing) else Missing(f"{key} holds no plan")
    return plans
