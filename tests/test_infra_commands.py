"""Command lines in infra/, given to the parsers of the installed programs; variables, looked up in who reads them."""

from __future__ import annotations

import inspect
import re
import shlex
from typing import Any

import pytest

from tests.infra_files import INFRA, KUBERNETES, ROOT, Container, compose, composed, deployed, pods


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


def test_the_readme_names_files_where_a_container_can_have_them() -> None:
    """flows/prefect.yaml and specifications of the image cannot be changed; relative paths are the compose file's."""
    text = (INFRA / "README.md").read_text(encoding="utf-8")
    (home,) = (volume.split(":")[1] for volume in compose()["services"]["worker"]["volumes"] if volume[:4] == "home")
    mounts = {mount["mountPath"] for mount in pods()["worker"]["containers"][0]["volumeMounts"]}
    assert home in mounts
    named = re.findall(r"^(docker|kubectl).*(?:--prefect-file |spec=)(\S+)", text, re.MULTILINE)
    assert len(named) == 4
    for program, path in named:
        assert path.startswith("specs/" if program == "docker" else f"{home}/specs/"), path


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
