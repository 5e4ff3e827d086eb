"""Running a plan in process: the whole chain on a tiny model, the cache, gates, failures and crashes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from orchestrator.api import LayerMethod, LayerResult, Needs, Stage
from orchestrator.artifact import ArtifactStore
from orchestrator.errors import GateError, PreflightError, SpecError, StepError
from orchestrator.home import Settings
from orchestrator.journal import Journal
from orchestrator.outcome import StepOutcome
from orchestrator.plan import Plan, Step, make_plan
from orchestrator.plugins import InstalledMethod, Methods, Origin, discover
from orchestrator.registry import ModelRegistry
from orchestrator.run import run_locally
from orchestrator.status import statuses
from tests.tiny import make_model

CHAIN = """\
version: 1
name: chain
model: {id: model}
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 8, length_tokens: 32}
  - prune: wanda
    with: {sparsity: 0.5}
  - distill: logits
    with: {updates: 3, batch_sequences: 2}
  - quantize: gptq
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: valid.txt, length_tokens: 32, windows: 8}
  - validate: fidelity
    with: {source: valid.txt, length_tokens: 32, windows: 8}
  - register: release
    with: {alias: candidate}
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 32}}]
"""
MODEL_STEPS = slice(1, 4)


class Watcher:
    """Keeps what a run said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.finished: list[StepOutcome] = []

    def run_started(self, run_id: str, plan: Plan) -> None:
        self.run_id = run_id

    def step_started(self, step: Step) -> None: ...

    def step_progress(self, step: Step, fraction: float, message: str) -> None:
        assert 0 <= fraction <= 1

    def step_finished(self, step: Step, outcome: StepOutcome) -> None:
        self.finished.append(outcome)

    def note(self, message: str) -> None:
        self.notes.append(message)


class Explosive(LayerMethod):
    """Fails in the middle of a model."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "explosive"
    paper: ClassVar[str] = "none: a fault for the tests"
    needs: ClassVar[Needs] = Needs.WEIGHT

    def compress(self, weight_OI: torch.Tensor, statistic: object) -> LayerResult:
        raise ZeroDivisionError("as the test wants")


class Quitter(Explosive):
    """Tries to leave with a friendly exit code."""

    name: ClassVar[str] = "quitter"

    def compress(self, weight_OI: torch.Tensor, statistic: object) -> LayerResult:
        raise SystemExit(0)


@pytest.fixture(scope="module")
def methods() -> Methods:
    found = discover()
    found.add(InstalledMethod(cls, Origin(cls.name, "tests", "0")) for cls in (Explosive, Quitter))
    return found


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, text and a specification."""
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 400, encoding="utf-8")
    (folder / "valid.txt").write_text("seven wizards judge a model, layer by layer. " * 100, encoding="utf-8")
    (folder / "spec.yaml").write_text(CHAIN, encoding="utf-8")
    return folder


@pytest.fixture
def settings(tmp_path: Path, tracking_uri: str) -> Settings:
    return Settings(tmp_path / "home", tracking_uri)


@pytest.fixture(scope="module")
def done(material: Path, methods: Methods, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One finished run of the whole chain: (settings, document)."""
    settings = Settings(tmp_path_factory.mktemp("done") / "home", tracking_uri)
    return settings, run_locally(material / "spec.yaml", methods, settings, Watcher()).document()


@pytest.fixture
def copied(done: Any, tmp_path: Path, tracking_uri: str) -> Iterator[tuple[Settings, Any]]:
    """The finished run's home, free to be damaged. It stands in the original's place: releases have addresses."""
    settings, document = done
    kept = tmp_path / "kept"
    shutil.copytree(settings.home, kept)
    yield settings, document
    shutil.rmtree(settings.home)
    shutil.copytree(kept, settings.home)


def variant(material: Path, name: str, change: Callable[[str], str]) -> Path:
    path = material / f"{name}.yaml"
    path.write_text(change(CHAIN), encoding="utf-8")
    return path


def test_the_document_is_what_scripts_rely_on(done: Any) -> None:
    settings, document = done
    assert [f"{step['stage']} {step['method']}" for step in document["steps"]] == [
        "calibrate text",
        "prune wanda",
        "distill logits",
        "quantize gptq",
        "validate perplexity",
        "validate fidelity",
        "register release",
    ]
    for step in document["steps"]:
        assert set(step) >= {"fingerprint", "cached", "seconds", "peak_memory_bytes", "artifact", "metrics"}
        assert not step["cached"]
        assert step["peak_memory_bytes"] > 1_000_000
        assert Path(step["artifact"]["path"]) == settings.home / "artifacts" / step["artifact"]["digest"]
    assert {"uri", "digest", "model_version", "files"} <= set(document["release"])
    assert json.loads(json.dumps(document)) == document


def test_the_release_is_complete_and_registered(done: Any, tmp_path: Path) -> None:
    from orchestrator.store import open_store

    settings, document = done
    release = document["release"]
    root, _, name = release["uri"].partition("/chain/")
    fetched = open_store(root).fetch(f"chain/{name}", tmp_path / "pulled")
    assert fetched.digest == release["digest"]
    keys = {file.key for file in fetched.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "serving/vllm/vllm.yaml"} <= keys
    plan = json.loads((tmp_path / "pulled" / "serving" / "vllm" / "kv-plan.json").read_text(encoding="utf-8"))
    weights = (tmp_path / "pulled" / "model.safetensors").stat().st_size
    assert plan["weight_bytes"] == weights
    assert plan["bytes_per_token"] > 0
    found = ModelRegistry(settings.tracking_uri).resolve("models:/chain@candidate")
    assert found.source == release["uri"]
    assert found.tags["orchestrator.digest"] == release["digest"]
    assert found.tags["orchestrator.artifact"] == document["steps"][3]["artifact"]["digest"]


def test_pruned_zeros_survive_distillation_and_quantization(done: Any) -> None:
    settings, document = done
    store = ArtifactStore(settings.home)
    zeros = [store.find(step["artifact"]["digest"]).manifest["invariants"]["zeros"] for step in document["steps"][1:4]]
    assert [fact["fraction"] >= 0.5 for fact in zeros] == [True, True, True]


def test_mlflow_has_a_run_tree(done: Any) -> None:
    from mlflow import MlflowClient

    settings, document = done
    client = MlflowClient(settings.tracking_uri)
    parent = client.get_run(document["mlflow_run"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{document['mlflow_run']}'", max_results=50
    )
    assert len(children) == len(document["steps"])
    gptq = next(run for run in children if run.data.tags["orchestrator.method"] == "gptq")
    assert gptq.data.params["num_bits"] == "4"
    assert "manifest.json" in [file.path for file in client.list_artifacts(gptq.info.run_id)]


def test_a_second_run_is_cached_and_leaves_no_trace_in_mlflow(done: Any, material: Path, methods: Methods) -> None:
    settings, first = done
    second = run_locally(material / "spec.yaml", methods, settings, Watcher()).document()
    assert all(step["cached"] for step in second["steps"])
    assert second["release"] == first["release"]
    assert second["mlflow_run"] is None


def test_the_same_spec_gives_the_same_bytes_elsewhere(
    done: Any, material: Path, methods: Methods, settings: Settings
) -> None:
    def change(text: str) -> str:
        return text[: text.index("  - validate: perplexity")]

    again = run_locally(variant(material, "models", change), methods, settings, Watcher()).document()
    assert [step["artifact"]["digest"] for step in again["steps"]] == [
        step["artifact"]["digest"] for step in done[1]["steps"][:4]
    ]


@pytest.mark.parametrize("victim", [0, 2, 3])
def test_a_flipped_byte_is_computed_again_to_the_same_digest(
    copied: Any, material: Path, methods: Methods, victim: int
) -> None:
    settings, first = copied
    folder = Path(first["steps"][victim]["artifact"]["path"])
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    watcher = Watcher()
    document = run_locally(material / "spec.yaml", methods, settings, watcher).document()
    assert [step["cached"] for step in document["steps"]] == [index != victim for index in range(7)]
    assert document["steps"][victim]["artifact"] == first["steps"][victim]["artifact"]
    assert any("damaged" in note for note in watcher.notes)


def test_a_release_that_is_gone_is_made_again(copied: Any, material: Path, methods: Methods) -> None:
    settings, first = copied
    shutil.rmtree(settings.home / "releases")
    plan = make_plan(material / "spec.yaml", methods, settings.home, tracking_uri=settings.public_tracking_uri)
    assert "no longer" in str(statuses(plan, ArtifactStore(settings.home))[-1].why)
    document = run_locally(material / "spec.yaml", methods, settings, Watcher()).document()
    assert [step["cached"] for step in document["steps"]] == [True] * 6 + [False]
    assert document["release"]["digest"] == first["release"]["digest"]
    assert document["release"]["model_version"] == first["release"]["model_version"]


def test_a_failed_gate_keeps_the_evidence_and_registers_nothing(
    done: Any, material: Path, methods: Methods, settings: Settings
) -> None:
    spec = variant(
        material,
        "gate",
        lambda text: text.replace("name: chain", "name: gated").replace(
            "windows: 8}\n  - validate: fidelity",
            "windows: 8}\n    require: {perplexity_ratio: {max: 0.5}}\n  - validate: fidelity",
        ),
    )
    watcher = Watcher()
    with pytest.raises(GateError, match=r"perplexity_ratio is .* max allowed is 0\.5") as caught:
        run_locally(spec, methods, settings, watcher)
    assert caught.value.exit_code == 5
    assert [one.method for one in watcher.finished[-2:]] == ["perplexity", "fidelity"]  # the same model is measured on
    assert ArtifactStore(settings.home).find(watcher.finished[-2].digest).damage() is None
    assert not (settings.home / "releases").exists()
    with pytest.raises(SpecError):
        ModelRegistry(settings.tracking_uri).resolve("models:/gated@candidate")


def test_a_method_that_raises_leaves_nothing_behind(material: Path, methods: Methods, settings: Settings) -> None:
    spec = variant(
        material,
        "explosive",
        lambda _: "version: 1\nname: x\nmodel: {id: model}\nsteps:\n  - prune: explosive\n",
    )
    watcher = Watcher()
    with pytest.raises(StepError, match="ZeroDivisionError: as the test wants") as caught:
        run_locally(spec, methods, settings, watcher)
    assert caught.value.problems[0].where == f"{spec}:5: steps[0].prune"
    assert "ZeroDivisionError" in (settings.home / "runs" / f"{watcher.run_id}.traceback.txt").read_text("utf-8")
    assert not list((settings.home / "staging").iterdir())
    assert not (settings.home / "artifacts").exists()
    events = [event["event"] for event in Journal(settings.home, watcher.run_id).events()]
    assert events == ["run started", "step started", "step failed", "run failed"]


def test_a_method_that_exits_has_failed(material: Path, methods: Methods, settings: Settings) -> None:
    spec = variant(
        material, "quitter", lambda _: "version: 1\nname: x\nmodel: {id: model}\nsteps:\n  - prune: quitter\n"
    )
    with pytest.raises(StepError, match="SystemExit"):
        run_locally(spec, methods, settings, Watcher())


def test_an_artifact_replaced_by_a_file_is_made_again(copied: Any, material: Path, methods: Methods) -> None:
    settings, first = copied
    folder = Path(first["steps"][1]["artifact"]["path"])
    shutil.rmtree(folder)
    folder.write_text("not a folder", encoding="utf-8")
    document = run_locally(material / "spec.yaml", methods, settings, Watcher()).document()
    assert [step["cached"] for step in document["steps"]] == [index != 1 for index in range(7)]
    assert document["steps"][1]["artifact"] == first["steps"][1]["artifact"]


def test_running_an_older_specification_again_moves_the_alias_back(
    copied: Any, material: Path, methods: Methods
) -> None:
    settings, first = copied
    registry = ModelRegistry(settings.tracking_uri)
    other = variant(material, "newer", lambda text: text.replace("num_bits: 4", "num_bits: 8"))
    newer = run_locally(other, methods, settings, Watcher()).document()
    assert registry.resolve("models:/chain@candidate").version == newer["release"]["model_version"]
    watcher = Watcher()
    again = run_locally(material / "spec.yaml", methods, settings, watcher).document()
    assert all(step["cached"] for step in again["steps"])
    assert registry.resolve("models:/chain@candidate").version == first["release"]["model_version"]
    assert any("alias candidate of chain moved" in note for note in watcher.notes)


def test_too_little_text_is_refused(material: Path, methods: Methods, settings: Settings) -> None:
    spec = variant(material, "short", lambda text: text.replace("sequences: 8", "sequences: 400"))
    with pytest.raises((StepError, PreflightError), match=r"text\.txt") as caught:
        run_locally(spec, methods, settings, Watcher())
    assert caught.value.exit_code in (3, 4)


def test_an_unreachable_tracking_server_is_a_clear_refusal(material: Path, methods: Methods, tmp_path: Path) -> None:
    settings = Settings(tmp_path / "home", "http://user:secret@127.0.0.1:9")
    with pytest.raises(PreflightError) as caught:
        run_locally(material / "spec.yaml", methods, settings, Watcher())
    assert "127.0.0.1:9" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (settings.home / "artifacts").exists()


def test_a_release_goes_to_s3_over_the_wire(
    done: Any, material: Path, methods: Methods, s3_bucket: str, tmp_path: Path
) -> None:
    from orchestrator.store import open_store

    settings, _ = done
    spec = variant(
        material,
        "s3",
        lambda text: text.replace("name: chain", "name: chain-s3").replace(
            "alias: candidate}", f"alias: candidate, uri: 's3://{s3_bucket}/models'}}"
        ),
    )
    document = run_locally(spec, methods, settings, Watcher()).document()
    assert [step["cached"] for step in document["steps"]] == [True] * 6 + [False]
    uri = document["release"]["uri"]
    assert uri.startswith(f"s3://{s3_bucket}/models/chain-s3/")
    fetched = open_store(f"s3://{s3_bucket}/models").fetch(
        uri.removeprefix(f"s3://{s3_bucket}/models/"), tmp_path / "x"
    )
    assert fetched.digest == document["release"]["digest"]


def test_an_unreachable_s3_is_refused_before_any_compute(
    material: Path, methods: Methods, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"),
        ("AWS_ACCESS_KEY_ID", "someone"),
        ("AWS_SECRET_ACCESS_KEY", "hush-hush"),
    ):
        monkeypatch.setenv(name, value)
    spec = variant(material, "s3down", lambda text: text.replace("alias: candidate}", "uri: 's3://bucket/models'}"))
    with pytest.raises(PreflightError) as caught:
        run_locally(spec, methods, settings, Watcher())
    assert "127.0.0.1:9" in str(caught.value)
    assert "hush-hush" not in str(caught.value)
    assert not settings.home.exists()


@pytest.mark.parametrize("killed_in", [1, 3])
def test_a_killed_run_is_taken_up_where_it_was(
    done: Any, material: Path, methods: Methods, settings: Settings, killed_in: int
) -> None:
    environment = {
        **os.environ,
        "ORCHESTRATOR_HOME": str(settings.home),
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
    }
    command = [sys.executable, "-m", "orchestrator", "run", str(material / "spec.yaml"), "--local"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        journals = list((settings.home / "runs").glob("*.jsonl")) if settings.home.exists() else []
        events = Journal(settings.home, journals[0].stem).events() if journals else []
        if any(event["event"] == "step started" and event["step"] == killed_in for event in events):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    document = run_locally(material / "spec.yaml", methods, settings, Watcher()).document()
    assert [step["cached"] for step in document["steps"]][:killed_in] == [True] * killed_in
    assert not list((settings.home / "staging").iterdir())
    assert [step["artifact"]["digest"] for step in document["steps"][:4]] == [
        step["artifact"]["digest"] for step in done[1]["steps"][:4]
    ]
