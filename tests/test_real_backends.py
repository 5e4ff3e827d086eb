"""The nightly pipeline on the services of a company: PostgreSQL behind Prefect and MLflow, and credentials everywhere.

Prefect's server and MLflow's each have a database with a password; MLflow asks for a password too and keeps artifacts
in a bucket; a worker publishes to another bucket with the keys of a user who may do no more than infra/s3 grants.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from orchestrator.registry import DIGEST_TAG, ModelRegistry
from tests.mlflow_server import serve_mlflow
from tests.postgres_server import Database, serve_postgres
from tests.prefect_server import DEPLOYMENTS, PATIENCE_SECONDS, client, prefect_server, process_worker, wait_for
from tests.s3_server import free_port, serve

S3 = Path(__file__).parents[1] / "infra" / "s3"
RELEASES, ARTIFACTS = "compressed-models", "mlflow-artifacts"  # the buckets that the policies name
MLFLOW_PASSWORD = "tr@cking:/pass%word+1"
MODEL = "nightly"


@dataclass
class Services:
    """What runs, and the environment of somebody who uses it. secrets: what must be seen nowhere."""

    folder: Path
    prefect: Database
    mlflow: Database
    s3: str
    keys: Mapping[str, tuple[str, str]]
    mlflow_port: int = field(default_factory=free_port)
    api: str = ""
    tracking_server: ExitStack = field(default_factory=ExitStack)

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def tracking_with(self, password: str = MLFLOW_PASSWORD) -> str:
        return self.tracking.replace("://", f"://admin:{quote(password, safe='')}@")

    @property
    def secrets(self) -> set[str]:
        plain = {self.prefect.password, self.mlflow.password, MLFLOW_PASSWORD} | {key for _, key in self.keys.values()}
        return plain | {quote(secret, safe="") for secret in plain}

    def aws(self, user: str) -> dict[str, str]:
        key, secret = self.keys[user]
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL_S3": self.s3}

    @cached_property
    def environment(self) -> dict[str, str]:
        foreign = ("PREFECT_", "AWS_", "MLFLOW_", "ORCHESTRATOR_")
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            **self.aws("publisher"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "HOME": str(self.folder),
            "PWD": str(self.folder),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1",
            "ORCHESTRATOR_HOME": str(self.folder / "home"),
            "MLFLOW_TRACKING_URI": self.tracking_with(),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a server that is gone stays gone here
        }

    def orchestrator(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=self.folder,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def succeed(self, *arguments: str) -> Any:
        """Run a command that must not fail; return its document."""
        done = self.orchestrator(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, exit_code: int, *arguments: str, **changes: str) -> str:
        """Run a command that must fail in this way; return what it said, which is no secret and no traceback."""
        done = self.orchestrator(*arguments, **changes)
        assert done.returncode == exit_code, done.stderr
        assert "Traceback" not in done.stderr
        given = {value for value in changes.values() if "wrong" in value}
        assert not [secret for secret in self.secrets | given if secret in done.stdout + done.stderr]
        return done.stderr

    def start_mlflow(self) -> None:
        """Start MLflow's server, always at the same address; it alone has the keys of its bucket."""
        server = serve_mlflow(
            self.mlflow.address("postgresql+psycopg2"),
            self.folder,
            destination=f"s3://{ARTIFACTS}/runs",
            password=MLFLOW_PASSWORD,
            port=self.mlflow_port,
            environment={**self.environment, **self.aws("mlflow")},
        )
        self.tracking_server.enter_context(server)

    def browse(self, path: str) -> bytes:
        """Open a page of MLflow's server as a browser does, with user and password."""
        user = base64.b64encode(f"admin:{MLFLOW_PASSWORD}".encode()).decode()
        request = urllib.request.Request(f"{self.tracking}/{path}", headers={"Authorization": f"Basic {user}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Everything in a bucket."""
        import boto3

        s3 = boto3.client(
            "s3",
            endpoint_url=self.s3,
            aws_access_key_id=self.keys["auditor"][0],
            aws_secret_access_key=self.keys["auditor"][1],
            region_name="us-east-1",
        )
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {name: s3.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}

    def releases(self) -> list[str]:
        """The complete ones in the bucket."""
        return sorted(name.removesuffix("/COMPLETE") for name in self.objects(RELEASES) if name.endswith("/COMPLETE"))

    def spec(self, num_bits: int) -> str:
        """Write the specification of the night; return its name."""
        steps = [
            {"quantize": "rtn", "with": {"num_bits": num_bits, "group_size": 32}},
            {
                "validate": "perplexity",
                "with": {"source": "valid.txt", "length_tokens": 32, "windows": 16},
                "require": {"perplexity_ratio": {"max": 3}},
            },
            {
                "register": "release",
                "with": {"uri": f"s3://{RELEASES}/nights", "alias": "candidate"},
                "engines": [{"vllm": {"gpu_memory_gib": 8, "max_model_len": 64}}],
            },
        ]
        document = {"version": 1, "name": MODEL, "model": {"id": "model"}, "steps": steps}
        (self.folder / "nightly.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        return "nightly.yaml"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """All servers, empty."""
    from tests.tiny import make_model

    pytest.importorskip("flask_wtf", reason="MLflow's password check needs Flask-WTF: pip install 'mlflow[auth]'")
    folder = tmp_path_factory.mktemp("services")
    make_model(folder / "model", layers=2)
    words = ["quick", "brown", "fox", "jumps", "over", "seven", "wizards", "judge"]
    text = "\n".join(" ".join(words[(line * word) % 7 + line % 2] for word in range(9)) for line in range(99))
    (folder / "valid.txt").write_text(text, encoding="utf-8")
    with ExitStack() as running, ThreadPoolExecutor() as pool:
        prefect, mlflow = running.enter_context(serve_postgres("prefect", "mlflow"))
        s3 = running.enter_context(serve(folder / "s3-server.log"))
        services = Services(folder, prefect, mlflow, s3, _make_accounts(s3))
        services.spec(8)
        database = prefect.address("postgresql+asyncpg")
        environment = {**services.environment, "PREFECT_API_DATABASE_CONNECTION_URL": database}
        running.callback(services.tracking_server.close)
        starting = pool.submit(services.start_mlflow)
        services.api = running.enter_context(prefect_server(environment, folder))
        starting.result()
        yield services


def _make_accounts(endpoint: str) -> dict[str, tuple[str, str]]:
    """Two buckets, and users with the policies of infra/s3; from then on the server demands their keys."""
    import boto3

    root = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
    for bucket in (RELEASES, ARTIFACTS):
        boto3.client("s3", endpoint_url=endpoint, **root).create_bucket(Bucket=bucket)
    iam = boto3.client("iam", endpoint_url=endpoint, **root)
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    policies = {"publisher": (S3 / "policy.json").read_text(), "mlflow": (S3 / "mlflow.json").read_text()}
    keys = {}
    for user, policy in {**policies, "auditor": json.dumps(everything)}.items():
        iam.create_user(UserName=user)
        # Amazon grants HeadBucket to who may ListBucket; this server asks for it by a name of its own.
        policy = policy.replace('"s3:ListBucket"]', '"s3:ListBucket", "s3:HeadBucket"]')
        policy = policy.replace('["s3:ListBucket",', '["s3:ListBucket", "s3:HeadBucket",')
        iam.put_user_policy(UserName=user, PolicyName=user, PolicyDocument=policy)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        keys[user] = (key["AccessKeyId"], key["SecretAccessKey"])
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=10).close()
    return keys


@dataclass(frozen=True)
class Nights:
    """Two nights with the same model. runs: of Prefect. releases: in the bucket, after each."""

    runs: tuple[Any, Any]
    releases: tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def nights(services: Services) -> Nights:
    """Deploy as a user does, and let a worker run the deployment that has a schedule twice."""
    environment = {**services.environment, "PREFECT_API_URL": services.api}
    with process_worker(environment, services.folder, services.api) as (worker, log), client(services.api) as api:
        (name,) = [
            one["name"] for one in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"] if one.get("schedules")
        ]
        deploy = ["--no-prompt", "deploy", "--prefect-file", str(DEPLOYMENTS), "--name", name]
        subprocess.run(
            [sys.executable, "-m", "prefect", *deploy],
            env=environment,
            cwd=services.folder,
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
        )
        nightly = api.read_deployment_by_name(f"compress/{name}")
        runs, releases = [], []
        for _ in range(2):
            created = api.create_flow_run_from_deployment(nightly.id, parameters={"spec": "nightly.yaml"})

            def ended(created: Any = created) -> Any:
                run = api.read_flow_run(created.id)
                return run if run.state.is_final() else None

            run = wait_for(ended, worker, log)
            assert run.state.is_completed(), f"{run.state}\n{log.read_text(errors='replace')[-3000:]}"
            runs.append(run)
            releases.append(services.releases())
    return Nights((runs[0], runs[1]), (releases[0], releases[1]))


def mlflow_runs(services: Services) -> list[tuple[Any, ...]]:
    """Name, status, artifact address and id of all runs, as they are in PostgreSQL."""
    columns = "name, status, artifact_uri, run_uuid"
    return services.mlflow.query(f"select {columns} from runs order by start_time, name")


def test_a_night_is_in_postgresql_in_mlflow_and_in_the_bucket(services: Services, nights: Nights) -> None:
    (state,) = services.prefect.query("select state_type, name from flow_run where id = %s", str(nights.runs[0].id))
    assert state == ("COMPLETED", nights.runs[0].name)
    tasks = services.prefect.query(
        "select name, state_type from task_run where flow_run_id = %s order by start_time", str(nights.runs[0].id)
    )
    steps = ["quantize rtn", "validate perplexity", "register release"]
    assert tasks == [(step, "COMPLETED") for step in steps]

    runs = {name: (status, uri, run) for name, status, uri, run in mlflow_runs(services)}
    assert {name: status for name, (status, _, _) in runs.items()} == dict.fromkeys([MODEL, *steps], "FINISHED")
    validation = runs["validate perplexity"][2]
    measured = dict(services.mlflow.query("select key, value from latest_metrics where run_uuid = %s", validation))
    assert 0 < measured["perplexity_ratio"] < 3
    assert runs[MODEL][1].startswith("mlflow-artifacts:/")
    from orchestrator.tracking import connect

    mlflow = connect(services.tracking_with())
    kept = {file.path for file in mlflow.list_artifacts(runs[MODEL][2])}
    assert kept == {"metrics.md", "report.html"}
    page = services.browse(f"get-artifact?path=report.html&run_uuid={runs[MODEL][2]}")
    assert page.startswith(b"<!doctype html>")
    assert page in services.objects(ARTIFACTS).values()

    (release,) = nights.releases[0]
    version = ModelRegistry(services.tracking_with()).resolve(f"models:/{MODEL}@candidate")
    assert (version.version, version.source) == ("1", f"s3://{RELEASES}/{release}")
    pulled = services.succeed("pull", f"models:/{MODEL}@candidate", "pulled")
    assert pulled["digest"] == version.tags[DIGEST_TAG]
    assert (services.folder / "pulled" / "model.safetensors").stat().st_size > 1000


def test_the_second_night_finds_nothing_to_do(services: Services, nights: Nights) -> None:
    assert nights.releases[0] == nights.releases[1]
    (state,) = services.prefect.query("select state_type from flow_run where id = %s", str(nights.runs[1].id))
    assert state == ("COMPLETED",)
    assert services.mlflow.query("select version from model_versions where name = %s", MODEL)[:1] == [(1,)]
    journals = sorted((services.folder / "home" / "runs").glob("*.jsonl"))[:2]
    steps = [
        [event["cached"] for line in journal.read_text().splitlines() if "cached" in (event := json.loads(line))]
        for journal in journals
    ]
    assert steps == [[False] * 3, [True] * 3]


def test_wrong_keys_and_passwords_are_refused_with_what_to_do(services: Services, nights: Nights) -> None:
    key = {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}
    with ThreadPoolExecutor(2) as pool:
        pulled = pool.submit(services.refused, 6, "pull", f"s3://{RELEASES}/{nights.releases[0][0]}", "refused", **key)
        home = {"ORCHESTRATOR_HOME": str(services.folder / "another-home")}
        tracked = pool.submit(
            services.refused,
            3,
            *("run", "nightly.yaml", "--local"),
            **home,
            MLFLOW_TRACKING_URI=services.tracking_with("wrong@password"),
        )
        started = pool.submit(
            services.refused,
            3,
            *("run", "nightly.yaml"),
            **home,
            PREFECT_API_DATABASE_CONNECTION_URL=services.prefect.address("postgresql+asyncpg", "wrong:password"),
        )
    assert "AWS_SECRET_ACCESS_KEY" in pulled.result()
    assert not (services.folder / "refused").exists()
    assert f"MLflow at {services.tracking} cannot be used: it refuses this user or password" in tracked.result()
    assert "MLFLOW_TRACKING_PASSWORD" in tracked.result()
    assert "password authentication failed" in started.result()
    assert "PREFECT_API_DATABASE_CONNECTION_URL" in started.result()
    assert not list((services.folder / "another-home").glob("artifacts/*"))


@dataclass(frozen=True)
class Outage:
    """A run during which MLflow's server ended, one without it, and one with it again. Texts are what was said."""

    during: tuple[int, str]
    without: str
    releases: list[str]
    after: Any


@pytest.fixture(scope="module")
def outage(services: Services, nights: Nights) -> Outage:
    """Another specification of the same model, so that there is a second version in the end."""
    spec = services.spec(4)
    said = ""
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", spec, "--local"],
        cwd=services.folder,
        env=services.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr
        for line in run.stderr:
            said += line
            if line.startswith("2/3 validate"):
                break
        run.send_signal(signal.SIGSTOP)
        services.tracking_server.close()
        run.send_signal(signal.SIGCONT)
        said += run.stderr.read()
    without = services.refused(3, "run", spec, "--local")
    releases = services.releases()
    services.start_mlflow()
    return Outage((run.returncode, said), without, releases, services.succeed("run", spec, "--local"))


def test_a_tracking_server_that_dies_is_named_and_nothing_computed_is_lost(services: Services, outage: Outage) -> None:
    exit_code, said = outage.during
    assert exit_code == 4 and "Traceback" not in said
    assert f"MLflow at {services.tracking} could not record the step 'validate perplexity'" in said
    assert "then run again" in said
    assert f"MLflow cannot be reached at {services.tracking}: " in outage.without
    assert "cached" in outage.without  # both steps before the one for which MLflow is needed
    assert len(outage.releases) == 1
    assert [step["cached"] for step in outage.after["steps"]] == [True, True, False]
    assert outage.after["release"]["model_version"] == "2"
    assert len(services.releases()) == 2
    closed = [status for name, status, _, _ in mlflow_runs(services) if name == MODEL]
    assert closed == ["FINISHED", "FAILED", "FINISHED"]  # the next run told how the one between them ended


def test_promotion_and_rollback_are_in_the_history_and_in_postgresql(services: Services, outage: Outage) -> None:
    services.succeed("promote", MODEL, "1", "--to", "production", "--force", "--reason", "the first night")
    services.succeed("promote", MODEL, "candidate", "--to", "staging")
    services.succeed("promote", MODEL, "staging", "--to", "production")

    def aliases() -> dict[str, int]:
        return dict(services.mlflow.query("select alias, version from registered_model_aliases where name = %s", MODEL))

    assert aliases() == {"candidate": 2, "staging": 2, "production": 2}
    services.succeed("rollback", MODEL, "--reason", "a test")
    assert aliases() == {"candidate": 2, "staging": 2, "production": 1}
    history = services.succeed("history", MODEL)
    told = [(entry["kind"], entry["alias"], entry["version"]) for entry in history["entries"]]
    assert told[-3:] == [("promote", "staging", "2"), ("promote", "production", "2"), ("rollback", "production", "1")]


REGISTER = """
import sys, time
from pathlib import Path
from orchestrator.home import Settings
from orchestrator.registry import DIGEST_TAG, ModelRegistry

registry = ModelRegistry(Settings.from_environment().tracking_uri)
assert registry.model("raced") is None
Path(sys.argv[1]).touch()
while not Path("go").exists():
    time.sleep(0.001)
digest = {DIGEST_TAG: "the same digest"}
print(registry.register("raced", source="s3://b/raced", run_id=None, tags=digest, alias="candidate", description=""))
"""


def test_two_who_register_the_same_release_at_once_make_one_version(services: Services, outage: Outage) -> None:
    names = ["ready-ada", "ready-ben", "ready-cyd"]
    people = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER, name],
            cwd=services.folder,
            env=services.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]

    def all_ready() -> bool | None:
        return all((services.folder / name).exists() for name in names) or None

    wait_for(all_ready, people[0], services.folder / "mlflow-server.log")
    (services.folder / "go").touch()
    assert [person.communicate(timeout=PATIENCE_SECONDS)[0] for person in people] == ["1\n"] * 3
    registry = ModelRegistry(services.tracking_with())
    assert registry.sources("raced") == ["s3://b/raced"]
    living = "select version from model_versions where name = 'raced' and current_stage <> 'Deleted_Internal'"
    assert services.mlflow.query(living) == [(1,)]
    assert registry.alias_version("raced", "candidate") == "1"


def test_no_secret_is_kept_anywhere(services: Services, nights: Nights, outage: Outage) -> None:
    texts = {f"database {database.name}": database.dump() for database in (services.prefect, services.mlflow)}
    for bucket in (RELEASES, ARTIFACTS):
        texts |= {f"s3://{bucket}/{name}": content for name, content in services.objects(bucket).items()}
    settings = services.folder / "basic-auth.ini"  # of MLflow's server, given to it by this test
    for path in services.folder.rglob("*"):
        if path.is_file() and path != settings:
            texts[str(path)] = path.read_bytes()
    assert MODEL.encode() in texts["database prefect"] and MODEL.encode() in texts["database mlflow"]
    assert len(texts) > 100
    found = [
        (name, secret) for name, content in texts.items() for secret in services.secrets if secret.encode() in content
    ]
    assert found == []
