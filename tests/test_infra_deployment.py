"""The compose file, the image and the Kubernetes manifests: schemas of those who read them, and what they refer to."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra_files import (
    INFRA,
    KUBERNETES,
    ROOT,
    SECRET,
    VARIABLE,
    compose,
    composed,
    deployed,
    example,
    filled,
    manifests,
    named,
    pods,
)

PROJECT = {  # what a worker image is built of
    match[1]: match[2]
    for match in re.finditer(r'^(name|version) = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
}
KUBERNETES_VERSIONS = ("1.29", "1.37")  # the oldest that knows all that is used, and the newest with schemas here


# --- compose


def test_the_compose_file_is_one_by_the_specifications_schema() -> None:
    found = importlib.util.find_spec("check_jsonschema")
    if found is None or not found.submodule_search_locations:
        pytest.skip("check-jsonschema, which brings the schema of the Compose Specification along, is not installed")
    import jsonschema

    path = Path(found.submodule_search_locations[0]) / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    given = {name: value or "example" for name, value in example().items()}
    written = compose()
    text = (INFRA / "docker-compose.yaml").read_text(encoding="utf-8")
    for document in (written, yaml.safe_load(filled(text, given))):
        assert [error.message for error in validator.iter_errors(document)] == []
    written = json.loads(json.dumps(written))
    written["services"]["worker"]["read_onyl"] = True
    assert any("read_onyl" in error.message for error in validator.iter_errors(written))


def test_what_the_compose_file_names_is_there() -> None:
    services = compose()["services"]
    for name, service in services.items():
        assert set(service["networks"]) <= set(compose()["networks"]), name
        for other, how in service.get("depends_on", {}).items():
            assert "healthcheck" in services[other], name
            assert how == {"condition": "service_healthy"}, name
        for volume in service.get("volumes", []):
            source = filled(volume, {}).split(":")[0]
            assert (INFRA / source).exists() if source.startswith(".") else source in compose()["volumes"], volume
        for build in [service["build"]] if "build" in service else []:
            assert (INFRA / build["context"] / build["dockerfile"]).is_file()
            assert build["target"] in stages(), name
    assert compose()["networks"]["database"] == {"internal": True}
    assert services["worker"]["networks"] == ["services"]  # nobody but the servers reaches the database


def test_every_variable_is_explained_and_nothing_secret_has_a_default() -> None:
    text = (INFRA / "docker-compose.yaml").read_text(encoding="utf-8")
    asked = {name: (kind, rest) for name, kind, rest in VARIABLE.findall(text)}
    assert set(asked) == set(example())
    for name, (kind, rest) in asked.items():
        assert example()[name] == ("" if kind == "?" else rest), name
        if SECRET.search(name):
            assert kind == "?", name
    for name, service in compose()["services"].items():
        for key, value in service["environment"].items():
            if SECRET.search(key):
                assert VARIABLE.fullmatch(value), f"{name}: {key}"
    with pytest.raises(AssertionError, match=r"fill in infra/\.env"):
        filled(text, {})


def test_git_ignores_what_is_filled_in() -> None:
    names = ["infra/.env", "infra/kubernetes/secrets.yaml", "infra/terraform/terraform.tfstate"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("this is no git checkout")
    assert done.stdout.split() == names


def test_composed_containers_may_do_little_and_are_started_again() -> None:
    for name, service in compose()["services"].items():
        assert not service["user"].startswith("0"), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert "healthcheck" in service, name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


# --- the image


def dockerfile() -> list[str]:
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in dockerfile():
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        list(found.values())[-1].append(line)
    return found


def test_the_images_are_of_versions_that_the_project_allows() -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = {
        Requirement(found).name: Requirement(found).specifier
        for found in re.findall(r'^    "((?:prefect|mlflow|fastapi|boto3)[<>=][^"]*)"', text, re.MULTILINE)
    }
    arguments = dict(re.findall(r"ARG (\w+)=(\S+)", "\n".join(dockerfile())))
    assert allowed["prefect"].contains(arguments["PREFECT_VERSION"])
    assert allowed["mlflow"].contains(arguments["MLFLOW_VERSION"])
    python = re.search(r"^FROM python:(\d+\.\d+\.\d+)-slim-bookworm AS base$", "\n".join(dockerfile()), re.MULTILINE)
    required = re.search(r'^requires-python = "(.+)"$', text, re.MULTILINE)
    assert python and required and SpecifierSet(required[1]).contains(python[1])
    assert all(not line.startswith("FROM") or ":" in line or line.startswith("FROM base ") for line in dockerfile())


def test_the_images_run_as_nobody_and_hold_what_the_package_is_built_from() -> None:
    for stage in ("services", "worker"):
        assert [line for line in stages()[stage] if line.startswith("USER ")][-1] == "USER 10001:10001"
    ignored = (INFRA / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    copied = [word for line in dockerfile() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert set(copied) == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    packaged = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert packaged
    assert {found.split("/")[0] for found in re.findall(r'"(.+?)"', packaged[1])} <= set(copied)


def test_images_are_pinned_and_the_same_everywhere() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
    tags = {image["name"]: image["newTag"] for image in kustomization["images"]}
    assert set(tags.values()) == {PROJECT["version"]}
    composed_images = {container.where.split()[-1]: container.image for container in composed()}
    for container in deployed():
        image = container.image if ":" in container.image else f"{container.image}:{tags[container.image]}"
        assert composed_images[container.where.split()[-1]] == image
        assert re.fullmatch(r"[a-z-]+:\d+\.\d+(\.\d+)?(-[a-z]+)?", image)


# --- Kubernetes


def test_the_manifests_are_what_the_api_takes_and_nothing_unknown_is_in_them() -> None:
    import kubernetes_validate

    secrets = list(yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text(encoding="utf-8")))
    for document in [*manifests(), *secrets]:
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    wrong = json.loads(json.dumps(named("Deployment")["worker"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True  # one level too high
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFilesystem"):
        kubernetes_validate.validate(wrong, KUBERNETES_VERSIONS[-1], strict=True)


def test_kustomize_builds_them() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; that its references resolve is tested without it")
    import kubernetes_validate

    done = subprocess.run([kubectl, "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=True)
    assert not done.stderr  # it warns of deprecated fields
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(manifests()) + 2
    for document in built:
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "compression"
    worker = next(one for one in built if (one["kind"], one["metadata"]["name"]) == ("Deployment", "worker"))
    image = worker["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"registry.example.org/compression-worker:{PROJECT['version']}"
    settings = next(one for one in built if one["metadata"]["name"].startswith("settings-"))["metadata"]["name"]
    assert settings in json.dumps(worker)  # a changed setting restarts who uses it


def test_what_the_manifests_name_is_there() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"secrets.yaml"}
    assert files == {*kustomization["resources"], "kustomization.yaml", "secrets.example.yaml"}
    literals = {
        generated["name"]: dict(literal.split("=", 1) for literal in generated.get("literals", []))
        for generated in kustomization["configMapGenerator"]
    }
    for generated in kustomization["configMapGenerator"]:
        assert all((KUBERNETES / name).is_file() for name in generated.get("files", []))
    secrets = {
        secret["metadata"]["name"]: secret["stringData"]
        for secret in yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text(encoding="utf-8"))
    }
    assert {value for data in secrets.values() for value in data.values()} == {""}  # nobody's password is in a file
    used = set()
    for name, pod in pods().items():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claims = [claim["metadata"]["name"] for claim in _claims(name)]
        for container in pod["containers"]:
            for entry in container["env"]:
                source = entry.get("valueFrom", {})
                if reference := source.get("secretKeyRef"):
                    assert reference["key"] in secrets[reference["name"]], entry
                    used.add((reference["name"], reference["key"]))
                elif reference := source.get("configMapKeyRef"):
                    assert reference["key"] in literals[reference["name"]], entry
                assert not SECRET.search(entry["name"]) or "secretKeyRef" in source, entry
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {*volumes, *claims}, name
            ports = {port["name"] for port in container["ports"]}
            probes = [container[probe] for probe in container if probe.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in named("PersistentVolumeClaim")
            config = volume.get("configMap", {})
            assert not config or config.get("optional") or config["name"] in literals
    assert used == {(name, key) for name, data in secrets.items() for key in data}


def test_no_container_starts_with_an_empty_secret() -> None:
    """Prefect would let everybody in. (PostgreSQL's passwords: its image and create-databases.sh refuse empty ones.)"""
    looked_at = set()
    for name, pod in pods().items():
        for container in pod["containers"]:
            secrets = [entry["name"] for entry in container["env"] if "secretKeyRef" in entry.get("valueFrom", {})]
            required = [one for one in secrets if one.startswith("AWS_") or one == "PREFECT_SERVER_API_AUTH_STRING"]
            full = dict.fromkeys(required, "x y")
            for lacking in required:
                done = start(container, {**full, lacking: ""})
                assert done.returncode and f"{lacking}: fill in secrets.yaml" in done.stderr, done
                looked_at.add((name, lacking))
            if required:
                assert start(container, full).stdout == "started with two words\n"
    assert len(looked_at) == 5


def start(container: Any, secrets: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a container's command with `echo` in place of its program."""
    command = [*container["command"], "echo", "started", "with two words"]
    environment = {"PATH": os.environ["PATH"], **secrets}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _claims(name: str) -> list[Any]:
    claims: list[Any] = named("StatefulSet").get(name, {"spec": {}})["spec"].get("volumeClaimTemplates", [])
    return claims


def test_services_and_network_policies_choose_pods_that_exist() -> None:
    labels = {name: workload["spec"]["template"]["metadata"]["labels"] for name, workload in _workloads()}
    for name, workload in _workloads():
        assert workload["spec"]["selector"]["matchLabels"] == labels[name]
    for name, service in named("Service").items():
        assert service["spec"]["selector"] == labels[name]
        port = service["spec"]["ports"][0]
        container = pods()[name]["containers"][0]["ports"][0]
        assert port["port"] == container["containerPort"]
        assert port.get("targetPort", container["containerPort"]) in (container["name"], container["containerPort"])
        addresses = [value for one in deployed() for value in one.environment.values() if value]
        assert any(f"{name}:{port['port']}" in address for address in addresses)
    for policy in named("NetworkPolicy").values():
        for selector in _selectors(policy["spec"]):
            apps = {selector["matchLabels"]["app"]} if "matchLabels" in selector else set()
            for expression in selector.get("matchExpressions", []):
                assert (expression["key"], expression["operator"]) == ("app", "In")
                apps |= set(expression["values"])
            assert apps <= set(labels)
    everything = named("NetworkPolicy")["nothing-else"]["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def _workloads() -> list[tuple[str, Any]]:
    return list((named("Deployment") | named("StatefulSet")).items())


def _selectors(spec: Any) -> Iterator[Any]:
    yield spec["podSelector"]
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        yield from (
            peer["podSelector"] for peer in [*rule.get("from", []), *rule.get("to", [])] if "podSelector" in peer
        )


def test_pods_may_do_little_and_say_how_they_are() -> None:
    """What the namespace's `restricted` level asks for, and read-only file systems."""
    assert named("Namespace")["compression"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods().items():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name  # a Service called mlflow would set MLFLOW_PORT=tcp://…
        assert all(set(volume) & {"emptyDir", "configMap", "persistentVolumeClaim"} for volume in pod["volumes"]), name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            # The worker's health is that of Prefect's server: a probe of it would end the run at work.
            other = {"readinessProbe", "livenessProbe"} & set(container)
            assert "startupProbe" in container and bool(other) == (name != "worker"), name
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], name
    for name, workload in named("Deployment").items():  # one of each: databases migrate, and a home has one worker
        assert (workload["spec"]["replicas"], workload["spec"]["strategy"]) == (1, {"type": "Recreate"}), name
