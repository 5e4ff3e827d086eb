"""A private PostgreSQL server on a loopback port, made from Debian's package and gone with the test.

Every connection needs a password (scram-sha-256). Each database has an owner of its own.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.s3_server import free_port

START_SECONDS = 60
# Without them a cluster on a slow disk takes several times as long; nothing here has to survive a power cut.
CARELESS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@dataclass(frozen=True)
class Database:
    """A database and its owner, who has the same name. The password has characters that an address must quote."""

    name: str
    port: int
    password: str = field(default_factory=lambda: f"p@:/{secrets.token_hex(12)}%+")

    def address(self, driver: str = "postgresql", password: str | None = None) -> str:
        """As SQLAlchemy writes it, e.g. with the driver ``postgresql+asyncpg``."""
        secret = quote(self.password if password is None else password, safe="")
        return f"{driver}://{self.name}:{secret}@127.0.0.1:{self.port}/{self.name}"

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask the database itself, behind the back of whatever uses it."""
        import psycopg2

        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user=self.name, password=self.password, dbname=self.name
        )
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(sql, values or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def dump(self) -> bytes:
        """Everything that is in it, as text."""
        return subprocess.run(
            [str(programs_folder() / "pg_dump"), "--host=127.0.0.1", f"--port={self.port}", "-U", self.name, self.name],
            env={**os.environ, "PGPASSWORD": self.password},
            check=True,
            capture_output=True,
        ).stdout


@contextmanager
def serve_postgres(*names: str) -> Iterator[tuple[Database, ...]]:
    """Make a cluster with a database for each name; yield them once the server answers.

    Skips where PostgreSQL is not installed. RuntimeError with its log if it does not start.
    """
    programs = programs_folder()
    port = free_port()
    databases = tuple(Database(name, port) for name in names)
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other users
    try:
        user = unprivileged(folder)
        _make_cluster(programs, folder, user, databases)
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", *CARELESS]
        command = [str(programs / "postgres"), "-D", str(folder / "data")]
        for setting in settings:
            command += ["-c", setting]
        log = folder / "log"
        with log.open("wb") as output:
            # SIGINT is a fast shutdown: what is connected is cut off. Also if whoever runs the tests is killed.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "INT", *user, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            _wait_until_ready(programs, port, process, log)
            yield databases
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(folder)


def programs_folder() -> Path:
    """The folder of the newest installed version. Debian keeps the server's programs off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        pytest.skip("PostgreSQL is not installed; Debian's package postgresql has it")
    return Path(on_path).resolve().parent


def unprivileged(folder: Path) -> list[str]:
    """Arguments of setpriv that make root somebody else, to whom `folder` is given: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return []
    try:
        account = pwd.getpwnam("postgres")
    except KeyError:
        account = pwd.getpwnam("nobody")
    os.chown(folder, account.pw_uid, account.pw_gid)
    return [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]


def _make_cluster(programs: Path, folder: Path, user: list[str], databases: tuple[Database, ...]) -> None:
    superuser = folder / "superuser"
    superuser.write_text(secrets.token_hex(16), encoding="utf-8")
    superuser.chmod(0o644)
    options = ["--auth=scram-sha-256", f"--pwfile={superuser}", "--encoding=UTF8", "--locale=C", "--no-sync"]
    run = ["setpriv", *user] if user else []
    _checked([*run, str(programs / "initdb"), "-D", str(folder / "data"), "-U", "superuser", *options], folder)
    superuser.unlink()
    statements = []
    for database in databases:
        statements += [
            f"CREATE ROLE {database.name} LOGIN PASSWORD '{database.password}';",
            f"CREATE DATABASE {database.name} OWNER {database.name};",
            f"REVOKE ALL ON DATABASE {database.name} FROM PUBLIC;",
        ]
    # A server of one process, which takes a statement a line and needs no password of its own.
    single = [str(programs / "postgres"), "--single", "-D", str(folder / "data"), "-c", "fsync=off", "postgres"]
    _checked([*run, *single], folder, "\n".join(statements) + "\n")


def _checked(command: list[str], folder: Path, text: str = "") -> None:
    done = subprocess.run(command, input=text, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0 or "ERROR" in done.stderr:
        raise RuntimeError(f"{command[-1]}: exit code {done.returncode}: {done.stderr[-2000:]}")


def _wait_until_ready(programs: Path, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    ask = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if subprocess.run(ask).returncode == 0:
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')[-2000:]}")
