"""Tasks through lm-eval with local files: against likelihoods computed by hand; what is refused; without a network."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.api import Checkpoint, Context, SpecError, StepError
from orchestrator.plan import make_plan
from orchestrator.plugins import Methods, discover
from orchestrator.quickstart import prepare
from orchestrator_evaluation.task_files import read_tasks
from orchestrator_evaluation.tasks import Tasks
from tests.tiny import make_model

EXAMPLE = Path(__file__).parents[1] / "flows" / "specs" / "tasks" / "cloze"
TASK: dict[str, Any] = yaml.safe_load((EXAMPLE / "cloze.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(prepare(tmp_path_factory.mktemp("quickstart")).parent / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, quickstart: Checkpoint) -> Checkpoint:
    """The quickstart's model with noise in its weights: another model with the same tokens."""
    folder = tmp_path_factory.mktemp("noisy")
    model = AutoModelForCausalLM.from_pretrained(quickstart.path)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += parameter.std() * 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(quickstart.path).save_pretrained(folder)
    return Checkpoint(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty-four of the example's questions."""
    target = tmp_path / "cloze"
    target.mkdir()
    lines = (EXAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (target / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / "cloze.yaml").write_text((EXAMPLE / "cloze.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return target


def rewrite(folder: Path, **changes: Any) -> None:
    (folder / "cloze.yaml").write_text(yaml.safe_dump({**TASK, **changes}), encoding="utf-8")


def chosen(checkpoint: Checkpoint, questions: list[dict[str, Any]]) -> list[int]:
    """The likeliest choice of each question, its tokens scored one question and choice at a time."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    picked = []
    for question in questions:
        scores = []
        before = tokenizer(question["context"], add_special_tokens=False)["input_ids"]
        for choice in question["choices"]:
            # As lm-eval: the choice is what the tokens of both have more than those of the context.
            whole = tokenizer(f"{question['context']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p_TV = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(before), len(whole))
            scores.append(sum(float(log_p_TV[place - 1, whole[place]]) for place in places))
        picked.append(int(np.argmax(scores)))
    return picked


def test_answers_are_the_likeliest_choices_and_flips_are_where_they_differ(
    quickstart: Checkpoint, tiny: Checkpoint, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")

    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    method = Tasks(task_files={"cloze": str(folder)}, length_tokens=128, batch=5)
    method.preflight()
    (tmp_path / "scratch").mkdir()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    measured = method.measure(tiny, quickstart, Context(0, quickstart, None, tmp_path / "scratch"))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])

    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    gold = [question["answer"] for question in questions]
    before, after = (chosen(checkpoint, questions) for checkpoint in (quickstart, tiny))
    (samples,) = measured.samples
    assert samples.columns["dense_right"] == [float(one == right) for one, right in zip(before, gold, strict=True)]
    assert samples.columns["right"] == [float(one == right) for one, right in zip(after, gold, strict=True)]
    assert samples.columns["flips"] == [float(one != other) for one, other in zip(before, after, strict=True)]
    assert 0 < sum(samples.columns["flips"]) < 24
    assert set(measured.metrics) == set(method.declared())
    assert measured.metrics["questions.cloze"] == 24
    right = sum(one == answer for one, answer in zip(before, gold, strict=True))
    assert measured.metrics["dense_accuracy.cloze"] == pytest.approx(right / 24)
    assert samples.faults(measured.metrics) == []
    lost, won = measured.metrics["lost.cloze"], measured.metrics["won.cloze"]
    assert measured.metrics["accuracy.cloze"] - right / 24 == pytest.approx(won - lost)


def test_a_template_cannot_run_code(quickstart: Checkpoint, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rewrite(folder, doc_to_text="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    method = Tasks(task_files={"cloze": str(folder)}, length_tokens=128, questions=2)
    with pytest.raises(StepError, match=r"cannot ask the task cloze: SecurityError"):
        method.measure(quickstart, quickstart, Context(0, quickstart, None, tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_path": "allenai/ai2_arc"}, "dataset_path is 'allenai/ai2_arc'; one of json, csv, parquet, text"),
        ({"output_type": "loglikelihood_rolling"}, "output_type is 'loglikelihood_rolling'"),
        (
            {"dataset_kwargs": {"data_files": {"test": "../other.jsonl"}}},
            "no data file ../other.jsonl inside its folder",
        ),
        ({"dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}, "no data file /etc/passwd inside its folder"),
        ({"dataset_kwargs": {"data_files": {"test": "link.jsonl"}}}, "no data file link.jsonl inside its folder"),
        ({"dataset_kwargs": {"data_files": "https://example.org/a.jsonl"}}, "does not hold data_files alone"),
        ({"dataset_kwargs": {"trust_remote_code": True, "data_files": {}}}, "does not hold data_files alone"),
        ({"custom_dataset": "build"}, "custom_dataset is not read here"),
        ({"unsafe_code": True}, "unsafe_code is not read here"),
        (
            {"metric_list": [{"metric": "bleu"}]},
            "metric_list does not hold one metric; one of acc, acc_norm, exact_match",
        ),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "metric_list holds more than a metric"),
        ({"task": 3}, "it names no `task`"),
    ],
)
def test_task_files_that_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    (folder.parent / "other.jsonl").write_text("{}\n", encoding="utf-8")
    (folder / "link.jsonl").symlink_to(folder.parent / "other.jsonl")
    rewrite(folder, **changes)
    with pytest.raises(SpecError) as caught:
        read_tasks("cloze", folder)
    assert said in str(caught.value)


def test_functions_in_a_task_file_are_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    (folder / "cloze.yaml").write_text("task: x\ndoc_to_text: !function evil.run\n", encoding="utf-8")
    with pytest.raises(SpecError, match="code beside a task file is not run"):
        read_tasks("cloze", folder)
    (folder / "cloze.yaml").write_text("task: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(SpecError, match="is no task file"):
        read_tasks("cloze", folder)


SPEC = """\
version: 1
name: asked
model: {id: model}
steps:
  - quantize: rtn
    with: {group_size: 32}
  - validate: tasks
    with: {task_files: {cloze: cloze}}
    require: {accuracy.cloze: {retain: 0.9, confidence: 0.9}}
    must_not_fall: ["accuracy.*"]
"""


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.fixture
def plan(tmp_path: Path, folder: Path, methods: Methods) -> Callable[[str], Any]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    make_model(tmp_path / "model", layers=1)

    def planned(text: str) -> Any:
        (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
        return make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home")

    return planned


def test_every_file_of_a_folder_is_in_the_fingerprint(plan: Callable[[str], Any], folder: Path) -> None:
    first = plan(SPEC).steps[1]
    assert first.must_not_fall == ("accuracy.cloze",)
    with (folder / "questions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"context": "one", "choices": ["a", "b"], "answer": 0}\n')
    assert plan(SPEC).steps[1].fingerprint != first.fingerprint


def test_folders_that_hold_no_task(plan: Callable[[str], Any], folder: Path) -> None:
    for path, said in (
        ("nowhere", ":8: steps[1].with.task_files.cloze: there is no folder"),
        ("model", "holds no task file; put lm-eval's *.yaml files in it"),
        ("spec.yaml", "there is no folder"),
    ):
        with pytest.raises(Exception, match="task") as caught:
            plan(SPEC.replace("cloze: cloze}", f"cloze: {path}}}"))
        assert said in str(caught.value)
    (folder / "again.yaml").write_text((folder / "cloze.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SpecError, match=r"two files of .* name the same task"):
        plan(SPEC)
