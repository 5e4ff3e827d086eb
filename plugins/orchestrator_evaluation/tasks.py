"""Questions with right answers, asked through lm-eval's harness with task files that lie on disk.

A tier is a folder with task files (YAML as lm-eval reads it, one task a file) and the data that they name; all of it
enters the step's fingerprint. Nothing is fetched and no code from the folder is run: data are files inside the folder,
templates are rendered in a sandbox, and ``!function`` is refused. (https://github.com/EleutherAI/lm-evaluation-harness)
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.api import (
    Checkpoint,
    Context,
    Evaluator,
    Measured,
    ModelFacts,
    PreflightError,
    Quotient,
    Samples,
    Stage,
    StepError,
    TierFolders,
    Work,
)
from orchestrator_evaluation.forward import load_float32
from orchestrator_evaluation.task_files import TaskFile, read_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MEASURED = {
    "accuracy": "share of questions that the compressed model answers right, 0 to 1",
    "dense_accuracy": "the same of the dense model",
    "accuracy_ratio": "accuracy / dense_accuracy: what is retained",
    "flips": "share of questions that the two models answer differently, right or wrong, 0 to 1",
    "lost": "share of questions that only the dense model answers right, 0 to 1",
    "won": "share of questions that only the compressed model answers right, 0 to 1",
    "questions": "number of questions",
}


@dataclass(frozen=True)
class Answer:
    """What a model answered to one question, and whether that was right."""

    said: Any
    right: float


class Tasks(Evaluator):
    """Accuracy on tasks for lm-eval with local files, and the questions that compression made to be answered otherwise.

    A tier's accuracy is that over all questions of its tasks. Questions are the units of intervals.
    """

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "tasks"
    paper: ClassVar = "Flips: Dutta et al. 2024, arXiv:2407.09141; harness: Biderman et al. 2024, arXiv:2405.14782."
    metrics: ClassVar[Mapping[str, str]] = _MEASURED
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        "accuracy": "higher",
        "flips": "lower",
        "lost": "lower",
        "won": "higher",
    }
    sampled: ClassVar[frozenset[str]] = frozenset(_MEASURED) - {"questions"}
    right_or_wrong: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    task_files: TierFolders = Field(
        min_length=1,
        max_length=100,
        description="By the name of the tier, a folder with lm-eval's YAML task files and the data that they name.",
    )
    questions: int | None = Field(
        None, ge=1, description="Questions of each task, from the start of its data. Default: all."
    )
    batch: int = Field(8, ge=1, le=4096, description="Requests per forward pass.")
    length_tokens: int | None = Field(
        None, ge=8, le=1_048_576, description="Longest request, tokens. Default: the model's positions, at most 2048."
    )

    def declared(self) -> Mapping[str, str]:
        """The metrics of every tier."""
        return {
            f"{name}.{tier}": f"{what}; tier {tier}"
            for tier in sorted(self.task_files)
            for name, what in _MEASURED.items()
        }

    def preflight(self) -> None:
        """Read every task file. Raises `SpecError` for one that cannot be used, `PreflightError` without lm-eval."""
        for tier, folder in sorted(self.task_files.items()):
            read_tasks(tier, Path(folder))
        if find_spec("lm_eval") is None:
            raise PreflightError(
                "asking questions needs the package `lm-eval`, which is not installed",
                remedy="run `pip install 'compression-orchestrator[eval]'`",
            )

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """One model after the other; about as many tokens as a quarter of the files' bytes, twice for the choices."""
        files = (path for folder in self.task_files.values() for path in Path(folder).rglob("*"))
        tokens = max(256, sum(path.stat().st_size for path in files if path.is_file()) // 2)
        whole = Work()
        for facts in (dense, model):
            held = facts.widened_bytes + 12 * 256 * self.batch * facts.vocabulary
            passed = facts.forward(tokens, 128, 128 * self.batch, head=True)
            memory = max(facts.load_bytes(as_float32=True), held)
            whole = whole.then(replace(passed, memory_bytes=memory, moved_bytes=passed.moved_bytes + 3 * held))
        return whole

    def most_units(self) -> int | None:
        """Questions of the tier with the most tasks, if their number is given."""
        if self.questions is None:
            return None
        return self.questions * max(len(read_tasks(tier, Path(at))) for tier, at in self.task_files.items())

    def expected_units(self) -> int:
        """As many questions as the data files have lines, about."""
        return sum(
            path.stat().st_size // 200
            for folder in self.task_files.values()
            for path in Path(folder).rglob("*")
            if path.is_file()
        )

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        """Ask both models the same questions. Raises `StepError` for tasks that lm-eval cannot ask."""
        tiers = {tier: read_tasks(tier, Path(folder)) for tier, folder in sorted(self.task_files.items())}
        tokenizer = baseline.load_tokenizer()
        length = self.length_tokens or min(baseline.positions or 2048, 2048)
        answers: list[dict[str, list[Answer]]] = []
        for half, (what, checkpoint) in enumerate((("dense", baseline), ("compressed", candidate))):
            model = load_float32(checkpoint)
            found: dict[str, list[Answer]] = {}
            for index, (tier, tasks) in enumerate(tiers.items()):
                context.progress((half + index / len(tiers)) / 2, f"{what}: {tier}")
                found[tier] = self._ask(model, tokenizer, tasks, length, context)
            del model
            answers.append(found)
        metrics: dict[str, float] = {}
        samples = []
        for tier in tiers:
            part = _samples(tier, answers[0][tier], answers[1][tier])
            metrics |= {name: part.value(name) for name in part.quotients}
            metrics[f"questions.{tier}"] = float(part.units)
            samples.append(part)
        return Measured(metrics, samples=samples)

    def _ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[TaskFile],
        length: int,
        context: Context,
    ) -> list[Answer]:
        """Return the answers to all questions of a tier, in the order of its files."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        with _quiet():
            asked = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                device=str(model.device),
                batch_size=self.batch,
                max_length=length,
                trust_remote_code=False,
            )
        cache = str(context.scratch / "datasets")
        answers: list[Answer] = []
        for task in tasks:
            config = dict(task.config)
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "cache_dir": cache}
            try:
                with _untouched_generators(), _sandboxed_templates(), _quiet():
                    result: Any = simple_evaluate(
                        model=asked,
                        tasks=[config],
                        task_manager=TaskManager(include_defaults=False),
                        limit=self.questions,
                        bootstrap_iters=0,
                        log_samples=True,
                    )
            except Exception as error:  # whatever a template, the data or the harness raises
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise StepError(
                    f"lm-eval cannot ask the task {config['task']}: {reason}",
                    remedy="correct the task file or its data",
                ) from error
            answers += _answers(result["samples"][config["task"]], task)
        return answers


def _answers(logged: Sequence[Mapping[str, Any]], task: TaskFile) -> list[Answer]:
    """What lm-eval logged of each question, in their order; the first filter's, where there are several."""
    if not logged:
        raise StepError(f"the task {task.config['task']} holds no question", remedy="look at its data and its split")
    first = logged[0].get("filter")
    kept = sorted((sample for sample in logged if sample.get("filter") == first), key=lambda sample: sample["doc_id"])
    return [Answer(_said(sample, task.config["output_type"]), float(sample[task.grade])) for sample in kept]


def _said(sample: Mapping[str, Any], output: str) -> Any:
    """The answer itself: the likeliest choice, whether the continuation is the greedy one, or the text."""
    responses = sample["filtered_resps"]
    if output == "multiple_choice":
        scores = [float(score) for score, _ in responses]
        return scores.index(max(scores))
    if output == "loglikelihood":
        return bool(responses[0][1] if isinstance(responses[0], list | tuple) else responses[1])
    return responses[0]


def _samples(tier: str, dense: Sequence[Answer], compressed: Sequence[Answer]) -> Samples:
    pairs = list(zip(dense, compressed, strict=True))
    before, after = [one.right for one in dense], [one.right for one in compressed]
    if not any(before):
        raise StepError(
            f"the dense model answers no question of {tier} right, so nothing can be retained",
            remedy="ask what the dense model can answer",
        )
    columns = {
        "right": after,
        "dense_right": before,
        "flips": [float(one.said != other.said) for one, other in pairs],
        "lost": [float(one.right > other.right) for one, other in pairs],
        "won": [float(one.right < other.right) for one, other in pairs],
        "questions": [1.0] * len(pairs),
    }
    quotients = {f"{name}.{tier}": Quotient(name, "questions") for name in ("flips", "lost", "won")}
    quotients |= {
        f"accuracy.{tier}": Quotient("right", "questions"),
        f"dense_accuracy.{tier}": Quotient("dense_right", "questions"),
        f"accuracy_ratio.{tier}": Quotient("right", "dense_right"),
    }
    return Samples("question", columns, quotients)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's bars and remarks; what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _untouched_generators() -> Iterator[None]:
    """lm-eval seeds the generators of the whole process; leave them as they were."""
    import numpy as np
    import torch

    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextlib.contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Render templates so that they reach data and nothing else. lm-eval's own environment would let them run code."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    sandbox = ImmutableSandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = utils.regex_replace
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = plain
