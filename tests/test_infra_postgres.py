"""The script that makes the databases, run on a real server as PostgreSQL's image runs it; and their addresses."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.infra_files import KUBERNETES, Container, composed, deployed
from tests.postgres_server import programs_folder, unprivileged
from tests.s3_server import free_port

PASSWORDS = {"prefect": "pre'f@:/%+ \\$", "mlflow": 'ml"f@:/%+'}
ADDRESSES = [
    (container, name, value)
    for container in [*composed(), *deployed()]
    for name, value in container.environment.items()
    if value and value.startswith("postgresql")
]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, dict[str, str]]]:
    """The port of a server on which its superuser has run the script, and the environment that it did so with."""
    programs = programs_folder()  # skips where PostgreSQL is not installed
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = unprivileged(folder)
    run = ["setpriv", *user] if user else []
    number = free_port()
    try:
        options = ["--auth-local=trust", "--auth-host=scram-sha-256", "--data-checksums", "--no-sync", "-U", "postgres"]
        initialize = [*run, str(programs / "initdb"), "-D", str(folder / "data"), *options]
        subprocess.run(initialize, cwd=folder, check=True, capture_output=True)
        settings = f"-p {number} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [*run, str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w"]
        subprocess.run([*control, "-o", settings, "-l", str(folder / "log"), "start"], cwd=folder, check=True)
        try:
            environment = {
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PGHOST": str(folder),
                "PGPORT": str(number),
                "POSTGRES_USER": "postgres",
                **{f"{name.upper()}_DATABASE_PASSWORD": password for name, password in PASSWORDS.items()},
            }
            script = str(KUBERNETES / "create-databases.sh")
            lacking = {name: value for name, value in environment.items() if name != "PREFECT_DATABASE_PASSWORD"}
            refused = subprocess.run([script], env=lacking, capture_output=True, text=True)
            assert refused.returncode and "PREFECT_DATABASE_PASSWORD is not set" in refused.stderr
            subprocess.run([script], env=environment, check=True)
            yield number, environment
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder, check=True, capture_output=True)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def port(server: tuple[int, dict[str, str]]) -> int:
    return server[0]


@pytest.mark.parametrize(
    ("container", "name", "address"), ADDRESSES, ids=[f"{container.where}, {name}" for container, name, _ in ADDRESSES]
)
def test_the_addresses_name_installed_drivers_that_take_the_password_from_the_environment(
    container: Container, name: str, address: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy import create_engine, make_url, text
    from sqlalchemy.ext.asyncio import create_async_engine

    assert "PGPASSWORD" in container.environment
    url = make_url(address)
    assert (url.host, url.port, url.password) == ("postgres", 5432, None)
    user = url.username
    assert user is not None and url.database == user
    monkeypatch.setenv("PGPASSWORD", PASSWORDS[user])
    reachable = url.set(host="127.0.0.1", port=port)
    if reachable.drivername == "postgresql+asyncpg":

        async def ask() -> object:
            engine = create_async_engine(reachable)
            async with engine.connect() as connection:
                found = await connection.scalar(text("SELECT current_user"))
            await engine.dispose()
            return found

        assert asyncio.run(ask()) == user
    else:
        with create_engine(reachable).connect() as connection:
            assert connection.scalar(text("SELECT current_user")) == user


def test_each_owner_has_its_own_database_only_and_may_make_the_extension_that_prefect_needs(port: int) -> None:
    import psycopg2

    for owner, other in (("prefect", "mlflow"), ("mlflow", "prefect")):
        login = {"host": "127.0.0.1", "port": port, "user": owner, "password": PASSWORDS[owner]}
        connection = psycopg2.connect(**login, dbname=owner)
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
            cursor.execute("CREATE TABLE mine (id int)")
            cursor.execute("SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user")
            assert cursor.fetchone() == (False, False, False)
        connection.close()
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            psycopg2.connect(**login, dbname=other)
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(**{**login, "password": "wrong"}, dbname=owner)


def test_a_dump_brings_back_what_was_lost(server: tuple[int, dict[str, str]]) -> None:
    """The options of the README, of both commands."""
    import psycopg2

    port, environment = server
    readme = (KUBERNETES.parent / "README.md").read_text(encoding="utf-8")
    dump = re.findall(r"exec -T postgres (pg_dump .*) mlflow > mlflow.dump", readme)[0].split()
    restore = re.findall(r"exec -T postgres (pg_restore .*) < mlflow.dump", readme)[0].split()
    login = {"host": "127.0.0.1", "port": port, "user": "mlflow", "password": PASSWORDS["mlflow"], "dbname": "mlflow"}

    def query(sql: str) -> list[tuple[object, ...]]:
        with closing(psycopg2.connect(**login)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []

    query("CREATE TABLE runs (id int); INSERT INTO runs VALUES (1), (2)")
    saved = subprocess.run([*dump, "mlflow"], env=environment, check=True, capture_output=True).stdout
    query("DELETE FROM runs; INSERT INTO runs VALUES (3)")
    subprocess.run(restore, env=environment, input=saved, check=True)
    assert query("SELECT id FROM runs ORDER BY id") == [(1,), (2,)]
    assert query("SELECT tableowner FROM pg_tables WHERE tablename = 'runs'") == [("mlflow",)]
