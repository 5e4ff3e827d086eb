"""Where things are: the home folder and the addresses that the environment gives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.addresses import without_password
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
        return without_password(self.tracking_uri)

    def make_home(self) -> None:
        """Create the home folder. Raises `PreflightError` if that cannot be done."""
        check_home(self.home)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.home, f"cannot be made: {error.strerror}") from None


def check_home(home: Path) -> None:
    """Raise `PreflightError` if nothing can be written to the home folder, or to where it would be made."""
    place = home.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise _unusable(home, f"cannot be made: {place} is a file")
    if not os.access(place, os.W_OK) or shutil.disk_usage(place).total == 0:  # /proc and its like hold no files
        raise _unusable(home, "is not writable" if place == home else f"cannot be made: {place} is not writable")


def _unusable(home: Path, why: str) -> PreflightError:
    return PreflightError(f"the home folder {home} {why}", remedy=f"set {HOME_VARIABLE} to a folder of your own")
