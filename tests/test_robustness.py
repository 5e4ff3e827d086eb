"""The same chain on other calibration texts and with other seeds: planned, made one at a time, measured, bounded.

Shape legend: K = corpora, S = seeds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import cli
from orchestrator.errors import GateError, OrchestratorError, StepError
from orchestrator.facts import facts_of
from orchestrator.fit import check_fit, remember_fit
from orchestrator.home import Settings
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import Methods, discover
from orchestrator.preflight import foresee
from orchestrator.remaking import Maker
from orchestrator.run import run_locally
from orchestrator_evaluation.robustness import Robustness
from tests.test_run import Watcher
from tests.tiny import make_model

SPEC = """\
version: 1
name: robust
model: {id: model}
seed: 3
steps:
  - calibrate: text
    with: {source: own.txt, sequences: 8, length_tokens: 24}
  - prune: wanda
    with: {sparsity: 0.5}
  - quantize: gptq
    with: {num_bits: 3, group_size: 32}
  - validate: robustness
    with: {sources: {code: code.txt, prose: prose.txt}, corpora: {own: own.txt, other: other.txt}, seeds: [3, 4],
      length_tokens: 24, windows: 12}
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    make_model(folder / "model", layers=1)
    generator = np.random.default_rng(0)
    for name, words in {
        "own": "the quick brown fox reads a book of words",
        "other": "ships sail over cold water while gulls cry",
        "code": "seven wizards judge return for while import",
        "prose": "some pens write down what a lazy dog says",
    }.items():
        (folder / f"{name}.txt").write_text(" ".join(generator.choice(words.split(), 3000)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.fixture
def settings(tmp_path: Path, tracking_uri: str) -> Settings:
    return Settings(tmp_path / "home", tracking_uri)


@pytest.fixture
def plan(material: Path, methods: Methods, tmp_path: Path) -> Callable[[str], Plan]:
    def planned(text: str) -> Plan:
        path = material / f"{tmp_path.name}.yaml"
        path.write_text(text, encoding="utf-8")
        return make_plan(path, methods, tmp_path / "home")

    return planned


def only_perplexity(text: str, source: str, seed: int) -> str:
    """The chain of a variant as a specification of its own, with a perplexity step."""
    head, _, _ = text.partition("  - validate")
    head = head.replace("own.txt", source).replace("seed: 3", f"seed: {seed}")
    return head + (
        "  - validate: perplexity\n"
        "    with: {sources: {code: code.txt, prose: prose.txt}, length_tokens: 24, windows: 12}\n"
    )


def test_a_variant_is_what_a_specification_of_its_own_would_be(plan: Callable[[str], Plan]) -> None:
    made = plan(SPEC)
    variants = {variant.asked.name: variant for variant in made.steps[3].variants}
    assert list(variants) == ["other-3", "other-4", "own-3", "own-4"]
    for name, source, seed in (("other-4", "other.txt", 4), ("own-4", "own.txt", 4), ("own-3", "own.txt", 3)):
        alone = plan(only_perplexity(SPEC, source, seed))
        assert [step.fingerprint for step in variants[name].steps] == [step.fingerprint for step in alone.steps[:3]]
    assert variants["own-3"].steps[-1].fingerprint == made.steps[2].fingerprint
    assert made.steps[3].identity["variants"].keys() == variants.keys()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of variants that are made, as they are made."""
    labels: list[str] = []
    make = Maker._make

    def counted(self: Maker, step: Any, *arguments: Any) -> Any:
        labels.append(step.label)
        return make(self, step, *arguments)

    monkeypatch.setattr(Maker, "_make", counted)
    return labels


def test_the_numbers_are_those_of_specifications_of_their_own(
    material: Path, methods: Methods, settings: Settings, made: list[str]
) -> None:
    path = material / "numbers.yaml"
    small = SPEC.replace("  - prune: wanda\n    with: {sparsity: 0.5}\n", "")
    path.write_text(small, encoding="utf-8")
    document = run_locally(path, methods, settings, Watcher()).document()
    assert made == ["calibrate text", "quantize gptq"] * 3  # own-3 is the model itself
    metrics = document["steps"][2]["metrics"]
    artifacts = {path.name for path in (settings.home / "artifacts").iterdir()}
    assert len(artifacts) == 3  # no model of a variant stays

    losses: dict[tuple[str, int], Mapping[str, float]] = {}
    for source, seed in (("own", 3), ("own", 4), ("other", 3), ("other", 4)):
        path = material / f"{source}-{seed}.yaml"
        path.write_text(only_perplexity(small, f"{source}.txt", seed), encoding="utf-8")
        alone = run_locally(path, methods, settings, Watcher()).document()["steps"][2]["metrics"]
        losses[source, seed] = {tier: math.log(alone[f"perplexity_ratio.{tier}"]) for tier in ("code", "prose")}
    for tier in ("code", "prose"):
        grid = {key: loss[tier] for key, loss in losses.items()}
        values = list(grid.values())
        assert len({round(value, 9) for value in values}) == 4
        mean = statistics.fmean(values)
        assert metrics[f"loss_mean.{tier}"] == pytest.approx(mean, rel=1e-9)
        assert metrics[f"perplexity_ratio_mean.{tier}"] == pytest.approx(math.exp(mean), rel=1e-9)
        assert metrics[f"perplexity_ratio_min.{tier}"] == pytest.approx(math.exp(min(values)), rel=1e-9)
        assert metrics[f"perplexity_ratio_max.{tier}"] == pytest.approx(math.exp(max(values)), rel=1e-9)
        assert metrics[f"perplexity_ratio_std.{tier}"] == pytest.approx(np.std(np.exp(values), ddof=1), rel=1e-6)
        spread = math.exp(max(values)) / math.exp(min(values)) - 1
        assert metrics[f"perplexity_spread.{tier}"] == pytest.approx(spread, rel=1e-6)
        table_KS = np.array([[grid[name, seed] for seed in (3, 4)] for name in ("other", "own")])
        assert metrics[f"loss_std_corpus.{tier}"] == pytest.approx(table_KS.mean(1).std(ddof=1), rel=1e-6)
        assert metrics[f"loss_std_seed.{tier}"] == pytest.approx(table_KS.var(1, ddof=1).mean() ** 0.5, rel=1e-6)
        share = (mean - max(min(values), 0)) / mean if mean > 0 else 0.0
        assert metrics[f"calibration_share.{tier}"] == pytest.approx(share, rel=1e-6)
        own = math.exp(statistics.fmean([grid["own", 3], grid["own", 4]]))
        assert metrics[f"perplexity_ratio_on.{tier}.own"] == pytest.approx(own, rel=1e-9)
    assert metrics["variants"] == 4
    folder = Path(document["steps"][2]["artifact"]["path"])
    curve = json.loads((folder / "curves.json").read_text())["perplexity_ratio_on.code.own_by_seed"]
    assert [seed for seed, _ in curve] == [3, 4]
    assert curve[1][1] == pytest.approx(math.exp(losses["own", 4]["code"]), rel=1e-9)
    assert {name for name in json.loads((folder / "intervals.json").read_text()) if name.endswith("code")} == {
        "loss_mean.code",
        "perplexity_ratio_mean.code",
    }


def test_a_further_seed_makes_one_variant_more_and_a_damaged_memory_is_measured_again(
    material: Path, methods: Methods, settings: Settings, made: list[str]
) -> None:
    path = material / "further.yaml"
    small = SPEC.replace("  - prune: wanda\n    with: {sparsity: 0.5}\n", "").replace(
        "own: own.txt, other: other.txt}, seeds: [3, 4]", "own: own.txt}, seeds: [3, 4]"
    )
    path.write_text(small, encoding="utf-8")
    first = run_locally(path, methods, settings, Watcher()).document()["steps"][2]["metrics"]
    assert made == ["calibrate text", "quantize gptq"]
    made.clear()
    path.write_text(small.replace("[3, 4]", "[3, 4, 5]"), encoding="utf-8")
    second = run_locally(path, methods, settings, Watcher()).document()["steps"][2]["metrics"]
    assert made == ["calibrate text", "quantize gptq"]
    assert "loss_std_corpus.code" not in second
    (_, kept, *_) = sorted((settings.home / "cache").glob("robustness-*/measured.json"))
    content = json.loads(kept.read_text())
    content["losses"][".code"][0] += 1.0
    kept.write_text(json.dumps(content))
    made.clear()
    path.write_text(small.replace("[3, 4]", "[4, 3]").replace("name: robust", "name: again"), encoding="utf-8")
    for artifact in (settings.home / "artifacts").iterdir():
        if json.loads((artifact / "manifest.json").read_text())["method"] == "robustness":
            (artifact / "metrics.json").unlink()
    third = run_locally(path, methods, settings, Watcher()).document()["steps"][2]["metrics"]
    assert third == first


def test_a_killed_step_goes_on_with_the_next_variant(material: Path, methods: Methods, settings: Settings) -> None:
    """SIGKILL while the second variant is made; the first is not made again, and the numbers are the same."""
    path = material / "killed.yaml"
    small = SPEC.replace("  - quantize: gptq\n    with: {num_bits: 3, group_size: 32}\n", "")
    path.write_text(small.replace("seeds: [3, 4]", "seeds: [7]"), encoding="utf-8")
    script = f"""
import os, signal
from pathlib import Path
from orchestrator.home import Settings
from orchestrator.plugins import discover
from orchestrator.remaking import Maker
from orchestrator.run import run_locally
from tests.test_run import Watcher

make = Maker._make
made = []
def killing(self, step, *arguments):
    made.append(step.label)
    if len(made) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(self, step, *arguments)
Maker._make = killing
settings = Settings(Path({str(settings.home)!r}), {settings.tracking_uri!r})
run_locally(Path({str(path)!r}), discover(), settings, Watcher())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    watcher = Watcher()
    said: list[str] = []
    watcher.step_progress = lambda step, fraction, message: said.append(message)  # type: ignore[method-assign]
    resumed = run_locally(path, methods, settings, watcher).document()
    assert not any("other-7: " in message and "measured" not in message for message in said)
    assert any(message.startswith("own-7: prune wanda") for message in said)
    other = Settings(settings.home.parent / "other", settings.tracking_uri)
    afresh = run_locally(path, methods, other, Watcher()).document()
    assert resumed["steps"][2]["metrics"] == afresh["steps"][2]["metrics"]
    assert list((settings.home / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "other: other.txt",
            "other: code.txt",
            "corpora.other: this is the text of `sources.code`, so what is measured",
        ),
        ("other: other.txt", "other: nowhere.txt", "corpora.other: there is no text file"),
        ("other: other.txt", "other: tiny.txt", "corpora.other: "),
        ("seeds: [3, 4]", "seeds: [3, 3]", "a seed is named twice"),
        ("seeds: [3, 4]", "seeds: []", "at least 1 item"),
        ("seeds: [3, 4]", "seeds: [-1]", "greater than or equal to 0"),
        (
            "corpora: {own: own.txt, other: other.txt}, seeds: [3, 4]",
            "corpora: {own: own.txt}, seeds: [3]",
            "no spread",
        ),
        ("corpora: {own: own.txt, other: other.txt}, ", "", "corpora"),
        (
            SPEC[SPEC.index("  - calibrate") : SPEC.index("  - validate")],
            "  - prune: magnitude\n    with: {sparsity: 0.5}\n",
            "steps[1].validate: validate robustness makes the model again on other calibration texts, and no step",
        ),
        (
            SPEC[SPEC.index("  - prune") : SPEC.index("  - validate")],
            "  - prune: magnitude\n    with: {sparsity: 0.5}\n",
            "no step before it changes the model by what it was calibrated on",
        ),
    ],
)
def test_what_cannot_work_is_refused_while_planning(
    plan: Callable[[str], Plan], material: Path, old: str, new: str, said: str
) -> None:
    (material / "tiny.txt").write_text("few words", encoding="utf-8")
    assert SPEC.count(old) == 1
    with pytest.raises(OrchestratorError) as caught:
        plan(SPEC.replace(old, new))
    assert said in str(caught.value)


def test_a_text_under_two_names_is_refused(plan: Callable[[str], Plan], material: Path) -> None:
    (material / "copy.txt").write_bytes((material / "own.txt").read_bytes())
    with pytest.raises(OrchestratorError, match=r"this is the text of `corpora\.own`, under another name"):
        plan(SPEC.replace("other: other.txt", "other: copy.txt"))


def test_a_text_that_stands_in_a_corpus_is_refused_by_its_tokens(
    material: Path, methods: Methods, settings: Settings
) -> None:
    """Not the same file, but the held-out text is in it."""
    held_out = (material / "prose.txt").read_text()
    (material / "leaking.txt").write_text(held_out[:1500], encoding="utf-8")
    path = material / "leaking.yaml"
    text = SPEC.replace("other: other.txt", "other: leaking.txt").replace(
        "8, length_tokens: 24", "8, length_tokens: 48"
    )
    path.write_text(text.replace("windows: 12", "windows: 12, max_overlap: 0.0"), encoding="utf-8")
    said = r"of 13 tokens in sources\.prose stand in what other-3 was calibrated or trained on too"
    with pytest.raises(StepError, match=said):
        run_locally(path, methods, settings, Watcher())


def test_a_bound_on_the_spread_refuses_with_the_numbers(
    material: Path, methods: Methods, settings: Settings, plan: Callable[[str], Plan]
) -> None:
    path = material / "bounded.yaml"
    gate = "    require: {'perplexity_spread.*': {max: 1.0e-9}}\n"
    small = SPEC.replace("  - prune: wanda\n    with: {sparsity: 0.5}\n", "").replace("seeds: [3, 4]", "seeds: [3]")
    path.write_text(small + gate + "  - register: release\n", encoding="utf-8")
    with pytest.raises(GateError, match=r"perplexity_spread\.code is 0\.\d+, max allowed is 1e-09") as caught:
        run_locally(path, methods, settings, Watcher())
    assert len(caught.value.problems) == 2
    assert not (settings.home / "releases").exists()
    kl = "  - validate: fidelity\n    with: {source: prose.txt, length_tokens: 24, windows: 4}\n"
    kl += "    require: {kl_mean: {max: 1}}\n"
    with pytest.raises(OrchestratorError, match="would rest on kl_mean alone"):
        plan(small + gate + kl + "  - register: release\n")


def test_plan_says_how_many_models_it_makes_and_what_that_takes(
    material: Path,
    methods: Methods,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    path = material / "shown.yaml"
    path.write_text(SPEC, encoding="utf-8")
    made = make_plan(path, methods, tmp_path / "home")
    remember_fit(tmp_path / "home", check_fit(made, [None] * 4, tmp_path / "home"))  # spares `plan` a process for it
    cli.plan(path)
    assert "makes the model 3 times more" in capfd.readouterr().out
    estimates = foresee(made, tmp_path / "home", [None] * 4)
    method = made.steps[3].method
    assert isinstance(method, Robustness)
    facts = facts_of(made.source)
    alone = method.estimate(facts, facts, (8, 24))
    chain = sum(estimate.work.operations for estimate in estimates[:3])
    assert estimates[3].work.operations == pytest.approx(alone.operations + 3 * chain)
    assert estimates[3].work.memory_bytes >= max(estimate.work.memory_bytes for estimate in estimates[:3])
    assert estimates[3].work.scratch_bytes >= 2 * max(estimate.disk_bytes for estimate in estimates[:3])


def test_a_loss_of_nothing_has_no_share() -> None:
    method = Robustness(source="x", corpora={"a": "a", "b": "b"}, seeds=(0,))
    metrics = method._metrics("", {"a": [-0.01], "b": [0.005]})
    assert metrics["calibration_share"] == 0.0
    assert method._metrics("", {"a": [-0.01], "b": [0.03]})["calibration_share"] == 1.0
    assert method._metrics("", {"a": [0.01], "b": [0.03]})["calibration_share"] == pytest.approx(0.5)
