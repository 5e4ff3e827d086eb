"""The example specifications: each is valid, and every method and parameter in it exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.method import Stage
from orchestrator.plugins import Methods, discover
from orchestrator.spec import load_spec, validate_strictly

SPECS = sorted((Path(__file__).parents[1] / "flows" / "specs").glob("*.yaml"))


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_an_example_is_valid(path: Path, methods: Methods) -> None:
    spec = load_spec(path).spec
    for step in spec.steps:
        method = validate_strictly(methods.find(step.stage, step.method).cls, step.with_)
        assert set(step.require) <= set(getattr(method, "metrics", ()))
        for engine in step.engines:
            for name, values in engine.items():
                validate_strictly(methods.find(Stage.REGISTER, name).cls, values or {})


def test_there_are_examples() -> None:
    assert len(SPECS) >= 2
