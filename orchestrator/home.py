"""Where things are: the home folder and the addresses that the environment gives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from orchestrator.errors import PreflightError

HOME_VARIABLE = "ORCHESTRATOR_HOME"
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Settings:
    """home: root of the artifact store. tracking_uri: of MLflow; may hold a password, so never show it."""

    home: Path
    tracking_uri: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """`ORCHESTRATOR_HOME` (default ``.orchestrator`` in the working folder) and `MLFLOW_TRACKING_URI` (default
        a sqlite database in the home)."""
        home = Path(environment.get(HOME_VARIABLE) or ".orchestrator").expanduser().absolute()
        return cls(home, environment.get(TRACKING_VARIABLE) or f"sqlite:///{home / 'mlflow.db'}")

    @property
    def public_tracking_uri(self) -> str:
        """The tracking address without user and password."""
        parts = urlsplit(self.tracking_uri)
        if "@" not in parts.netloc:
            return self.tracking_uri
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def make_home(self) -> None:
        """Create the home folder. Raises `PreflightError` if that cannot be done."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PreflightError(
                f"the home folder {self.home} cannot be made: {error.strerror}", remedy=f"set {HOME_VARIABLE}"
            ) from None
        if not os.access(self.home, os.W_OK):
            raise PreflightError(f"the home folder {self.home} is not writable", remedy=f"set {HOME_VARIABLE}")
