"""The compose file, the image and the Kubernetes manifests: schemas of those who read them, and what they refer to.

No Docker and no cluster is needed: command lines are given to the parsers of the installed programs, variables are
looked up in the libraries that read them.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY")
PROJECT = {  # what a worker image is built of
    match[1]: match[2]
    for match in re.finditer(r'^(name|version) = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
}
KUBERNETES_VERSIONS = ("1.29", "1.37")  # the oldest that knows all that is used, and the newest with schemas here


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
            container.get("command", []),
            {entry["name"]: entry.get("value") for entry in container.get("env", [])},
        )
        for name, pod in pods().items()
        for container in pod["containers"]
    ]


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
            assert "startupProbe" in container and {"readinessProbe", "livenessProbe"} & set(container), name
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], name
    for name, workload in named("Deployment").items():  # one of each: databases migrate, and a home has one worker
        assert (workload["spec"]["replicas"], workload["spec"]["strategy"]) == (1, {"type": "Recreate"}), name


# --- what the programs know


def check_command(command: list[str]) -> None:
    """Give a command line to the parser of the program that will read it; it raises what it does not know."""
    program, *arguments = command
    if program == "prefect":
        from prefect.cli._app import _app

        quiet = {"exit_on_error": False, "print_error": False}
        _, bound, *_ = _app.meta.parse_args(arguments, **quiet)
        _app.parse_args(list(bound.args), **quiet)
    else:
        import click
        from mlflow.cli import cli

        assert program == "mlflow"
        parser: Any = cli
        while hasattr(parser, "get_command"):
            parser = parser.get_command(click.Context(parser), arguments[0])
            arguments = arguments[1:]
        parser.make_context(program, arguments)


@pytest.mark.parametrize("container", [*composed(), *deployed()], ids=lambda container: container.where)
def test_the_installed_programs_accept_the_commands(container: Container) -> None:
    if container.command:
        check_command(container.command)
    else:
        assert container.image.startswith("postgres:")


def test_the_parsers_refuse_what_they_do_not_know() -> None:
    import click
    import cyclopts

    with pytest.raises(cyclopts.CycloptsError):
        check_command(["prefect", "server", "start", "--hots=0.0.0.0"])
    with pytest.raises(click.UsageError):
        check_command(["mlflow", "server", "--alowed-hosts=mlflow"])


def test_the_commands_in_the_comments_and_the_readme_are_accepted() -> None:
    found = []
    for name in ("docker-compose.yaml", "README.md"):
        text = re.sub(r"\s*\\\n#?\s*", " ", (INFRA / name).read_text(encoding="utf-8"))
        found += re.findall(r"(?:^|worker(?: --)? |-c ')((?:prefect|mlflow) (?!server)[^\n`#|']*)", text, re.MULTILINE)
    assert {tuple(shlex.split(line)[:3]) for line in found} == {
        ("prefect", "--no-prompt", "deploy"),
        ("prefect", "deployment", "run"),
        ("mlflow", "db", "upgrade"),
    }
    for line in found:
        check_command(shlex.split(line))


def known(name: str) -> bool:
    """Whether what runs in the container reads the variable."""
    if name in ("PREFECT_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD"):
        return name in (KUBERNETES / "create-databases.sh").read_text(encoding="utf-8")
    if name.startswith("PREFECT_"):
        import prefect.settings

        return hasattr(prefect.settings, name)
    if name.startswith("MLFLOW_"):
        import click
        import mlflow.environment_variables
        from mlflow.cli import cli

        server = cli.get_command(click.Context(cli), "server")
        assert server is not None
        options = {option.envvar for option in server.params}
        return name in options | {getattr(one, "name", None) for one in vars(mlflow.environment_variables).values()}
    if name.startswith("AWS_"):
        from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES as SESSION
        from botocore.credentials import EnvProvider

        read = {word for entry in SESSION.values() for word in _words(entry[1])}
        return name in read | {EnvProvider.ACCESS_KEY, EnvProvider.SECRET_KEY, "AWS_ENDPOINT_URL_S3"}
    if name.startswith("ORCHESTRATOR_"):
        return any(f'"{name}"' in path.read_text("utf-8") for path in (ROOT / "orchestrator").rglob("*.py"))
    if name == "HF_HOME":
        import huggingface_hub.constants

        return f'"{name}"' in inspect.getsource(huggingface_hub.constants)
    # Of the image of PostgreSQL, of libpq (tested with a real server), and of `prefect deploy`, for flows/prefect.yaml.
    return name in ("POSTGRES_PASSWORD", "POSTGRES_INITDB_ARGS", "PGDATA", "PGPASSWORD", "PWD")


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


@pytest.mark.parametrize("container", [*composed(), *deployed()], ids=lambda container: container.where)
def test_every_variable_is_read_by_what_runs_there(container: Container) -> None:
    assert [name for name in container.environment if not known(name)] == []
    assert not known("PREFECT_SERVER_UI_STATIC_FOLDER")
    assert not known("MLFLOW_BACKEND_URI")
    assert not known("ORCHESTRATOR_HOUSE")


def test_both_deployments_say_the_same() -> None:
    """What differs: who keeps PostgreSQL's data where, and what Kubernetes gives as settings."""
    there = {container.where.split()[-1]: container for container in deployed()}
    for container in composed():
        other = there[container.where.split()[-1]]
        assert set(container.environment) == set(other.environment) - {"PGDATA", "MLFLOW_ARTIFACTS_DESTINATION"}
        for name, value in other.environment.items():
            assert value is None or name == "PGDATA" or container.environment[name] == value, name
        same = [word for word in container.command if not word.startswith("--artifacts-destination")]
        assert same == [word for word in other.command if not word.startswith("--artifacts-destination")]


def test_an_empty_endpoint_is_amazons(monkeypatch: pytest.MonkeyPatch) -> None:
    from boto3.session import Session

    for name, value in (("AWS_ENDPOINT_URL_S3", ""), ("AWS_DEFAULT_REGION", "eu-central-1")):
        monkeypatch.setenv(name, value)
    assert Session().client("s3").meta.endpoint_url == "https://s3.eu-central-1.amazonaws.com"
