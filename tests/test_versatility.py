"""Several held-out texts, intervals, and the gates that rest on them: planned, measured, refused and left as evidence.

Shape legend: N = windows, T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.api import CalibrationSet, Checkpoint, Context, Measured, Quotient, Samples, StepError
from orchestrator.errors import GateError, OrchestratorError, SpecError
from orchestrator.gate_checks import unnoticed
from orchestrator.gates import gate_results, read_intervals, read_samples
from orchestrator.home import Settings
from orchestrator.journal import Journal
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import Methods, discover
from orchestrator.registry import ModelRegistry
from orchestrator.run import run_locally
from orchestrator_evaluation.fidelity import Fidelity
from orchestrator_evaluation.overlap import RUN_TOKENS, overlap
from orchestrator_evaluation.perplexity import Perplexity
from orchestrator_evaluation.tasks import Tasks
from tests.test_run import Watcher
from tests.tiny import make_model

LENGTH = 24
SPEC = """\
version: 1
name: versatile
model: {id: model}
steps:
  - calibrate: text
    with: {source: train.txt, sequences: 8, length_tokens: 24}
  - prune: magnitude
    with: {sparsity: 0.5}
  - validate: perplexity
    with: {sources: {code: code.txt, prose: prose.txt}, length_tokens: 24, windows: 12}
  - register: release
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 32}}]
"""


def write_texts(folder: Path) -> None:
    """Three texts without a sentence in common."""
    generator = np.random.default_rng(0)

    def text(words: str) -> str:
        return " ".join(generator.choice(words.split(), 4000))

    (folder / "train.txt").write_text(text("the quick brown fox reads a book of words"), encoding="utf-8")
    (folder / "code.txt").write_text(text("seven wizards judge return for while import"), encoding="utf-8")
    (folder / "prose.txt").write_text(text("some pens write down what a lazy dog says"), encoding="utf-8")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versatile")
    make_model(folder / "model", layers=2)
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.fixture(scope="module")
def dense(material: Path) -> Checkpoint:
    return Checkpoint(material / "model")


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory, dense: Checkpoint) -> Checkpoint:
    """The dense model with the smaller half of its block weights set to zero."""
    folder = tmp_path_factory.mktemp("candidate")
    shutil.copytree(dense.path, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = torch.where(weight.abs() > weight.abs().float().median(), weight, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


@pytest.fixture
def context(dense: Checkpoint, tmp_path: Path) -> Context:
    return Context(seed=0, dense=dense, calibration=None, scratch=tmp_path)


@pytest.fixture
def sources(material: Path) -> dict[str, str]:
    return {name: str(material / f"{name}.txt") for name in ("code", "prose")}


@pytest.fixture
def plan(material: Path, methods: Methods, tmp_path: Path) -> Callable[[str], Plan]:
    def planned(text: str) -> Plan:
        path = material / f"{tmp_path.name}.yaml"
        path.write_text(text, encoding="utf-8")
        return make_plan(path, methods, tmp_path / "home")

    return planned


def gated(require: str, step: str = "windows: 12}\n") -> str:
    """The specification with lines after its validate step."""
    return SPEC.replace(step, step + f"    {require}\n", 1)


def refused(plan: Callable[[str], Plan], text: str) -> str:
    with pytest.raises(OrchestratorError) as caught:
        plan(text)
    assert isinstance(caught.value, SpecError)
    return str(caught.value)


def log_probabilities(checkpoint: Checkpoint, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve windows [N, T] of a text, cut by hand, and ln p [N, T, V] computed from end to end in float64."""
    ids = AutoTokenizer.from_pretrained(checkpoint.path)(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    tokens_NT = torch.tensor(ids[: 12 * LENGTH]).view(12, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    with torch.no_grad():
        return tokens_NT, model(input_ids=tokens_NT).logits.log_softmax(-1)


def test_perplexity_of_several_texts_window_by_window(
    dense: Checkpoint, candidate: Checkpoint, sources: dict[str, str], context: Context
) -> None:
    method = Perplexity(sources=sources, length_tokens=LENGTH, windows=12, batch=5)
    measured = method.measure(candidate, dense, context)
    assert set(measured.metrics) == set(method.declared())
    assert len(measured.samples) == 2
    for samples, tier in zip(measured.samples, ("code", "prose"), strict=True):
        nats = []
        for checkpoint in (candidate, dense):
            tokens_NT, log_p_NTV = log_probabilities(checkpoint, sources[tier])
            nats.append(-log_p_NTV[:, :-1].gather(-1, tokens_NT[:, 1:, None])[..., 0].sum(1))
        assert samples.columns["nats"] == pytest.approx(nats[0].tolist(), rel=1e-4)
        assert samples.columns["dense_nats"] == pytest.approx(nats[1].tolist(), rel=1e-4)
        mean = [float(part.sum()) / (12 * (LENGTH - 1)) for part in nats]
        assert measured.metrics[f"perplexity.{tier}"] == pytest.approx(np.exp(mean[0]), rel=1e-4)
        assert measured.metrics[f"perplexity_ratio.{tier}"] == pytest.approx(np.exp(mean[0] - mean[1]), rel=1e-4)
        assert samples.faults(measured.metrics) == []
    assert measured.metrics["calibration_overlap.code"] == 0.0


def test_fidelity_of_several_texts_window_by_window(
    dense: Checkpoint, candidate: Checkpoint, sources: dict[str, str], context: Context
) -> None:
    method = Fidelity(sources=sources, length_tokens=LENGTH, windows=12, batch=5)
    measured = method.measure(candidate, dense, context)
    assert set(measured.metrics) == set(method.declared())
    samples = measured.samples[1]
    (_, log_p_NTV), (_, log_q_NTV) = (
        log_probabilities(checkpoint, sources["prose"]) for checkpoint in (dense, candidate)
    )
    kl_N = (log_p_NTV.exp() * (log_p_NTV - log_q_NTV)).sum((1, 2))
    assert samples.columns["kl_nats"] == pytest.approx(kl_N.tolist(), rel=1e-3)
    flips_N = (log_p_NTV.argmax(-1) != log_q_NTV.argmax(-1)).sum(1)
    assert sum(samples.columns["flips"]) == pytest.approx(int(flips_N.sum()), abs=2)
    assert measured.metrics["top1_flips.prose"] == pytest.approx(1 - measured.metrics["top1_agreement.prose"])
    low, high = samples.interval("kl_mean.prose", 0.95, seed=0)
    assert low < measured.metrics["kl_mean.prose"] < high


def test_the_share_of_runs_is_that_of_a_count_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(0, 3, (5, 40), generator=generator)
    tokens = torch.randint(0, 3, (6, 30), generator=generator)
    tokens[2, 4:29] = calibration[1, 10:35]

    def runs(tokens_NT: torch.Tensor) -> list[tuple[int, ...]]:
        width = tokens_NT.shape[1] - RUN_TOKENS + 1
        return [tuple(row[start : start + RUN_TOKENS].tolist()) for row in tokens_NT for start in range(width)]

    known = set(runs(calibration))
    expected = sum(run in known for run in runs(tokens)) / len(runs(tokens))
    assert expected > 0.1
    assert overlap(tokens, calibration) == pytest.approx(expected)
    assert overlap(tokens[:, : RUN_TOKENS - 1], calibration) == 0.0


def test_a_text_that_stands_in_the_calibration_set_is_refused(
    dense: Checkpoint, sources: dict[str, str], context: Context
) -> None:
    method = Perplexity(sources=sources, length_tokens=LENGTH, windows=12)
    seen = method.tokens_NT(dense, sources["prose"])
    context = Context(0, dense, CalibrationSet(seen, {}), context.scratch)
    with pytest.raises(StepError, match=r"100\.0% of the runs of 13 tokens in sources\.prose stand in what the model"):
        method.measure(dense, dense, context)
    allowed = method.model_copy(update={"max_overlap": 1.0}).measure(dense, dense, context)
    assert allowed.metrics["calibration_overlap.prose"] == 1.0


def test_a_text_of_calibration_or_training_is_no_held_out_text(plan: Callable[[str], Plan], material: Path) -> None:
    shutil.copy(material / "train.txt", material / "renamed.txt")
    said = refused(plan, SPEC.replace("prose.txt", "renamed.txt"))
    assert ":10: steps[2].with.sources.prose: this is the text of `source` of calibrate text, so it is not held" in said
    training = (
        "  - distill: logits\n    with: {source: code.txt, sequences: 8, length_tokens: 24, updates: 1}\n  - validate"
    )
    said = refused(plan, SPEC.replace("  - validate", training, 1))
    assert "steps[3].with.sources.code: this is the text of `source` of distill logits" in said
    later = SPEC.replace(
        "  - register",
        "  - distill: logits\n    with: {source: code.txt, sequences: 8, length_tokens: 24, updates: 1}\n  - register",
        1,
    )
    assert "sources.code" in refused(plan, later)


def test_one_text_is_held_out_where_bounds_rest_on_it(plan: Callable[[str], Plan], material: Path) -> None:
    one = SPEC.replace("sources: {code: code.txt, prose: prose.txt}", "source: train.txt")
    plan(one)  # a number, on which nothing rests
    bound = "windows: 12}\n    require: {perplexity: {max: 1.0e+9}}\n"
    said = refused(plan, one.replace("windows: 12}\n", bound, 1))
    assert "steps[2].with.source: this is the text of `source` of calibrate text, so it is not held out" in said
    shutil.copy(material / "code.txt", material / "copied.txt")
    said = refused(plan, SPEC.replace("prose.txt", "copied.txt"))
    assert "steps[2].with.sources.prose: this is the text of `sources.code`, under another name" in said


@pytest.mark.parametrize("stage", ["calibrated", "trained"])
def test_bounds_do_not_rest_on_a_text_that_hardly_differs_from_what_was_learned(
    material: Path, methods: Methods, settings: Settings, stage: str
) -> None:
    """One line break more is another file, but not another text."""
    name = {"calibrated": "train", "trained": "code"}[stage]
    (material / f"{stage}.txt").write_text((material / f"{name}.txt").read_text(encoding="utf-8") + "\n")
    text = SPEC.replace("name: versatile", f"name: {stage}").replace("sequences: 8", "sequences: 150")
    text = text.replace("sources: {code: code.txt, prose: prose.txt}", f"source: {stage}.txt")
    if stage == "trained":
        given = "source: code.txt, sequences: 150, length_tokens: 24, updates: 1"
        text = text.replace("  - validate", f"  - distill: logits\n    with: {{{given}}}\n  - validate", 1)
    path = material / f"{stage}.yaml"
    path.write_text(text, encoding="utf-8")
    watcher = Watcher()
    metrics = run_locally(path, methods, settings, watcher).outcomes[2 + (stage == "trained")].metrics
    assert metrics["calibration_overlap"] > 0.12
    bound = "windows: 12}\n    require: {perplexity: {max: 1.0e+9}}\n"
    path.write_text(text.replace("windows: 12}\n", bound, 1), encoding="utf-8")
    with pytest.raises(
        GateError, match=r"require\.calibration_overlap: calibration_overlap is 0\.\d+, at most 0\.1 is"
    ):
        run_locally(path, methods, settings, watcher)
    assert watcher.finished[-1].cached
    (overlapping, bounded) = watcher.finished[-1].gates
    assert (overlapping.passed, bounded.passed) == (False, True)
    path.write_text(text.replace("windows: 12}\n", "max_overlap: 1, " + bound, 1), encoding="utf-8")
    (bounded,) = run_locally(path, methods, settings, watcher).outcomes[2 + (stage == "trained")].gates
    assert bounded.passed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{}", "give source, or sources with a name for each"),
        ("{source: code.txt, sources: {prose: prose.txt}}", "give source, or sources with a name for each"),
        ("{sources: {}}", "at least 1 item"),
        ("{sources: {a.b: code.txt}}", "steps[2].with.sources.a.b"),
        ("{sources: {prose: nowhere.txt}}", "sources.prose: there is no text file"),
        ("{sources: {prose: 3}}", "valid string"),
        ("{sources: [code.txt]}", "input should be an object"),
    ],
)
def test_sources_that_are_none(plan: Callable[[str], Plan], given: str, said: str) -> None:
    text = SPEC.replace("{sources: {code: code.txt, prose: prose.txt}, length_tokens: 24, windows: 12}", given)
    assert text != SPEC
    with pytest.raises(OrchestratorError) as caught:
        plan(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("require", "said"),
    [
        (
            "require: {perplexity_ratio: {max: 2}}",
            "perplexity measures no 'perplexity_ratio'; it measures calibration_",
        ),
        ("require: {perplexity_ratio.cod: {max: 2}}", "require.perplexity_ratio.cod: perplexity measures no"),
        ("require: {'perplexity_rat.*': {max: 2}}", "perplexity measures no 'perplexity_rat.*'"),
        ("require: {perplexity.code: {}}", "give min, max or retain"),
        ("require: {perplexity.code: {retain: 1.5}}", "less than or equal to 1"),
        ("require: {perplexity.code: {retain: 0.9, confidence: 95}}", "less than 1"),
        (
            "require: {perplexity_tokens.code: {retain: 0.9}}",
            "perplexity_tokens.code cannot be compared with the dense",
        ),
        ("require: {perplexity_tokens.code: {min: 9, confidence: 0.9}}", "there is no interval of perplexity_tokens"),
        ("must_not_fall: [perplexity_tokens.code]", "must_not_fall[0]: perplexity_tokens.code cannot be compared"),
        ("must_not_fall: [accuracy]", "perplexity measures no 'accuracy'"),
        ("must_not_fall: perplexity.code", "valid array"),
        ("require: {perplexity.code: {max: .nan}}", "finite number"),
        ("require: {perplexity.code: {min: 9, max: 8}}", "min 9.0 is larger than max 8.0"),
        (
            "require: {'perplexity.*': {min: 9}, perplexity.code: {max: 8}}",
            "together with another bound, perplexity.code has min 9 above max 8",
        ),
        (
            "require: {perplexity.code: {max: 9, confidence: 0.05}}",
            "a confidence of 0.05 cannot be had from 10,000 resamples; give 0.5 to 0.998",
        ),
        ("require: {perplexity.code: {max: 9, confidence: 0.9999999}}", "a confidence of 0.9999999 cannot be had"),
    ],
)
def test_a_gate_that_nothing_can_be_held_against(plan: Callable[[str], Plan], require: str, said: str) -> None:
    assert said in refused(plan, gated(require))


@pytest.mark.parametrize("bound", ["require: {perplexity.code: {max: 9, confidence: 0.9}}", "must_not_fall: ['perp*']"])
def test_an_interval_of_a_window_or_two_is_refused_while_planning(plan: Callable[[str], Plan], bound: str) -> None:
    text = gated(bound.replace("perp*", "perplexity.*")).replace("windows: 12", "windows: 1")
    assert "an interval takes 10 units, and this step measures 1; measure more (`windows`)" in refused(plan, text)
    plan(gated("require: {perplexity.code: {max: 9}}").replace("windows: 12", "windows: 1"))


def test_a_star_is_every_metric_that_it_matches(plan: Callable[[str], Plan]) -> None:
    planned = plan(gated("require: {'perplexity.*': {retain: 0.5}, perplexity.code: {confidence: 0.9, retain: 0.6}}"))
    assert planned.steps[2].require == {
        "perplexity.code": {"retain": 0.6, "confidence": 0.9},
        "perplexity.prose": {"retain": 0.5},
    }
    loosened = plan(gated("require: {perplexity.code: {max: 10, min: 2}, '*': {max: 1.0e+6, min: 0}}"))
    assert loosened.steps[2].require["perplexity.code"] == {"max": 10, "min": 2}
    assert loosened.steps[2].require["perplexity.prose"] == {"max": 1e6, "min": 0}
    mixed = "require: {perplexity_tokens.code: {min: 2}, 'perplexity*': {max: 9.0e+9, confidence: 0.9}}"
    assert "there is no interval of perplexity_tokens.code" in refused(plan, gated(mixed))
    assert plan(gated("must_not_fall: ['perplexity.*']")).steps[2].must_not_fall == (
        "perplexity.code",
        "perplexity.prose",
    )


KL = "  - validate: fidelity\n    with: {source: prose.txt, length_tokens: 24, windows: 4}\n    require: {%s}\n"


def test_a_release_never_rests_on_kl_alone(plan: Callable[[str], Plan]) -> None:
    kl = KL % "kl_mean: {max: 1}, kl_p99: {max: 9}"
    said = refused(plan, SPEC.replace("  - register", kl + "  - register"))
    assert ":14: steps[4].register: register release would rest on kl_mean, kl_p99 alone" in said
    assert "gate on perplexity, accuracy or top1_agreement too" in said
    size = "  - validate: footprint\n    require: {bytes_on_disk_ratio: {max: 1}}\n"
    assert "kl_mean" in refused(
        plan, SPEC.replace("  - register", kl + size + "  - register")
    )  # says nothing of quality
    plan(gated("require: {perplexity_ratio.code: {max: 9}}").replace("  - register", kl + "  - register"))
    plan(SPEC.replace("  - register", KL % "kl_mean: {max: 1}, top1_flips: {max: 0.5}" + "  - register"))
    plan(SPEC.split("  - register")[0] + kl)  # nothing is registered
    # Bounds that no model could violate are no gates on quality.
    for idle in ("perplexity_ratio.code: {min: 0.1}", "perplexity.code: {min: 1}", "perplexity_tokens.code: {min: 1}"):
        assert "kl_mean" in refused(plan, gated(f"require: {{{idle}}}").replace("  - register", kl + "  - register"))
    assert "kl_mean" in refused(
        plan, SPEC.replace("  - register", KL % "kl_mean: {max: 1}, top1_agreement: {min: 0}" + "  - register")
    )
    # A gate on the model before another step says nothing of what is released.
    early = gated("require: {perplexity_ratio.code: {max: 9}}")
    stale = early.replace("  - register", "  - quantize: rtn\n    with: {group_size: 32}\n" + kl + "  - register")
    assert "kl_mean" in refused(plan, stale)


@pytest.fixture
def settings(tmp_path: Path, tracking_uri: str) -> Settings:
    return Settings(tmp_path / "home", tracking_uri)


def test_a_bound_on_the_worse_end_refuses_and_leaves_the_evidence(
    material: Path, methods: Methods, settings: Settings, tracking_uri: str
) -> None:
    """The value itself is within the bound; the end of its interval is not. Another bound computes nothing again."""
    path = material / "gates.yaml"
    path.write_text(SPEC, encoding="utf-8")
    watcher = Watcher()
    document = run_locally(path, methods, settings, watcher).document()
    folder = watcher.finished[2].path
    ratio = document["steps"][2]["metrics"]["perplexity_ratio.code"]
    samples = read_samples(folder)[0]
    low, high = samples.interval("perplexity_ratio.code", 0.95, seed=0)
    assert read_intervals(folder)["perplexity_ratio.code"] == (pytest.approx(low), pytest.approx(high))
    assert low < ratio < high
    between = (ratio + high) / 2

    path.write_text(gated(f"require: {{perplexity_ratio.code: {{max: {between}}}}}"), encoding="utf-8")
    document = run_locally(path, methods, settings, watcher).document()
    assert all(step["cached"] for step in document["steps"])
    assert document["steps"][2]["gates"][0]["passed"] is True
    assert document["steps"][2]["gates"][0]["interval"] is None

    text = gated(f"require: {{perplexity_ratio.code: {{max: {between}, confidence: 0.95}}}}")
    path.write_text(text.replace("name: versatile", "name: refused").replace("sparsity: 0.5", "sparsity: 0.50001"))
    with pytest.raises(GateError) as caught:
        run_locally(path, methods, settings, watcher)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 5
    assert problem.where == f"{path}:9: steps[2].validate.require.perplexity_ratio.code"
    gate = watcher.finished[-1].gates[0]
    assert gate.what in str(problem) and f"95 % interval {gate.interval[0]:.6g} to {gate.interval[1]:.6g}" in gate.what
    with pytest.raises(SpecError):
        ModelRegistry(tracking_uri).resolve("models:/refused@candidate")

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("orchestrator")
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`orchestrator.artifact` = '{watcher.finished[-1].digest}'"
    )
    assert run.info.status == "FAILED"
    assert run.data.tags["orchestrator.gate.0"] == f"failed: {gate.what}"
    assert run.data.metrics["perplexity_ratio.code.high"] == pytest.approx(gate.interval[1])
    events = [event for event in Journal(settings.home, watcher.run_id).events() if event["event"] == "step finished"]
    assert events[-1]["gates"] == [json.loads(json.dumps(gate.as_dict()))]


SUITE = SPEC.replace("name: versatile", "name: suite").replace(
    "  - register: release\n",
    """\
    require: {perplexity.code: {max: 1.0}}
  - validate: fidelity
    with: {source: prose.txt, length_tokens: 24, windows: 12}
    require: {top1_agreement: {min: 1.0}, kl_mean: {max: 1.0e+9}}
  - register: release
    require: {max_concurrency.vllm: {min: 1.0e+9}}
""",
)


def test_every_failed_gate_of_a_model_is_told_at_once(
    material: Path, methods: Methods, settings: Settings, tracking_uri: str
) -> None:
    """Also of the register step; a second run tells the same from the store. What changes the model is not begun."""
    from mlflow import MlflowClient

    path = material / "suite.yaml"
    path.write_text(SUITE, encoding="utf-8")
    for cached in (False, True):
        watcher = Watcher()
        with pytest.raises(GateError) as caught:
            run_locally(path, methods, settings, watcher)
        assert [problem.where.partition(": ")[2] for problem in caught.value.problems if problem.where] == [
            "steps[2].validate.require.perplexity.code",
            "steps[3].validate.require.top1_agreement",
            "steps[4].register.require.max_concurrency.vllm",
        ]
        assert [outcome.cached for outcome in watcher.finished] == [cached] * 4
        events = list(Journal(settings.home, watcher.run_id).events())
        held = [gate for event in events for gate in event.get("gates", ())]
        assert [(gate["metric"], gate["passed"]) for gate in held] == [
            ("perplexity.code", False),
            ("top1_agreement", False),
            ("kl_mean", True),
            ("max_concurrency.vllm", False),
        ]
        assert events[-1]["event"] == "run failed" and events[-1]["error"] == str(caught.value)
        page = (settings.home / "runs" / f"{watcher.run_id}.html").read_text(encoding="utf-8")
        assert "3 of 4 gates not met" in page
        client = MlflowClient(tracking_uri)
        experiment = client.get_experiment_by_name("orchestrator")
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`orchestrator.run` = '{watcher.run_id}'")
        children = client.search_runs(
            [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and status = 'FAILED'"
        )
        assert sorted(child.data.tags["orchestrator.method"] for child in children) == [
            "fidelity",
            "perplexity",
            "release",
        ]
    assert not (settings.home / "releases").exists()

    later = SUITE.replace(
        "  - register", "  - calibrate: text\n    with: {source: train.txt, length_tokens: 8}\n  - register"
    )
    path.write_text(later.replace("  - register", "  - quantize: rtn\n    with: {group_size: 16}\n  - register"))
    watcher = Watcher()
    with pytest.raises(GateError) as caught:
        run_locally(path, methods, settings, watcher)
    assert len(caught.value.problems) == 2  # the register step is of another model
    assert [outcome.method for outcome in watcher.finished] == ["text", "magnitude", "perplexity", "fidelity"]


def test_an_evaluator_that_fails_ends_the_run_and_the_failed_gates_are_told_too(
    material: Path, methods: Methods, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Fidelity, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        raise StepError("the scales are broken", remedy="mend them")

    monkeypatch.setattr(Fidelity, "measure", broken)
    path = material / "broken.yaml"
    path.write_text(SUITE.replace("windows: 12}\n    require: {top1", "windows: 11}\n    require: {top1"))
    with pytest.raises(StepError) as caught:
        run_locally(path, methods, settings, Watcher())
    assert caught.value.exit_code == 4
    assert [problem.what.partition(" is ")[0] for problem in caught.value.problems] == [
        "the scales are broken",
        "perplexity.code",
    ]
    assert "the scales are broken" in str(caught.value) and "max allowed is 1;" in str(caught.value)


class Measures:
    """A step as far as gates are concerned."""

    def __init__(self, require: dict[str, dict[str, float]], must_not_fall: tuple[str, ...] = ()) -> None:
        self.require, self.must_not_fall, self.identity, self.place = require, must_not_fall, {"seed": 0}, "here"
        self.method = Perplexity.model_construct(sources={"arc": "text"})
        object.__setattr__(self.method, "__class__", Graded)


class Graded(Perplexity):
    """With an accuracy, of which more is better."""

    better = {"perplexity": "lower", "accuracy": "higher"}  # noqa: RUF012


def answers(folder: Path, right_before: int, right_after: int, units: int) -> dict[str, float]:
    """Samples of so many right answers, those that were lost among those that were right."""
    before = [1.0] * right_before + [0.0] * (units - right_before)
    after = [1.0] * right_after + [0.0] * (units - right_after)
    quotients = {
        "accuracy.arc": Quotient("after", "units"),
        "dense_accuracy.arc": Quotient("before", "units"),
        "accuracy_ratio.arc": Quotient("after", "before"),
    }
    samples = Samples("question", {"before": before, "after": after, "units": [1.0] * units}, quotients)
    (folder / "samples.json").write_text(json.dumps([samples.as_dict()]))
    return {name: samples.value(name) for name in quotients}


def test_what_must_not_fall_may_fall_within_chance(tmp_path: Path) -> None:
    step: Any = Measures({}, ("accuracy.arc",))
    (chance,) = gate_results(step, answers(tmp_path, 60, 59, 100), tmp_path)
    assert chance.passed and chance.value == pytest.approx(-0.01) and "within chance" in chance.what
    (worse,) = gate_results(step, answers(tmp_path, 60, 45, 100), tmp_path)
    assert not worse.passed and worse.interval and worse.interval[1] < 0 and "worse beyond chance" in worse.what
    (better,) = gate_results(step, answers(tmp_path, 45, 60, 100), tmp_path)
    assert better.passed
    (three,) = gate_results(step, answers(tmp_path, 60, 57, 200), tmp_path)
    assert three.passed and three.interval and three.interval[1] > 0  # a coin falls three times alike: one in eight
    assert "3 of 200 questions lost and 0 won, p = 0.125 of the sign test at 0.025" in three.what
    assert gate_results(step, answers(tmp_path, 60, 55, 200), tmp_path)[0].passed
    assert not gate_results(step, answers(tmp_path, 60, 54, 200), tmp_path)[0].passed
    (few,) = gate_results(step, answers(tmp_path, 6, 6, 9), tmp_path)
    assert not few.passed and "9 questions are too few for an interval: it takes 10" in few.what


def test_the_plan_says_how_little_goes_unnoticed() -> None:
    step: Any = Measures({}, ("accuracy.arc", "perplexity.arc"))
    step.method = Tasks.model_construct(task_files={}, questions=None)
    said = "must_not_fall accuracy.arc: fewer than 6 lost, with none won, cannot be told from chance"
    assert unnoticed(step) == [said]
    assert unnoticed(Measures({}, ("perplexity.arc",))) == []  # type: ignore[arg-type]


def test_retention_is_compressed_by_dense_and_the_other_way_where_less_is_better(tmp_path: Path) -> None:
    metrics = answers(tmp_path, 60, 57, 100)
    (held,) = gate_results(Measures({"accuracy.arc": {"retain": 0.94}}), metrics, tmp_path)  # type: ignore[arg-type]
    assert held.passed and held.value == pytest.approx(0.95)
    (unsure,) = gate_results(
        Measures({"accuracy.arc": {"retain": 0.94, "confidence": 0.9}}),  # type: ignore[arg-type]
        metrics,
        tmp_path,
    )
    assert not unsure.passed and unsure.interval and unsure.interval[0] < 0.94 < unsure.interval[1]
    perplexity = {"perplexity.a": 11.0, "dense_perplexity.a": 10.0, "perplexity_ratio.a": 1.1}
    for bound, passed in ((0.9, True), (0.91, False)):
        (gate,) = gate_results(Measures({"perplexity.a": {"retain": bound}}), perplexity, None)  # type: ignore[arg-type]
        assert gate.passed is passed and gate.value == pytest.approx(1 / 1.1)


def test_nothing_left_of_what_there_should_be_little_of_is_all_retained(tmp_path: Path) -> None:
    """1 / 0 is no traceback; neither is an interval that reaches 0."""
    (tmp_path / "samples.json").write_text(
        json.dumps(
            [
                Samples(
                    "question",
                    {"after": [0.0] * 12, "before": [1.0, 0.0] * 6, "units": [1.0] * 12},
                    {"perplexity_ratio.a": Quotient("after", "before")},
                ).as_dict()
            ]
        )
    )
    metrics = {"perplexity.a": 0.0, "dense_perplexity.a": 0.5, "perplexity_ratio.a": 0.0}
    step: Any = Measures({"perplexity.a": {"retain": 0.9, "confidence": 0.9}})
    (gate,) = gate_results(step, metrics, tmp_path)
    assert gate.passed and json.loads(json.dumps(gate.as_dict(), allow_nan=False))["value"] > 1


def test_a_kl_of_the_tail_has_an_interval(
    dense: Checkpoint, candidate: Checkpoint, sources: dict[str, str], context: Context
) -> None:
    measured = Fidelity(sources=sources, length_tokens=LENGTH, windows=12, batch=5).measure(candidate, dense, context)
    samples = measured.samples[1]
    assert samples.faults(measured.metrics) == []
    low, high = samples.intervals(0.95, seed=0)["kl_p99.prose"]
    assert low <= measured.metrics["kl_p99.prose"] <= high
    assert low < high


def test_a_cache_that_is_too_small_refuses_the_release(
    material: Path, methods: Methods, settings: Settings, plan: Callable[[str], Plan]
) -> None:
    text = SPEC.replace("name: versatile", "name: crowded")
    assert "release measures no 'max_concurrency.sglang'; it measures available_bytes.vllm" in refused(
        plan, text + "    require: {max_concurrency.sglang: {min: 2}}\n"
    )
    path = material / "crowded.yaml"
    path.write_text(text + "    require: {max_concurrency.vllm: {min: 1.0e+9}}\n", encoding="utf-8")
    watcher = Watcher()
    with pytest.raises(GateError, match=r"require\.max_concurrency\.vllm: max_concurrency\.vllm is \d.*min allowed is"):
        run_locally(path, methods, settings, watcher)
    assert not (settings.home / "releases").exists()
    assert [event["event"] for event in Journal(settings.home, watcher.run_id).events()][-2:] == [
        "step failed",
        "run failed",
    ]
    path.write_text(text + "    require: {max_concurrency.vllm: {min: 8}, kv_tokens.vllm: {min: 1024}}\n")
    document = run_locally(path, methods, settings, watcher).document()
    assert document["steps"][3]["metrics"]["max_concurrency.vllm"] >= 8
    path.write_text(text + "    require: {max_concurrency.vllm: {min: 1.0e+9}}\n", encoding="utf-8")
    with pytest.raises(GateError, match="version 1 was registered before there was this bound"):
        run_locally(path, methods, settings, watcher)


def test_samples_that_do_not_give_the_metrics_fail_the_step(
    material: Path, methods: Methods, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Perplexity.measure

    def wrong(self: Perplexity, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        measured = measure(self, candidate, baseline, context)
        return Measured({**measured.metrics, "perplexity.code": 1.0}, samples=measured.samples)

    monkeypatch.setattr(Perplexity, "measure", wrong)
    path = material / "wrong.yaml"
    path.write_text(SPEC, encoding="utf-8")
    with pytest.raises(StepError, match=r"samples that do not fit its metrics: perplexity\.code is 1, but its samples"):
        run_locally(path, methods, settings, Watcher())
