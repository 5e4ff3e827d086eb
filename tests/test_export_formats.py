"""`formats:` of a register step: planning, writing into the release, and what happens when a format fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gguf
import pytest
from pydantic import Field

from orchestrator import quickstart
from orchestrator.api import Checkpoint, Context, ExportFacts, ExportFormat, Invariant, SpecError, Stage, StepError
from orchestrator.errors import OrchestratorError
from orchestrator.formats import write_formats
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import InstalledMethod, Methods, Origin, check_class, discover
from orchestrator.preflight import foresee
from orchestrator.run import Settings, run_locally
from tests.test_run import Watcher

SPEC = """\
version: 1
name: exported
model: {id: MODEL}
seed: 0
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 4, length_tokens: 32}
  - prune: wanda
    with: {pattern: "2:4"}
  - quantize: gptq
    with: {num_bits: 4, group_size: 32}
  - register: release
    formats: [{gguf: {tokens: 64}}]
"""
MODEL = Path(str(quickstart.__file__)).parent / "model"


class Notes(ExportFormat):
    """Writes what it was told; for the tests."""

    stage: ClassVar[Stage] = Stage.REGISTER
    name: ClassVar[str] = "notes"
    paper: ClassVar[str] = "None."
    asked: ClassVar[list[ExportFacts]] = []

    fails: str = Field("", description="Where it fails.")

    def check(self, facts: ExportFacts) -> None:
        self.asked.append(facts)
        if self.fails == "check":
            raise SpecError("notes cannot carry it", remedy="use gguf")
        if self.fails == "crash":
            raise RuntimeError("out of luck")

    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        if self.fails != "nothing written":
            (folder / "notes.json").write_text(json.dumps(dict(invariants), sort_keys=True), encoding="utf-8")
        if self.fails == "late":
            raise StepError("notes cannot carry this after all")
        return {"value": float("nan") if self.fails == "nan" else 1.5}


@pytest.fixture
def methods() -> Methods:
    found = discover()
    found.add([InstalledMethod(check_class(Notes), Origin("notes", "tests", "0"))])
    return found


@pytest.fixture
def spec(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a specification beside its text."""
    (tmp_path / "text.txt").write_text("def read(self, path):\n    return open(path).read()\n" * 200, encoding="utf-8")

    def write(text: str = SPEC) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(text.replace("MODEL", str(MODEL)), encoding="utf-8")
        return path

    return write


def refusals(path: Path, methods: Methods) -> str:
    with pytest.raises(OrchestratorError) as caught:
        make_plan(path, methods, path.parent / "home")
    return str(caught.value)


def test_a_chain_ends_in_a_gguf_file_that_llama_cpp_runs(
    spec: Callable[..., Path], methods: Methods, tmp_path: Path, tracking_uri: str
) -> None:
    settings = Settings(tmp_path / "home", tracking_uri)
    document = run_locally(spec(), methods, settings, Watcher()).document()
    metrics = document["steps"][-1]["metrics"]
    (entry,) = [file for file in document["release"]["files"] if "gguf" in file["key"]]
    assert entry["key"] == "formats/gguf/model-q4_0.gguf"
    assert entry["bytes"] == metrics["gguf_bytes"]
    assert metrics["gguf_kl_mean"] < 0.01 and metrics["gguf_changed_weights"] == 0 and metrics["gguf_tokens"] == 64
    path = Path(document["release"]["uri"].removeprefix("file://")) / entry["key"]
    types = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = types["blk.3.ffn_down.weight"]
    held = gguf.dequantize(down.data, down.tensor_type)
    assert ((held.reshape(-1, 4) == 0).sum(1) >= 2).all()  # 2:4 survives in the file
    again = run_locally(spec(), methods, settings, Watcher()).document()
    assert again["steps"][-1]["cached"]
    listed = spec(SPEC.replace("{gguf: {tokens: 64}}", "{gguf: {tokens: 64}}, {notes: {}}"))
    both = run_locally(listed, methods, settings, Watcher()).document()
    assert both["steps"][-1]["metrics"]["notes_value"] == 1.5
    (same,) = [file for file in both["release"]["files"] if "gguf" in file["key"]]
    assert same == entry  # the same bytes, written a second time
    notes = Path(both["release"]["uri"].removeprefix("file://")) / "formats/notes/notes.json"
    assert set(json.loads(notes.read_text())) == {"zeros", "grid"}


@pytest.mark.parametrize(
    ("fails", "said"),
    [("late", "cannot carry this after all"), ("nothing written", "left 0 files"), ("nan", "notes_value = nan")],
)
def test_a_format_that_fails_leaves_no_release(
    spec: Callable[..., Path], methods: Methods, tmp_path: Path, tracking_uri: str, fails: str, said: str
) -> None:
    head = SPEC[: SPEC.index("  - calibrate")]
    path = spec(f"{head}  - register: release\n    formats: [{{notes: {{fails: {fails}}}}}]\n")
    with pytest.raises(StepError, match=said):
        run_locally(path, methods, Settings(tmp_path / "home", tracking_uri), Watcher())
    assert not [file for file in (tmp_path / "home").rglob("*") if file.name in ("notes.json", "release.json")]


def test_a_killed_export_leaves_nothing_and_is_done_again(
    spec: Callable[..., Path], methods: Methods, tmp_path: Path, tracking_uri: str
) -> None:
    head = SPEC[: SPEC.index("  - calibrate")]
    path = spec(f"{head}  - register: release\n    formats: [{{gguf: {{type: q4_0}}}}]\n")
    settings = Settings(tmp_path / "home", tracking_uri)
    environment = {**os.environ, "ORCHESTRATOR_HOME": str(settings.home), "MLFLOW_TRACKING_URI": tracking_uri}
    command = [sys.executable, "-m", "orchestrator", "run", str(path), "--local"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(settings.home.glob("staging/**/*.gguf")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (settings.home / "releases").exists()
    document = run_locally(path, methods, settings, Watcher()).document()
    assert "formats/gguf/model-q4_0.gguf" in {file["key"] for file in document["release"]["files"]}
    assert not list((settings.home / "staging").iterdir())


def test_planning_tells_a_format_what_the_chain_makes(
    spec: Callable[..., Path], methods: Methods, tmp_path: Path
) -> None:
    Notes.asked.clear()
    text = SPEC.replace("{gguf: {tokens: 64}}", "{notes: {}}").replace(
        "group_size: 32}", "group_size: 32}\n    skip: ['*.mlp.*']"
    )
    make_plan(spec(text), methods, tmp_path / "home")
    (facts,) = Notes.asked
    assert facts.held == {Invariant.ZEROS, Invariant.GRID}
    assert {(s.num_bits, s.group_size) for some in facts.schemes.values() for s in some} == {(4, 32)}
    assert {name.split(".")[3] for name in facts.schemes} == {"self_attn"}
    Notes.asked.clear()
    first = text[text.index("  - register") :]
    make_plan(spec(text.replace("  - prune", first + "  - prune", 1)), methods, tmp_path / "home")
    before, after = Notes.asked
    assert (before.held, before.schemes) == (frozenset(), {}) and after.schemes


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{gguf: {tokens: 64}}", "{gguf: {type: q4_k_m}}", "13: steps[3].formats[0].gguf: type q4_k_m would quantize"),
        ("{gguf: {tokens: 64}}", "{gguf: {type: q9}}", "13: steps[3].formats[0].gguf.type: "),
        ("{gguf: {tokens: 64}}", "{gguf: {}}, {gguf: {type: f16}}", 'the format "gguf" is listed twice'),
        ("{gguf: {tokens: 64}}", "{vllm: {}}", '13: steps[3].formats[0].vllm: "vllm" is no file format'),
        ("{gguf: {tokens: 64}}", "{ggfu: {}}", 'did you mean "gguf"?'),
        ("{gguf: {tokens: 64}}", "{gguf: {}, notes: {}}", "each entry of formats is one format's name"),
        ("{gguf: {tokens: 64}}", "{notes: {fails: check}}", "notes cannot carry it; use gguf"),
        ("{gguf: {tokens: 64}}", "{notes: {fails: crash}}", "Notes.check of tests 0 (plugin 'notes') failed"),
        ("register: release", "register: gguf", '"gguf" is a file format; list it under `formats:` of a register step'),
        (
            "    with: {pattern",
            "    formats: [{gguf: {}}]\n    with: {pattern",
            "`formats` means nothing to prune wanda",
        ),
    ],
)
def test_mistakes_are_told_while_planning(
    spec: Callable[..., Path], methods: Methods, old: str, new: str, said: str
) -> None:
    assert said in refusals(spec(SPEC.replace(old, new, 1)), methods)


def test_pruned_zeros_and_types_that_lose_them_are_told_while_planning(
    spec: Callable[..., Path], methods: Methods
) -> None:
    start, end = SPEC.index("  - quantize"), SPEC.index("  - register")
    text = (SPEC[:start] + SPEC[end:]).replace("tokens: 64", "type: q4_1")
    assert "in Q4_1, which does not keep the zeros that pruning made" in refusals(spec(text), methods)


def fingerprint(plan: Plan) -> str:
    return plan.steps[-1].fingerprint


def test_the_fingerprint_knows_format_parameters_libraries_and_seed(
    spec: Callable[..., Path], methods: Methods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(text: str = SPEC) -> str:
        return fingerprint(make_plan(spec(text), methods, tmp_path / "home"))

    assert planned() == planned()
    others = [SPEC.replace("tokens: 64", "tokens: 65"), SPEC.replace("seed: 0", "seed: 1")]
    others.append(SPEC.replace("    formats: [{gguf: {tokens: 64}}]\n", ""))
    version = importlib.metadata.version
    found = {planned(text) for text in others}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9" if name == "xllamacpp" else version(name))
    assert len({*found, planned(SPEC)}) == 4


def test_what_a_format_takes_is_foreseen(spec: Callable[..., Path], methods: Methods, tmp_path: Path) -> None:
    def estimate(text: str) -> Any:
        plan = make_plan(spec(text), methods, tmp_path / "home")
        return foresee(plan, tmp_path / "home", [None] * len(plan.steps))[-1].work

    with_format, without = estimate(SPEC), estimate(SPEC.replace("    formats: [{gguf: {tokens: 64}}]\n", ""))
    weights = Checkpoint(MODEL).weight_bytes()
    assert with_format.memory_bytes - without.memory_bytes > 2 * weights  # float32
    assert with_format.scratch_bytes - without.scratch_bytes > weights / 2


def test_planning_with_a_format_imports_no_torch(spec: Callable[..., Path], tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from orchestrator.plan import make_plan
from orchestrator.plugins import discover
make_plan(Path(sys.argv[1]), discover(), Path(sys.argv[2]))
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, spec(), tmp_path / "home"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"


def test_a_link_is_no_file_of_a_release(tmp_path: Path) -> None:
    class Linking(Notes):
        def write(
            self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
        ) -> Mapping[str, float]:
            (folder / "model").symlink_to(model.path / "config.json")
            return {}

    model = Checkpoint(MODEL)
    with pytest.raises(StepError, match="something that is no plain file"):
        write_formats([Linking()], model, tmp_path / "bundle", {}, Context(0, model, None, tmp_path / "scratch"))
