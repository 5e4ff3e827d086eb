"""The calibrator `text`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from orchestrator.api import CalibrationSet, PreflightError, check_source
from orchestrator.errors import StepError
from orchestrator_calibration import register_methods
from orchestrator_calibration.text import Text
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"seven wizards judge {number}\n" for number in range(500)))
    return str(path)


def test_the_family_registers_text() -> None:
    assert register_methods() == [Text]


def test_the_sampled_set_survives_saving_byte_by_byte(tmp_path: Path, tokenizer: Any, source: str) -> None:
    method = Text(source=source, sequences=8, length_tokens=32)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        method.sample(tokenizer, seed=3).save(folder)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    loaded = CalibrationSet.load(folders[0])
    assert torch.equal(loaded.tokens_NT, method.sample(tokenizer, seed=3).tokens_NT)
    assert loaded.tokens_NT.shape == (8, 32)


def test_a_certain_shortfall_is_found_without_a_tokenizer(source: str) -> None:
    size = Path(source).stat().st_size
    Text(source=source, sequences=1, length_tokens=size).preflight()
    with pytest.raises(PreflightError, match=f"holds {size} bytes, too few for the {size + 1} tokens") as caught:
        Text(source=source, sequences=1, length_tokens=size + 1).preflight()
    assert caught.value.problems[0].remedy


def test_a_shortfall_that_only_the_tokenizer_shows_is_a_step_error(tokenizer: Any, source: str) -> None:
    method = Text(source=source, sequences=1, length_tokens=Path(source).stat().st_size)
    method.preflight()
    with pytest.raises(StepError, match=r"holds \d+ tokens, but 1 windows need"):
        method.sample(tokenizer, seed=0)


@pytest.mark.parametrize("wrong", [{"sequences": 0}, {"length_tokens": 1}, {"source": ""}, {"field": ""}, {"n": 1}])
def test_parameters_out_of_bounds_are_refused(wrong: dict[str, Any], source: str) -> None:
    with pytest.raises(ValidationError):
        Text(**{"source": source, **wrong})


def test_windows_longer_than_the_model_takes_are_refused(tmp_path: Path, source: str) -> None:
    make_tokenizer(tmp_path)
    limited = AutoTokenizer.from_pretrained(tmp_path, model_max_length=64)
    assert Text(source=source, sequences=2, length_tokens=64).sample(limited, seed=0).tokens_NT.shape == (2, 64)
    with pytest.raises(StepError, match="windows of 65 tokens are longer than the 64 tokens") as caught:
        Text(source=source, sequences=2, length_tokens=65).sample(limited, seed=0)
    assert caught.value.problems[0].remedy == "set length_tokens to at most 64"


def test_a_tokenizer_without_a_limit_allows_any_length(tokenizer: Any, source: str) -> None:
    assert Text(source=source, sequences=1, length_tokens=2048).sample(tokenizer, seed=0).tokens_NT.shape == (1, 2048)


def test_a_path_that_no_file_can_have_does_not_stop_the_preflight(tmp_path: Path) -> None:
    method = Text(source=str(tmp_path / ("x" * 5000)), sequences=1, length_tokens=2)
    method.preflight()  # must not raise: the plan itself refuses the source, with its place
    with pytest.raises(PreflightError):
        check_source(method.source)
