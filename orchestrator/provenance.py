"""Where a released model comes from: what its bill of materials and its card say, gathered once.

Nothing here depends on the machine or the hour, so that releasing the same model again gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import Checkpoint
from orchestrator.foreign import load_yaml, read_plain

CARD = "README.md"
_OF_THE_MACHINE = re.compile("second|memory|latency|throughput")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
_MOST_CARD_BYTES = 8 << 20
_MOST_HEAD = 1 << 16  # characters that are read as YAML, which is slow
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Evidence:
    """What a step measured, and which bounds that was held against. Nothing of it depends on the machine.

    gates: as `orchestrator.gates.GateResult.as_dict` returns them.
    intervals: by metric, at `orchestrator.bootstrap.CONFIDENCE`.
    """

    method: str
    metrics: Mapping[str, float]
    gates: Sequence[Mapping[str, Any]]
    intervals: Mapping[str, tuple[float, float]]

    @classmethod
    def of(
        cls,
        method: str,
        metrics: Mapping[str, float],
        gates: Sequence[Mapping[str, Any]],
        intervals: Mapping[str, tuple[float, float]] | None = None,
    ) -> Evidence:
        """Keep what does not depend on the machine."""
        kept = {name: value for name, value in metrics.items() if not _OF_THE_MACHINE.search(name)}
        held = [gate for gate in gates if not _OF_THE_MACHINE.search(gate["metric"])]
        return cls(method, kept, held, intervals or {})


@dataclass(frozen=True)
class Provenance:
    """What a release says of itself.

    hub_id, licence: of the source model, where they are known.
    lineage: the steps that made the model, first to last; each with stage, method, parameters and plugin.
    libraries: name -> version of what computed.
    code: file -> sha256 of the code that the model brings, which runs when it is loaded.
    """

    name: str
    architecture: str
    hub_id: str | None
    licence: str | None
    source_digest: str
    lineage: Sequence[Mapping[str, Any]]
    evidence: Sequence[Evidence]
    libraries: Mapping[str, str]
    engines: Sequence[str]
    formats: Sequence[str]
    zeros: str | None = None
    signed_by: str | None = None
    code: Mapping[str, str] = field(default_factory=dict)

    def data_sets(self) -> dict[str, list[str]]:
        """sha256 (hex) -> the stages that read this text."""
        found: dict[str, list[str]] = {}
        for entry in self.lineage:
            for digest in _digests(entry["parameters"]):
                stages = found.setdefault(digest, [])
                if entry["stage"] not in stages:
                    stages.append(entry["stage"])
        return dict(sorted(found.items()))

    def plugins(self) -> dict[str, str]:
        """Distribution -> version of the plugins whose methods made the model."""
        return {entry["plugin"]["distribution"]: entry["plugin"]["version"] for entry in self.lineage}


def describe_source(source: Checkpoint) -> tuple[str, str | None, str | None]:
    """Return (architecture, hub id, licence) of the model that was compressed; None for what is not known."""
    named = source.config.get("architectures")
    architecture = str(named[0] if isinstance(named, list) and named else source.config.get("model_type", "unknown"))
    hub_id = None
    for part in source.path.parts:
        if match := _SNAPSHOT.fullmatch(part):
            hub_id = f"{match[1]}/{match[2]}"
    licence = front_matter(source.path / CARD).get("license")
    return architecture, hub_id, licence if isinstance(licence, str) else None


def front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML block at the head of a model card; empty if there is no card, or none that can be read."""
    try:
        match = _FRONT_MATTER.match(read_plain(card, _MOST_CARD_BYTES).decode("utf-8"))
        values = load_yaml(match[1]) if match and len(match[1]) <= _MOST_HEAD else None
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _digests(value: Any) -> Iterator[str]:
    """Every text that parameters name by content: {"sha256": DIGEST}, at any depth."""
    if isinstance(value, Mapping):
        if set(value) == {"sha256"}:
            yield str(value["sha256"])
        else:
            for part in value.values():
                yield from _digests(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _digests(part)
