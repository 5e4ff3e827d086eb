"""What infra/ holds, read: the services of the compose file and the pods of the manifests, in one form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY")


@dataclass(frozen=True)
class Container:
    """As both files have them. environment: None where the value comes from elsewhere."""

    where: str
    image: str
    command: list[str]
    environment: Mapping[str, str | None]


@cache
def compose() -> Any:
    return yaml.safe_load((INFRA / "docker-compose.yaml").read_text(encoding="utf-8"))


@cache
def example() -> dict[str, str]:
    lines = (INFRA / ".env.example").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def filled(text: str, given: Mapping[str, str]) -> str:
    """What compose makes of a text: ``${NAME:?why}`` must be given, ``${NAME:-else}`` may be."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        found = given.get(name, "")
        assert found or kind == "-", f"{name}: {rest}"
        return found or rest

    return VARIABLE.sub(value, text)


@cache
def manifests() -> list[Any]:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
    names = kustomization["resources"]
    return [document for name in names for document in yaml.safe_load_all((KUBERNETES / name).read_text("utf-8"))]


def named(kind: str) -> dict[str, Any]:
    return {document["metadata"]["name"]: document for document in manifests() if document["kind"] == kind}


def pods() -> dict[str, Any]:
    workloads = named("Deployment") | named("StatefulSet")
    return {name: workload["spec"]["template"]["spec"] for name, workload in workloads.items()}


def composed() -> list[Container]:
    given = {name: value or "example" for name, value in example().items()}
    return [
        Container(
            f"compose: {name}",
            service["image"],
            [filled(word, given) for word in service.get("command", [])],
            {key: filled(value, given) for key, value in service.get("environment", {}).items()},
        )
        for name, service in compose()["services"].items()
    ]


def deployed() -> list[Container]:
    return [
        Container(
            f"kubernetes: {name}",
            container["image"],
            container.get("args", container.get("command", [])),  # where there are both, the command looks at secrets
            {entry["name"]: entry.get("value") for entry in container.get("env", [])},
        )
        for name, pod in pods().items()
        for container in pod["containers"]
    ]
