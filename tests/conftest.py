"""Fixtures for all tests."""

from __future__ import annotations

import os

# One thread, here and in the processes that tests start: two that share two cores with other work wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from orchestrator.tracking import Tracker
from tests.s3_server import s3_bucket, s3_endpoint

__all__ = ["s3_bucket", "s3_endpoint", "tracking_uri"]


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow database; one for the session, because making its schema takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    Tracker(uri, "orchestrator").check()
    return uri


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; torch is asked only if such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
