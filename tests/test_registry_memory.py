"""A cached run need not ask MLflow, and still notices whatever somebody else did to version, alias and release."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.home import Settings
from orchestrator.plugins import discover
from orchestrator.registry import ModelRegistry
from orchestrator.registry_memory import RegistryMemory
from orchestrator.run import run_locally
from orchestrator.tracking import connect
from tests.mlflow_server import make_database
from tests.test_run import Watcher
from tests.tiny import make_model

SPEC = """\
version: 1
name: kept
model: {id: model}
steps:
  - prune: magnitude
  - register: release
    with: {alias: candidate}
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "some.db"
    change(path, "CREATE TABLE numbers (number INTEGER)")
    change(path, "INSERT INTO numbers VALUES (1)")
    return path


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


READERS: list[sqlite3.Connection] = []  # held open by `written_ahead`


def memory_of(database: Path) -> RegistryMemory:
    return RegistryMemory(f"sqlite:///{database}", database.parent)


def test_an_answer_is_kept_until_the_database_changes(database: Path) -> None:
    assert memory_of(database).recall("m/1") is None
    assert memory_of(database).learn("m/1", lambda: "1") == "1"
    assert memory_of(database).learn("m@a", lambda: "2") == "2"
    assert memory_of(database).recall("m/1") == "1"
    assert memory_of(database).recall("m@a") == "2"
    assert memory_of(database).recall("m/2") is None
    change(database, "INSERT INTO numbers VALUES (2)")
    assert memory_of(database).recall("m/1") is None
    assert memory_of(database).learn("m/1", lambda: "1") == "1"
    assert memory_of(database).recall("m@a") is None


def replaced(path: Path) -> None:
    other = path.with_name("other.db")
    change(other, "CREATE TABLE numbers (number INTEGER)")
    change(other, "INSERT INTO numbers VALUES (3)")
    other.replace(path)


def written_ahead(path: Path) -> None:
    """Change it in sqlite's other mode and keep a reader, so that the change stays in the log beside the file."""
    change(path, "PRAGMA journal_mode = WAL")
    memory_of(path).learn("m/1", lambda: "1")
    before = path.read_bytes()
    reader = sqlite3.connect(path)
    reader.execute("SELECT * FROM numbers").fetchone()
    change(path, "UPDATE numbers SET number = 3")
    assert path.read_bytes() == before
    READERS.append(reader)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda path: change(path, "UPDATE numbers SET number = 3"),
        replaced,
        written_ahead,
        Path.unlink,
        lambda path: path.write_bytes(b"no database"),
    ],
    ids=["one number", "another file", "write-ahead log", "gone", "damaged"],
)
def test_no_change_goes_unnoticed_even_if_size_and_times_are_the_same(
    database: Path, meddle: Callable[[Path], None]
) -> None:
    memory_of(database).learn("m/1", lambda: "1")
    times = database.stat()
    meddle(database)
    if database.exists():
        os.utime(database, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        assert memory_of(database).recall("m/1") is None
    finally:
        while READERS:
            READERS.pop().close()


def test_a_database_that_somebody_is_writing_is_not_believed(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.registry_memory.LOCK_SECONDS", 0.01)
    memory_of(database).learn("m/1", lambda: "1")
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert memory_of(database).recall("m/1") is None
        assert memory_of(database).learn("m/2", lambda: "2") == "2"
        writer.rollback()
    assert memory_of(database).recall("m/1") == "1"
    assert memory_of(database).recall("m/2") is None


def test_what_may_be_outdated_or_is_not_there_is_not_kept(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> str:
        change(database, "INSERT INTO numbers VALUES (2)")
        return "1"

    content = database.read_bytes()
    memory_of(database).learn("m/1", ask)
    assert memory_of(database).recall("m/1") is None
    database.write_bytes(content)  # as it was before the question: it was not this one that answered
    assert memory_of(database).recall("m/1") is None
    assert memory_of(database).learn("m/2", lambda: None) is None
    assert memory_of(database).recall("m/2") is None
    monkeypatch.setattr("orchestrator.registry_memory.MAX_DATABASE_BYTES", 1)
    assert memory_of(database).learn("m/3", lambda: "3") == "3"
    assert memory_of(database).recall("m/3") is None


def test_another_workspace_of_mlflow_is_another_registry(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of(database).learn("m/1", lambda: "1")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "others")
    assert memory_of(database).recall("m/1") is None


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql://h/d", "sqlite://", "sqlite:///:memory:"])
def test_only_the_answers_of_a_local_file_are_kept(uri: str, tmp_path: Path) -> None:
    memory = RegistryMemory(uri, tmp_path)
    assert memory.learn("m/1", lambda: "1") == "1"
    assert memory.recall("m/1") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"database": 1, "answers": []}', "\x00"])
def test_a_damaged_memory_knows_nothing(database: Path, content: str) -> None:
    memory_of(database).learn("m/1", lambda: "1")
    (database.parent / "registry-answers.json").write_text(content, encoding="utf-8")
    assert memory_of(database).recall("m/1") is None
    memory_of(database).learn("m/1", lambda: "1")
    assert memory_of(database).recall("m/1") == "1"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    make_model(folder / "model", layers=1)
    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(material: Path) -> Settings:
    """A home with a finished run, whose registry is a database of its own."""
    settings = Settings(material / "home", make_database(material / "home"))
    document = run_again(material, settings)[0]
    assert document["release"]["model_version"] == "1"
    return settings


@pytest.fixture
def settings(finished: Settings, tmp_path: Path) -> Any:
    """The finished run, free to be damaged: home and database are put back. What is remembered is up to date."""
    home = finished.home
    shutil.copytree(home, tmp_path / "kept")
    assert recalled(finished) == ("1", "1")
    yield finished
    shutil.copyfile(tmp_path / "kept" / "mlflow.db", home / "mlflow.db")  # the same inode: MLflow has it open
    for name in ("releases", "artifacts", "steps"):
        shutil.rmtree(home / name)
        shutil.copytree(tmp_path / "kept" / name, home / name)
    shutil.copyfile(tmp_path / "kept" / "registry-answers.json", home / "registry-answers.json")


def recalled(settings: Settings) -> tuple[str | None, str | None]:
    memory = RegistryMemory(settings.tracking_uri, settings.home)
    return memory.recall("kept/1"), memory.recall("kept@candidate")


def run_again(material: Path, settings: Settings) -> tuple[Any, list[str]]:
    watcher = Watcher()
    return run_locally(material / "spec.yaml", discover(), settings, watcher).document(), watcher.notes


def cached(document: Any) -> list[bool]:
    return [step["cached"] for step in document["steps"]]


def in_a_process(material: Path, settings: Settings, code: str) -> subprocess.CompletedProcess[str]:
    home = {"ORCHESTRATOR_HOME": str(settings.home), "MLFLOW_TRACKING_URI": settings.tracking_uri}
    return subprocess.run(
        [sys.executable, "-c", code, "run", str(material / "spec.yaml"), "--local", "--json"],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_cached_run_imports_neither_mlflow_nor_torch_nor_transformers(material: Path, settings: Settings) -> None:
    code = (
        "import atexit, sys\n"
        "from orchestrator.cli import main\n"
        "heavy = ('mlflow', 'torch', 'transformers', 'numpy', 'boto3', 'prefect')\n"
        "atexit.register(lambda: print('imported:', *set(heavy) & set(sys.modules), file=sys.stderr))\n"
        "main()\n"
    )
    done = in_a_process(material, settings, code)
    assert done.returncode == 0, done.stderr
    assert cached(json.loads(done.stdout)) == [True, True]
    assert done.stderr.splitlines()[-1] == "imported:"


def test_a_version_deleted_by_somebody_is_registered_again(material: Path, settings: Settings) -> None:
    connect(settings.tracking_uri).delete_model_version("kept", "1")
    document, notes = run_again(material, settings)
    assert cached(document) == [True, False]
    assert any("version 1 of kept is no longer in the model registry" in note for note in notes)
    registry = ModelRegistry(settings.tracking_uri)
    version = document["release"]["model_version"]
    assert registry.resolve("models:/kept@candidate").version == version
    assert cached(run_again(material, settings)[0]) == [True, True]


def test_an_alias_moved_by_somebody_is_moved_back(material: Path, settings: Settings) -> None:
    client, registry = connect(settings.tracking_uri), ModelRegistry(settings.tracking_uri)
    client.create_model_version("kept", "s3://elsewhere/model")
    client.set_registered_model_alias("kept", "candidate", "2")
    document, notes = run_again(material, settings)
    assert cached(document) == [True, True]
    assert any("alias candidate of kept moved from version 2 to version 1" in note for note in notes)
    assert registry.alias_version("kept", "candidate") == "1"
    assert recalled(settings) == ("1", "1")
    client.delete_registered_model_alias("kept", "candidate")
    assert any("from no version" in note for note in run_again(material, settings)[1])
    assert registry.alias_version("kept", "candidate") == "1"


def test_a_database_replaced_by_another_one_is_noticed(material: Path, settings: Settings, tmp_path: Path) -> None:
    empty = Path(make_database(tmp_path / "empty").removeprefix("sqlite:///"))
    database = settings.home / "mlflow.db"
    times = database.stat()
    shutil.copyfile(empty, database)  # as a file put in its place is, for a process that opens it anew
    os.utime(database, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = in_a_process(material, settings, "from orchestrator.cli import main; main()")
    assert done.returncode == 0, done.stderr
    assert cached(json.loads(done.stdout)) == [True, False]
    assert "version 1 of kept is no longer in the model registry" in " ".join(done.stderr.split())
    assert recalled(settings) == ("1", "1")


@pytest.mark.parametrize("damage", ["a file is gone", "COMPLETE is gone", "all is gone"])
def test_a_damaged_release_is_mended(material: Path, settings: Settings, damage: str) -> None:
    [release] = (settings.home / "releases" / "kept").iterdir()
    if damage == "all is gone":
        shutil.rmtree(release)
    else:
        (release / ("config.json" if damage == "a file is gone" else "COMPLETE")).unlink()
    document, notes = run_again(material, settings)
    assert cached(document) == [True, False]
    assert any("the release is no longer at" in note for note in notes)
    assert (release / "config.json").is_file() and (release / "COMPLETE").is_file()
    assert document["release"]["model_version"] == "1"


def test_a_damaged_artifact_of_the_registration_is_made_again(material: Path, settings: Settings) -> None:
    document, _ = run_again(material, settings)
    assert cached(document) == [True, True]
    published = Path(document["steps"][1]["artifact"]["path"]) / "published.json"
    published.write_text(published.read_text(encoding="utf-8").replace('"1"', '"2"'), encoding="utf-8")
    document, notes = run_again(material, settings)
    assert cached(document) == [True, False]
    assert any("is damaged" in note for note in notes)
