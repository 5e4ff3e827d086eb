"""What the model registry said, believed for as long as its database is byte for byte the same.

Asking MLflow takes two seconds, nearly all of them spent on importing it. A run that finds everything cached asks only
whether a version is still there and what an alias points at, and a local database that has not changed by one byte
since MLflow was asked would be asked in vain. So the whole database is read and hashed, as artifacts are, in a
millisecond a megabyte. No clock and no time of change is trusted; any change at all, of whatever table, means that
MLflow is asked again. Answers of a tracking server, or of a database that is no local file, are not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from orchestrator.canonical import canonical_json, write_atomically
from orchestrator.errors import OrchestratorError
from orchestrator.tracking import sqlite_path

MAX_DATABASE_BYTES = 256 << 20  # it is hashed in memory; beyond that, asking MLflow is no worse
LOCK_SECONDS = 1.0


class RegistryMemory:
    """Answers of the registry at `uri`, kept below `home`; with no home nothing is kept."""

    def __init__(self, uri: str, home: Path | None) -> None:
        self._uri = uri
        self._path = home / "registry-answers.json" if home and uri.startswith("sqlite") else None

    @property
    def keeps(self) -> bool:
        """Whether answers of this registry are kept at all."""
        return self._path is not None

    def recall(self, question: str) -> str | None:
        """Return the answer that still holds; None if there is none, and MLflow must be asked."""
        state, answers = self._kept()
        if question not in answers or state != self._state():
            return None
        return answers[question]

    def learn(self, question: str, ask: Callable[[], str | None]) -> str | None:
        """Ask, and keep the answer if the database was the same before and after. "There is none" is not kept.

        MLflow should have opened the database already: its first opening may write there.
        """
        before = self._state()
        answer = ask()
        if answer is not None and before is not None and self._state() == before:
            self._keep(before, question, answer)
        return answer

    def _state(self) -> str | None:
        """sha256 of the database as its readers see it; None if that cannot be told.

        It is read by sqlite in one transaction, not as a file: so a log of changes beside it counts, a write at the
        same time is waited for, and closing it does not drop the locks that MLflow holds in this process.
        """
        if self._path is None:
            return None
        # Which of MLflow's workspaces is meant decides about the answers too.
        seen = hashlib.sha256(canonical_json(sorted(item for item in os.environ.items() if "WORKSPACE" in item[0])))
        try:
            path = sqlite_path(self._uri)
            if path.stat().st_size > MAX_DATABASE_BYTES:
                return None
            address = f"{path.as_uri()}?mode=ro"
            with closing(sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as database:
                database.execute("BEGIN")
                database.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the transaction begins here
                seen.update(database.serialize())
        except (OSError, sqlite3.Error, OrchestratorError, AttributeError):  # the last: sqlite built without serialize
            return None
        return seen.hexdigest()

    def _kept(self) -> tuple[str | None, dict[str, str]]:
        """The state of the database that answers are kept for, and these."""
        if self._path is None:
            return None, {}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            answers = {str(question): str(answer) for question, answer in kept["answers"].items()}
            return str(kept["database"]), answers
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, {}

    def _keep(self, state: str, question: str, answer: str) -> None:
        known_state, answers = self._kept()
        if known_state != state:
            answers = {}
        if self._path is None or answers.get(question) == answer:
            return
        try:
            write_atomically(self._path, canonical_json({"database": state, "answers": {**answers, question: answer}}))
        except OSError:  # costs the next run time, nothing else
            return
