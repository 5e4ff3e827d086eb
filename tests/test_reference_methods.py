"""The benchmark of conformance: what the command line compresses is what the plain references do.

On two blocks of the quickstart's model, which is trained, in float32: fewer roundings that fall one way in float32's
arithmetic and another in float64's, and less that follows from them, than in the whole model in bfloat16.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.closeness import Closeness, Evaluator
from benchmarks.conformance import CASES, Case, Row, compare_one, fitting, methods
from benchmarks.conformance_models import Material
from benchmarks.order import found
from benchmarks.ours import Calibration
from benchmarks.reference.model import load
from orchestrator.api import token_windows
from tests.tiny import make_model

LIMIT = 0.05  # of KL: a rounding or two that fall otherwise in float32 than in float64
SEQUENCES, LENGTH = 8, 64


class Bench:
    """A tiny model, its windows, and a home in which ours are found again."""

    def __init__(self, folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text(inspect.getsource(argparse), encoding="utf-8")
        with as_file(files("orchestrator.quickstart") / "model") as packaged:
            model = Path(shutil.copytree(packaged, folder / "model"))
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, num_hidden_layers=2)
        dense.save_pretrained(model)
        windows = token_windows(
            str(text), AutoTokenizer.from_pretrained(model), num_sequences=SEQUENCES, length=LENGTH, random=True
        )
        self.tokens_NT = windows.tokens_NT
        path = folder / "windows.safetensors"
        save_file({"tokens_NT": self.tokens_NT}, path)
        self.material = Material(model, Calibration(text, SEQUENCES, LENGTH), path, path, SEQUENCES)
        self.evaluator = Evaluator(load(model), self.tokens_NT)
        self.folder = folder

    def row(self, name: str, case: Case, installed: set[str] | None = None) -> Row:
        """Compare one case."""
        names = {case.method} if installed is None else installed
        return compare_one(
            name, case, self.material, self.tokens_NT, self.evaluator, self.folder, self.folder / "home", names
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("conformance"))


def off(reference: Closeness | None, ours: Closeness | None) -> float:
    """How far KL is from that of the reference, as a share."""
    assert reference is not None and ours is not None
    return abs(ours.kl / reference.kl - 1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rtn W3 g64", {"num_bits": 3, "symmetric": False}),
        ("gptq W3 g128 asym", {"num_bits": 3, "symmetric": True}),
        ("awq W3 g128 asym", {"num_bits": 4, "symmetric": False}),
        ("sparsegpt 2:4", {}),
    ],
)
def test_the_command_line_gives_what_the_reference_gives(bench: Bench, name: str, wrong: Mapping[str, Any]) -> None:
    case = CASES[name]
    row = bench.row(name, case)
    assert row.failed is None
    assert off(row.reference, row.ours) < LIMIT
    # A reference of something else is told apart.
    other = bench.row(name, replace(case, options=wrong), installed=set())
    assert off(other.reference, row.ours) > 2 * LIMIT


def test_all_methods_of_the_table_are_installed_and_a_missing_one_is_said(bench: Bench) -> None:
    assert {case.method for case in CASES.values()} <= methods()
    row = bench.row("rtn W3 g64", CASES["rtn W3 g64"], installed=set())
    assert (row.ours, row.failed) == (None, "not installed")
    assert row.reference is not None and row.reference.kl > 0


def test_groups_that_do_not_fill_a_layer_leave_it_dense_on_both_sides(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "model", intermediate_size=96, tokenizer=False))
    assert fitting(CASES["rtn W3 g64"], model) == (64, ("down_proj",))
    assert fitting(CASES["rtn W3 g128"], model) == (None, ())


def test_an_order_that_is_not_the_literatures_is_said() -> None:
    def row(name: str, loss: float) -> Row:
        return Row(name, 64, (), None, Closeness(loss, loss))

    rows = {name: row(name, loss) for name, loss in (("rtn W3 g64", 2.0), ("gptq W3 g64", 1.0), ("awq W3 g64", 3.0))}
    verdicts = {line.better: line.verdict for line in found(rows)}
    assert verdicts == {"gptq W3 g64": "as the literature", "awq W3 g64": "NOT"}
    rows = {f"llm_pruner random {seed}": row(f"llm_pruner random {seed}", seed) for seed in (1.0, 2.0, 3.0)}
    (line,) = found({**rows, "llm_pruner first element": row("llm_pruner first element", 2.5)})
    assert (line.kl, line.verdict) == ((2.0, 2.5), "NOT")
