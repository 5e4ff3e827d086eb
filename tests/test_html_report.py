"""The page of a run: its numbers are the artifacts', its text is only text, and it fits a phone."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.artifact import ArtifactStore
from orchestrator.cli_report import view_of
from orchestrator.errors import GateError, SpecError
from orchestrator.home import Settings
from orchestrator.html_report import comparison_page, read_run, report_path, run_page, verdict, write_run_report
from orchestrator.html_report.charts import MOST_POINTS, error_range, heat_map, level_of, scale_bar, thinned, ticks
from orchestrator.html_report.facts import RunView, StepView
from orchestrator.html_report.findings import MEASURED_ON, Gate, group_of, verdict_of
from orchestrator.html_report.layers import LayerCell, LayerMap, split_layer
from orchestrator.html_report.markup import element
from orchestrator.html_report.page import tiles
from orchestrator.html_report.palette import DARK, DASHES, LEVELS, LIGHT, SERIES
from orchestrator.journal import Journal
from orchestrator.plan import Plan, Step
from orchestrator.plugins import discover
from orchestrator.report import metric_rows, shown
from orchestrator.run import Execution, run_locally
from orchestrator.tracking import connect
from tests.chromium import look, measured, needs_chromium, probed
from tests.tiny import make_model

CHAIN = """\
version: 1
name: paged
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
    with: {source: valid.txt, length_tokens: 32, windows: 16}
    require: {perplexity_ratio: {max: 30.0, confidence: 0.95}, perplexity: {min: 1.0}}
  - validate: fidelity
    with: {source: valid.txt, length_tokens: 32, windows: 16}
  - register: release
    with: {alias: candidate}
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 32}}, {sglang: {gpu_memory_gib: 8, max_model_len: 32}}]
"""
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "nav", "h1", "h2", "h3",
    "p", "ul", "ol", "li", "a", "div", "span", "strong", "code", "data", "time", "table", "caption", "thead", "tbody",
    "tr", "th", "td", "dl", "dt", "dd", "details", "summary", "figure", "figcaption", "wbr", "br",
    "svg", "defs", "pattern", "rect", "line", "polyline", "path", "circle", "text",
}  # fmt: skip
VOID = {"meta", "wbr", "br"}
HOSTILE = "<script>alert('x')</script>\"'&{{7*7}}\u202e<img src=x onerror=alert(1)>"


class Watcher:
    """Keeps what a run said; `on_last` is called when its last step has finished."""

    def __init__(self, on_last: Any = None) -> None:
        self.notes: list[str] = []
        self.made: dict[str, Path] = {}
        self.on_last = on_last

    def run_started(self, run_id: str, plan: Plan) -> None:
        self.run_id, self.steps = run_id, len(plan.steps)

    def step_started(self, step: Step) -> None: ...

    def step_progress(self, step: Step, fraction: float, message: str) -> None: ...

    def step_finished(self, step: Step, outcome: Any) -> None:
        self.made[step.method.name] = outcome.path
        if self.on_last and step.index == self.steps - 1:
            self.on_last()

    def note(self, message: str) -> None:
        self.notes.append(message)


@dataclass
class Row:
    """A row of a table: its section, its first cell, the whole values of its numbers and what is shown of them."""

    section: str
    head: str = ""
    values: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    everything: str = ""


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, and known."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[Row] = []
        self.text: list[str] = []
        self.section = ""
        self._in_row = self._in_head = self._in_data = False
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)
        given = dict(attrs)
        if tag == "section":
            self.section = given["id"] or ""
        if tag == "tr":
            self._in_row = True
            self.rows.append(Row(self.section))
        if tag == "th" and given.get("scope") == "row":
            self._in_head = True
        if tag == "data" and self._in_row:
            self._in_data = True
            self.rows[-1].values.append(float(given["value"] or "nan"))
            self.rows[-1].texts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        if tag == "tr":
            self._in_row = False
        if tag == "th":
            self._in_head = False
        if tag == "data":
            self._in_data = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._in_row:
            self.rows[-1].everything += data
            if self._in_head:
                self.rows[-1].head += data
            if self._in_data:
                self.rows[-1].texts[-1] += data

    @property
    def words(self) -> str:
        """All text."""
        return " ".join("".join(self.text).split())

    def within(self, section: str) -> list[Row]:
        """The rows of a section that name something."""
        return [row for row in self.rows if row.section == section and row.head]


@dataclass
class Runs:
    """Runs in one home: `whole` met its gates; `other` has another grid; `refused` did not meet a bound."""

    folder: Path
    settings: Settings
    whole: Execution
    other: Execution
    refused: str
    watcher: Watcher

    def page(self, run_id: str | None = None) -> str:
        return report_path(self.settings.home, run_id or self.whole.run_id).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tracking_uri: str) -> Runs:
    folder = tmp_path_factory.mktemp("report")
    make_model(folder / "model", layers=2)
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 100, encoding="utf-8")
    (folder / "valid.txt").write_text("seven wizards judge a model, layer by layer. " * 100, encoding="utf-8")
    settings = Settings(folder / "home", tracking_uri)

    def run(text: str, watcher: Watcher) -> Execution:
        (folder / "spec.yaml").write_text(text, encoding="utf-8")
        return run_locally(folder / "spec.yaml", discover(), settings, watcher)

    watcher = Watcher()
    whole = run(CHAIN, watcher)
    other = run(CHAIN.replace("num_bits: 4", "num_bits: 8").replace("name: paged", "name: paged-8"), Watcher())
    strict = Watcher()
    with pytest.raises(GateError):
        run(CHAIN.replace("min: 1.0", "min: 1000000.0"), strict)
    return Runs(folder, settings, whole, other, strict.run_id, watcher)


def artifact_of(runs: Runs, method: str, run: Execution | None = None) -> Any:
    outcomes = (run or runs.whole).outcomes.values()
    digest = next(outcome.digest for outcome in outcomes if outcome.method == method)
    return ArtifactStore(runs.settings.home).find(digest)


def test_what_was_measured_is_what_the_artifacts_say(runs: Runs) -> None:
    page = Page(runs.page())
    rows = {row.head.replace(" ", "_"): row for row in page.within("measured")}
    expected = metric_rows(outcome.as_dict() for outcome in runs.whole.outcomes.values())
    intervals = {
        name: ends
        for method in ("perplexity", "fidelity")
        for name, ends in json.loads((artifact_of(runs, method).path / "intervals.json").read_text()).items()
    }
    assert set(rows) == {row.name for row in expected} and len(expected) > 5
    for row in expected:
        numbers = [value for value in (row.dense, row.compressed, row.ratio) if value is not None]
        assert rows[row.name].values == [*numbers, *intervals.get(row.name, ())], row.name
        named = [shown(row.name, value) for value in (row.dense, row.compressed) if value is not None]
        assert rows[row.name].texts[: len(named)] == named
    assert "perplexity" in intervals and "kl_mean" in intervals


def test_gates_show_bound_value_interval_and_margin(runs: Runs) -> None:
    rows = Page(runs.page()).within("gates")
    results = [gate for outcome in runs.whole.outcomes.values() for gate in outcome.gates]
    assert len(results) == len(rows) == 2
    for row, gate in zip(rows, results, strict=True):
        worst = gate.value if gate.interval is None else gate.interval[1 if gate.bound == "max" else 0]
        margin = gate.limit - worst if gate.bound == "max" else worst - gate.limit
        assert row.values == [gate.limit, gate.value, *(gate.interval or ()), margin, margin / abs(gate.limit)]
        assert gate.metric in row.head and "pass" in row.everything and "fail" not in row.everything
    assert results[0].interval is not None and results[1].interval is None
    assert "Gates passed" in Page(runs.page()).words


def test_every_layer_and_the_worst_of_them(runs: Runs) -> None:
    page = Page(runs.page())
    layers = json.loads((artifact_of(runs, "gptq").path / "layers.json").read_text(encoding="utf-8"))
    errors = {name: values["relative_proxy_loss"] for name, values in layers.items()}
    rows = [row for row in page.within("layers") if row.values and row.values[0] in errors.values()]
    listed = {row.head: row.values[0] for row in rows}
    assert listed == errors and len(errors) == 14
    assert [row.head for row in rows][:8] == sorted(errors, key=lambda name: -errors[name])[:8]
    means = {row.head: row.values[0] for row in page.within("layers") if row.head.startswith("block ")}
    of_block = [value for name, value in errors.items() if ".layers.1." in name]
    assert means["block 1"] == pytest.approx(math.fsum(of_block) / 7, rel=1e-15)
    titles = [text for text in page.text if text.startswith("block 0, mlp.down_proj: ")]
    assert any(f"{errors['model.layers.0.mlp.down_proj']:.4g}" in title for title in titles)


def test_lineage_serving_and_release_are_those_of_the_run(runs: Runs) -> None:
    page = Page(runs.page())
    steps = {row.head: row for row in page.within("lineage") if ". " in row.head}
    events = [e for e in Journal(runs.settings.home, runs.whole.run_id).events() if e["event"] == "step finished"]
    assert len(steps) == len(events) == 7
    for row, event in zip(steps.values(), events, strict=True):
        pairs = [(event[name], event["predicted"][name]) for name in ("seconds", "peak_memory_bytes", "disk_bytes")]
        assert row.values == [number for pair in pairs for number in pair]
        assert event["digest"][:12] in row.everything and "computed" in row.everything
    release = runs.whole.release
    assert release is not None
    for entry in release["files"]:
        assert entry["sha256"] in page.words and entry["key"] in page.words
    assert release["digest"] in page.words and release["uri"] in page.words
    plans = {row.head.partition(" ")[0]: row for row in page.within("serving")}
    for engine in ("vllm", "sglang"):
        written = Path(release["uri"].removeprefix("file://"), "serving", engine, "kv-plan.json")
        plan = json.loads(written.read_text(encoding="utf-8"))
        names = ("kv_tokens", "max_concurrency", "max_model_len", "bytes_per_token", "num_blocks", "weight_bytes")
        assert plans[engine].values == [plan[name] for name in (*names, "memory_bytes")]
        assert plan["element_dtype"] in plans[engine].everything


def test_curves_are_drawn_between_their_ends(runs: Runs) -> None:
    curves = json.loads((artifact_of(runs, "logits").path / "curves.json").read_text(encoding="utf-8"))
    labels = [value for tag, name, value in Page(runs.page()).attributes if (tag, name) == ("svg", "aria-label")]
    for name, points in curves.items():
        ends = f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        assert any(label and ends in label for label in labels), ends


def test_it_is_kept_in_mlflow_and_named_by_the_run(runs: Runs, tmp_path: Path) -> None:
    run = runs.whole.record.mlflow_run
    assert run is not None
    client = connect(runs.settings.tracking_uri)
    kept = client.download_artifacts(run, "report.html", str(tmp_path))
    assert Path(kept).read_text(encoding="utf-8") == runs.page()
    assert runs.whole.document()["report"] == str(report_path(runs.settings.home, runs.whole.run_id))
    assert not [note for note in runs.watcher.notes if "report" in note]


def test_same_run_same_bytes_in_any_process(runs: Runs) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.html_report import read_run, run_page\n"
        "sys.stdout.write(run_page(read_run(Path(sys.argv[1]), sys.argv[2])))\n"
        "assert not {'torch', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(runs.settings.home), runs.whole.run_id]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "PYTHONUTF8": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == runs.page()


def test_a_refused_run_has_its_page_with_the_number(runs: Runs) -> None:
    html = runs.page(runs.refused)
    page = Page(html)
    assert verdict(read_run(runs.settings.home, runs.refused)) == "refused"
    assert "Refused by a gate" in page.words and "perplexity is" in page.words
    failed = [row for row in page.within("gates") if "fail" in row.everything]
    value = artifact_of(runs, "perplexity").metrics["perplexity"]
    assert [row.values for row in failed] == [[1e6, value, value - 1e6, (value - 1e6) / 1e6]]
    assert "6. validate fidelity" in page.words and "not run" in page.words
    assert "No release: register release has not run." in page.words


def test_a_step_that_failed_and_a_run_that_was_killed(runs: Runs, tmp_path: Path) -> None:
    journal = tmp_path / "runs"
    journal.mkdir()
    lines = (runs.settings.home / "runs" / f"{runs.whole.run_id}.jsonl").read_text(encoding="utf-8").splitlines()
    (journal / "killed.jsonl").write_text("\n".join(lines[:2]) + '\n{"event": "step fi', encoding="utf-8")
    failed = {"event": "step failed", "step": 1, "time": 1.0, "error": "prune wanda failed: OutOfMemory"}
    failed["error"] += " at postgresql://me:secret@host/db"
    ended = {"event": "run failed", "kind": "StepError", "time": 2.0, "error": "spec.yaml:7: prune wanda failed"}
    text = "\n".join([lines[0], json.dumps(failed), json.dumps(ended)])
    (journal / "failed.jsonl").write_text(text, encoding="utf-8")
    killed, broken = (read_run(tmp_path, name) for name in ("killed", "failed"))
    assert (verdict(killed), verdict(broken)) == ("unfinished", "failed")
    assert "still at work in step 1, calibrate text, or was killed there" in Page(run_page(killed)).words
    assert "1 unfinished, 6 not run" in Page(run_page(killed)).words
    words = Page(run_page(broken)).words
    assert "prune wanda failed: OutOfMemory" in words and "not measured" in words and "secret" not in words
    with pytest.raises(SpecError):
        read_run(tmp_path, "../runs/failed")


def test_two_runs_side_by_side(runs: Runs) -> None:
    views = [read_run(runs.settings.home, run.run_id) for run in (runs.whole, runs.other)]
    page = Page(comparison_page(*views))
    values = [artifact_of(runs, "perplexity", run).metrics for run in (runs.whole, runs.other)]
    row = next(row for row in page.within("measured") if row.head == "perplexity")
    a, b = (one["perplexity"] for one in values)
    assert row.values[:5] == [values[0]["dense_perplexity"], values[1]["dense_perplexity"], a, b, b / a]
    differences = {row.everything for row in page.within("differences")}
    assert any("num_bits48" in text for text in differences)
    assert not any("sparsity" in text for text in differences)
    changed = [row for row in page.within("layers") if len(row.values) == 3]
    layers = [
        json.loads((artifact_of(runs, "gptq", run).path / "layers.json").read_text())
        for run in (runs.whole, runs.other)
    ]
    for row in changed:
        one, two = (found[row.head]["relative_proxy_loss"] for found in layers)
        if row.values[0] == one:
            assert row.values == [one, two, two / one]
    assert any(row.head in layers[0] for row in changed)
    assert page.tags <= TAGS
    same = Page(comparison_page(views[0], views[0])).words
    assert "Nothing that is recorded" in same and "No layer's error differs." in same


def test_references(runs: Runs, tmp_path: Path) -> None:
    home, run = runs.settings.home, runs.whole.run_id
    model = artifact_of(runs, "gptq")
    shared = artifact_of(runs, "wanda")  # the last run that had it as a step
    assert view_of(run, runs.settings).run == run
    assert view_of(model.digest[:10], runs.settings).title == "paged"
    assert view_of(str(model.path), runs.settings).title == "paged"
    assert view_of(shared.digest, runs.settings).run == runs.refused
    registered = view_of("models:/paged-8@candidate", runs.settings)
    assert registered.run == runs.other.run_id
    with pytest.raises(SpecError):
        view_of("0000000000", runs.settings)
    bare = tmp_path / "bare"  # artifacts without the journals: lineage alone
    bare.mkdir()
    for name in ("artifacts", "steps"):
        (bare / name).symlink_to(home / name)
    view = view_of(model.digest, Settings(bare, runs.settings.tracking_uri))
    assert view.run is None and [step.method for step in view.steps] == ["text", "wanda", "logits", "gptq"]
    words = Page(run_page(view)).words
    assert "no run that made them is known" in words and "Which bounds were demanded is not recorded" in words


def test_the_command(runs: Runs, tmp_path: Path) -> None:
    environment = {**os.environ, "ORCHESTRATOR_HOME": str(runs.settings.home)}
    environment["MLFLOW_TRACKING_URI"] = runs.settings.tracking_uri

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator", "report", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    both = call(runs.whole.run_id, runs.other.run_id, "--json", "--output", str(tmp_path / "both.html"))
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == {
        "report": str(tmp_path / "both.html"),
        "runs": [
            {"run": runs.whole.run_id, "pipeline": "paged", "verdict": "passed"},
            {"run": runs.other.run_id, "pipeline": "paged-8", "verdict": "passed"},
        ],
    }
    assert (tmp_path / "both.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    printed = call(runs.whole.run_id, "--output", "-")
    assert printed.stdout == runs.page() and printed.stderr == ""
    journal = call(str(runs.settings.home / "runs" / f"{runs.whole.run_id}.jsonl"), "--output", "-")
    assert journal.stdout == runs.page() and journal.stderr == ""
    (tmp_path / "lines.jsonl").write_text("{}\n", encoding="utf-8")
    for refused, why in (
        (call(runs.whole.run_id, "--json", "--output", "-"), "both want stdout"),
        (call(str(tmp_path / "lines.jsonl")), "is no journal"),
    ):
        assert refused.returncode == 2 and why in refused.stderr and refused.stdout == ""
    unknown = call("20200101-000000-abcdef")
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr
    unwritable = call(runs.whole.run_id, "--output", "/proc/report.html")
    assert unwritable.returncode == 3 and "cannot be written" in unwritable.stderr


def test_a_run_ends_whatever_becomes_of_its_artifacts(runs: Runs, tmp_path: Path) -> None:
    """Folders are damaged between the last step and the page; then the page itself cannot be written."""
    home = tmp_path / "home"
    shutil.copytree(runs.settings.home, home)
    settings = Settings(home, runs.settings.tracking_uri)
    spec = runs.folder / "again.yaml"
    spec.write_text(CHAIN, encoding="utf-8")

    def damage() -> None:
        folders = watcher.made
        shutil.rmtree(folders["text"])
        (folders["wanda"] / "layers.json").write_bytes(b"\xff{")
        (folders["logits"] / "curves.json").unlink()
        (folders["gptq"] / "layers.json").write_text('{"changed": {}}', encoding="utf-8")
        (folders["perplexity"] / "manifest.json").write_text("{", encoding="utf-8")
        (folders["release"] / "published.json").unlink()

    watcher = Watcher(damage)
    execution = run_locally(spec, discover(), settings, watcher)
    page = Page(report_path(home, execution.run_id).read_text(encoding="utf-8"))
    assert not [note for note in watcher.notes if "report" in note]
    for sentence in (
        "prune wanda: layers.json is not what the step wrote",
        "distill logits: curves.json cannot be read",
        "quantize gptq: layers.json is not what the step wrote",
        "calibrate text: artifact",
        "No release: published.json cannot be read",
    ):
        assert sentence in page.words, (sentence, watcher.notes)
    assert "8. " not in page.words and page.tags <= TAGS
    before = page.words
    kept = subprocess.run(
        [sys.executable, "-m", "orchestrator", "report", execution.run_id],
        env={**os.environ, "ORCHESTRATOR_HOME": str(home)}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "kept as it was" in kept.stderr
    assert Page(report_path(home, execution.run_id).read_text(encoding="utf-8")).words == before


def test_a_page_that_cannot_be_written_is_a_note(runs: Runs) -> None:
    spec = runs.folder / "again.yaml"
    spec.write_text(CHAIN, encoding="utf-8")
    watcher = Watcher(lambda: report_path(runs.settings.home, watcher.run_id).mkdir())
    execution = run_locally(spec, discover(), runs.settings, watcher)
    assert [note for note in watcher.notes if note.startswith("the report of this run is not whole")]
    assert Journal(runs.settings.home, execution.run_id).events()[-1]["event"] == "run finished"
    report_path(runs.settings.home, execution.run_id).rmdir()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a run whose every name is an attack, of a model of 80 blocks with all that can go wrong."""
    home = tmp_path_factory.mktemp("hostile")
    store = ArtifactStore(home)
    roles = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    roles += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    troubles = ("fallback_rtn", "damping_raised", "dead_inputs", "unseen_experts")
    layers: dict[str, dict[str, float]] = {
        f"model.layers.{block}.{role}": {
            "relative_proxy_loss": 1e-4 * 1.05 ** (block + at),
            **({troubles[block % 4]: 1.0} if (block + at) % 5 == 0 else {}),
        }
        for block in range(80)
        for at, role in enumerate(roles)
    }
    layers[f"model.layers.3.{HOSTILE}"] = {"relative_proxy_loss": 0.5, "dead_inputs": 2.0}
    layers[HOSTILE] = {"relative_proxy_loss": 0.0}
    facts: dict[str, Any] = {
        "kind": "report",
        "inputs": {HOSTILE: HOSTILE},
        "invariants": {HOSTILE: HOSTILE},
        "metrics": {HOSTILE: 1.5, f"dense_{HOSTILE}": 1.25, f"{HOSTILE}_ratio": 1.2, "peak_memory_bytes": 5},
        "identity": {
            "parameters": {HOSTILE: HOSTILE, "list": [HOSTILE]},
            "environment": {HOSTILE: HOSTILE},
            "plugin": {"distribution": HOSTILE, "version": HOSTILE, "source": HOSTILE},
            "core": HOSTILE,
        },
    }
    curves = {HOSTILE: [[0, 1.0], [1, 2.0]], "flat": [[0, 1.0]], "long": [[at, math.sin(at)] for at in range(5000)]}
    journal = Journal(home, "attack")
    gate = {"metric": HOSTILE, "bound": "max", "limit": 1.0, "value": 1.5, "interval": [1.0, 2.0], "confidence": 0.95}
    gate |= {"passed": False, "what": HOSTILE}
    names = [("quantize", "first"), ("prune", "second"), ("validate", HOSTILE)]
    steps = [
        {"stage": stage, "method": method, "fingerprint": f"{at:064x}"} for at, (stage, method) in enumerate(names)
    ]
    journal.write(
        "run started", pipeline=HOSTILE, spec=HOSTILE, engine=HOSTILE, machine={HOSTILE: HOSTILE}, steps=steps
    )
    for index, step in enumerate(steps):
        folder = store.stage(step["fingerprint"])
        (folder / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
        if step["stage"] != "validate":
            (folder / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
        made = {**facts, "stage": step["stage"], "method": step["method"]}
        artifact = store.commit(step["fingerprint"], folder, made, seconds=1.0, peak_memory_bytes=1)
        journal.write("step finished", step=index, digest=artifact.digest, cached=False, gates=[gate])
    journal.write("run failed", kind="GateError", error=f"{HOSTILE} at postgresql://me:secret@host/db")
    return home


def test_names_are_only_text(hostile: Path) -> None:
    view = read_run(hostile, "attack")
    for html in (run_page(view), comparison_page(view, view)):
        page = Page(html)
        assert page.tags <= TAGS, page.tags - TAGS
        assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
        assert not [value for _, name, value in page.attributes if name == "href" and not str(value).startswith("#")]
        assert "<script>alert('x')</script>" in page.words  # said, not done
        assert "\u202e" not in html and "secret" not in html and "http" not in html.replace("http-equiv", "")
    policy = [value for tag, name, value in Page(run_page(view)).attributes if (tag, name) == ("meta", "content")]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy


def test_a_model_of_eighty_blocks_is_below_a_megabyte(hostile: Path) -> None:
    write_run_report(hostile, "attack")
    assert report_path(hostile, "attack").stat().st_size < 1_000_000


def test_marks_say_what_happened(hostile: Path) -> None:
    page = Page(run_page(read_run(hostile, "attack")))
    marked = [
        value for tag, name, value in page.attributes if (tag, name) == ("path", "class") and "mark" in str(value)
    ]
    assert len(marked) > 2 * 100
    rows = [row for row in page.within("troubles") if row.head == "fell back to rounding to nearest"]
    assert [row.values for row in rows] == [[28.0], [28.0]]


def test_headings_tables_and_pictures_have_names(runs: Runs) -> None:
    html = runs.page()
    page = Page(html)
    assert html.count("<h1>") == 1 and '<html lang="en">' in html
    assert html.count("<table>") == html.count("<caption>") > 5
    scopes = [value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")]
    assert len(scopes) == html.count("<th ") and set(scopes) == {"col", "row"}
    for opening in html.split("<svg")[1:]:
        attributes = opening.partition(">")[0]
        assert "aria-hidden" in attributes or ('role="img"' in attributes and "aria-label" in attributes)
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert {str(value)[1:] for _, name, value in page.attributes if name == "href"} <= anchors


# Colours. sRGB to linear light: IEC 61966-2-1. Dichromats: Vienot, Brettel and Mollon 1999, "Digital video
# colourmaps for checking the legibility of displays by dichromats", in linear RGB. CIELAB for D65.
_DICHROMATS = {
    "all cones": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deuteranopia": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


def linear(colour: str) -> list[float]:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, two: str) -> float:
    """WCAG 2.2, contrast ratio."""
    high, low = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (one, two))), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, seen: str) -> list[float]:
    matrix = _DICHROMATS[seen]
    rgb = [sum(a * b for a, b in zip(row, linear(colour), strict=True)) for row in matrix]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) / w for row, w in zip(to_xyz, white, strict=True)]
    f = [value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in xyz]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def distance(one: str, two: str, seen: str) -> float:
    return math.dist(lab(one, seen), lab(two, seen))


@pytest.mark.parametrize("seen", _DICHROMATS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_survive_colour_blindness(theme: Mapping[str, str], seen: str) -> None:
    """2.3 in CIELAB is just noticeable; neighbours of the scale are 4 times that, lines and verdicts more."""
    heat = [theme[f"heat-{level}"] for level in range(LEVELS)]
    lightness = [lab(colour, seen)[0] for colour in heat]
    assert lightness in (sorted(lightness), sorted(lightness, reverse=True))
    for one, two in itertools.pairwise(heat):
        assert distance(one, two, seen) > 9
    assert distance(theme["pass"], theme["fail"], seen) > 25
    assert distance(theme["series-0"], theme["series-1"], seen) > 25  # dense and compressed
    for one in range(SERIES):
        for two in range(one):  # dashes differ as well
            assert distance(theme[f"series-{one}"], theme[f"series-{two}"], seen) > 9


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: Mapping[str, str]) -> None:
    for ground in ("ground", "panel"):
        for name in ("ink", "quiet", "link", "pass", "fail"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    for at in range(SERIES):  # graphics: 3 is enough (WCAG 1.4.11)
        assert contrast(theme[f"series-{at}"], theme["ground"]) >= 3
    for level in range(LEVELS):
        assert contrast(theme[f"mark-{level}"], theme[f"heat-{level}"]) >= 3, level
    assert len(set(DASHES)) == SERIES


def test_charts_draw_what_they_are_given() -> None:
    assert ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0] and ticks(3.0, 3.0) == [3.0]
    assert ticks(0.13, 0.87) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    points = [(float(at), 0.0) for at in range(1001)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 1 and (kept[0], kept[-1]) == (points[0], points[-1])
    levels = [level_of(1e-4 * 10 ** (at / 10), 1e-4, 1e-2) for at in range(21)]
    assert levels == sorted(levels) and (levels[0], levels[-1]) == (0, LEVELS - 1)  # type: ignore[type-var]
    assert level_of(None, 1, 2) is None and level_of(5.0, 5.0, 5.0) == 0


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ((1e-3, 1e-3), (1e-4, 1e-2)),
        ((1.0, 4.0), (0.2, 20.0)),
        ((1e-5, 1.0), (1e-5, 1.0)),
        ((5e-324, 1e308), (5e-324, 1e308)),
    ],
)
def test_a_scale_does_not_exaggerate(errors: tuple[float, float], ends: tuple[float, float]) -> None:
    """It spans two decades at least, what is measured in their middle."""
    cells = {(at, "q"): LayerCell(at, "q", error, "q", 1, {}) for at, error in enumerate(errors)}
    step = StepView(0, "quantize", "gptq", "computed", "")
    layers = LayerMap(step, "relative_proxy_loss", [0, 1], ["q"], cells, {})
    found = error_range([layers])
    assert found is not None and found == pytest.approx(ends)
    assert "colour scale" in scale_bar(*found) and "block 1, q" in heat_map(layers, *found)


def gate(metric: str, bound: str, passed: bool | None, value: float | None = 5.0, limit: float = 10.0) -> Gate:
    ends = None if value is None else (value - 1, value + 1)
    return Gate("validate perplexity", metric, bound, limit, value, ends, None if value is None else 0.95, passed)


def test_a_verdict_names_every_metric_once_with_its_bounds() -> None:
    gates = [
        gate("perplexity.code", "max", False, 30.0),
        gate("perplexity.code", "retain", False, 0.5, 0.95),
        gate("perplexity.code", "must_not_fall", False),
        gate("perplexity.code", "min", True),
        gate("accuracy", "min", False, 1.0),
        gate("kl_p99", "max", None, None),
    ]
    run = RunView("run", "run", "failed", None, None, None, {}, [], refused=True)
    assert verdict_of(run, gates).sentence == (
        "4 of 6 gates not met: perplexity.code (at most 10; retains at least 0.95; not worse than dense), "
        "accuracy (at least 10); 1 more not measured"
    )
    assert [gate.sure for gate in gates[1:3]] == [" with 95 % confidence", " beyond chance, 95 % confidence"]
    missed, met = (Page(str(tiles([], some))).words for some in (gates, [gate("perplexity.code", "max", True)]))
    assert "1 of 6" in missed and "4 not met, 1 not measured" in missed
    assert "worst: perplexity.code, 210 % beyond its bound" in missed
    assert "closest: perplexity.code, 40.0 % inside its bound" in met


def test_tiers_stand_beside_their_dense_model() -> None:
    metrics = {"perplexity.code": 12.0, "dense_perplexity.code": 10.0, "perplexity_ratio.code": 1.2}
    metrics |= {"cache_bytes_ratio": 0.25, "tokens_per_second.b8": 5.0}
    rows = metric_rows([{"stage": "validate", "metrics": metrics}])
    assert [(row.name, row.dense, row.compressed, row.ratio) for row in rows] == [
        ("perplexity.code", 10.0, 12.0, 1.2),
        ("cache_bytes_ratio", None, 0.25, None),
        ("tokens_per_second.b8", None, 5.0, None),
    ]
    assert (shown("cache_bytes_ratio", 0.25), shown("cache_bytes", 2048)) == ("0.25", "2.00 KiB")


def test_names_of_layers_and_metrics_are_taken_apart() -> None:
    assert split_layer("model.layers.12.mlp.experts.7.w1") == (12, "mlp.experts.*.w1")
    assert split_layer("transformer.h.3.attn.c_attn") == (3, "attn.c_attn")
    assert split_layer("lm_head") == (-1, "lm_head")
    groups = [
        group_of(n)
        for n in (
            "perplexity.code",
            "weight_bytes",
            "tokens_per_second",
            "load_seconds",
            "p50_ms.b8",
            "p50_latency_seconds.batch_8",
            "perplexity_tokens.code",
            "calibration_overlap.wiki",
            "questions",
        )
    ]
    assert groups == ["Quality", "Size", "Speed", "Speed", "Speed", "Speed", *[MEASURED_ON] * 3]
    assert element("p", "<&", title='"') == '<p title="&quot;">&lt;&amp;</p>'


@pytest.fixture
def pages(runs: Runs, hostile: Path, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Pages to be opened, in folders of their own."""
    attack = read_run(hostile, "attack")
    whole, other = (read_run(runs.settings.home, run.run_id) for run in (runs.whole, runs.other))
    texts = {"run": run_page(whole), "attack": run_page(attack), "both": comparison_page(whole, other)}
    found = {}
    for name, text in texts.items():
        found[name] = tmp_path / f"{name}.html"
        found[name].write_text(text, encoding="utf-8")
    yield found


@needs_chromium
def test_in_a_browser(pages: dict[str, Path], tmp_path: Path) -> None:
    """No complaint, nothing beyond the edge of a phone, and something to see in either light."""
    from PIL import Image

    for name, page in pages.items():
        narrow = tmp_path / f"{name}-narrow.html"
        narrow.write_text(probed(page.read_text(encoding="utf-8"), 390), encoding="utf-8")
        found = measured(look(narrow, 900))
        assert (found.window, found.page, found.beyond, found.cut) == (390, 390, [], 0), name
        assert found.boxes > 0 and found.height > 1500  # tables scroll inside their boxes
        assert found.seen == found.cells > 0
    grounds = []
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        seen = look(pages["attack"], 1280, dark=dark, picture=picture)
        assert seen.complaints == []
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 100
        grounds.append("#{:02x}{:02x}{:02x}".format(*max(colours)[1]))
    assert grounds == [LIGHT["ground"], DARK["ground"]]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a model of 300 blocks."""
    home = tmp_path_factory.mktemp("deep")
    store, journal = ArtifactStore(home), Journal(home, "deep")
    layers = {
        f"model.layers.{block}.{role}": {"relative_proxy_loss": 1e-3 * 1.01**block}
        for block in range(300)
        for role in ("self_attn.q_proj", "mlp.experts.0.gate_proj")
    }
    folder = store.stage("f" * 64)
    (folder / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
    facts = {"kind": "model", "stage": "quantize", "method": "gptq", "inputs": {}, "invariants": {}, "metrics": {}}
    made = store.commit("f" * 64, folder, {**facts, "identity": {}}, seconds=1.0, peak_memory_bytes=1)
    journal.write("run started", pipeline="deep", steps=[{"stage": "quantize", "method": "gptq"}])
    journal.write("step finished", step=0, digest=made.digest, cached=False)
    return run_page(read_run(home, "deep"))


@needs_chromium
@pytest.mark.parametrize(("width", "paper", "roles"), [(1200, False, 4), (390, False, 15), (718, True, 15)])
def test_every_block_is_in_sight(deep: str, tmp_path: Path, width: int, paper: bool, roles: int) -> None:
    """On a desk, where four bands make a line with its roles named once; on a phone; and on paper, A4."""
    page = tmp_path / "deep.html"
    page.write_text(probed(deep, width, paper=paper), encoding="utf-8")
    found = measured(look(page, 1300))
    assert (found.page, found.beyond, found.seen, found.cells, found.roles) == (width, [], 600, 600, roles)
    table = 0.93 if width < 600 else 1.0  # a phone's are smaller
    relative = {"body": 1.0, "h2": 1.27} | dict.fromkeys(("caption", "thead th", "code"), 0.87 * table)
    assert {name: size / found.fonts["body"] for name, size in found.fonts.items()} == pytest.approx(relative, rel=0.01)
    assert found.fonts["body"] == (11 if paper else 15)


@needs_chromium
def test_gates_are_whole_on_a_small_screen(runs: Runs, tmp_path: Path) -> None:
    for width in (390, 700, 1000):
        page = tmp_path / f"{width}.html"
        page.write_text(probed(runs.page(runs.refused), width), encoding="utf-8")
        found = measured(look(page, 1300))
        assert (found.page, found.cut) == (width, 0)


@needs_chromium
def test_the_browser_would_complain(pages: dict[str, Path], tmp_path: Path) -> None:
    """What the test above does not find is there to be found: the page's policy stops scripts, and says so."""
    bad = tmp_path / "bad.html"
    text = pages["run"].read_text(encoding="utf-8").replace("</body>", "<script>document.title='x'</script></body>")
    bad.write_text(text, encoding="utf-8")
    seen = look(bad, 800, picture=tmp_path / "bad.png")
    assert any("Content Security Policy" in line for line in seen.complaints)
