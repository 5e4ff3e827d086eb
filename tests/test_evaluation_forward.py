"""What the evaluators share: windows that the model has positions for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import Checkpoint, StepError
from orchestrator_evaluation.fidelity import Fidelity
from orchestrator_evaluation.perplexity import Perplexity
from tests.tiny import edit_config, make_model


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "held-out.txt"
    path.write_text("".join(f"seven wizards judge {number}\n" for number in range(200)))
    return str(path)


@pytest.mark.parametrize("method", [Perplexity, Fidelity])
def test_windows_longer_than_the_positions_of_the_model_are_refused(tmp_path: Path, source: str, method: Any) -> None:
    baseline = Checkpoint(make_model(tmp_path / "model", layers=1))  # 128 positions
    assert method(source=source, length_tokens=128, windows=2).tokens_NT(baseline).shape == (2, 128)
    with pytest.raises(StepError, match="windows of 129 tokens are longer than the 128 positions") as caught:
        method(source=source, length_tokens=129, windows=2).tokens_NT(baseline)
    assert caught.value.problems[0].remedy == "set length_tokens to at most 128"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": None},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
    ids=["unsaid", "yarn", "linear"],
)
def test_a_model_that_does_not_say_how_far_it_reaches_takes_any_window(
    tmp_path: Path, source: str, changes: dict[str, Any]
) -> None:
    folder = make_model(tmp_path / "model", layers=1)
    edit_config(folder, **changes)
    assert Perplexity(source=source, length_tokens=256, windows=2).tokens_NT(Checkpoint(folder)).shape == (2, 256)
