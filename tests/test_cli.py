"""The command line as scripts and people meet it: exit codes, stdout, stderr. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator import cli
from tests.tiny import make_model

SPEC = """\
version: 1
name: cli
model: {id: model}
steps:
  - prune: magnitude
    with: {sparsity: 0.5}
  - quantize: rtn
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: text.txt, length_tokens: 32, windows: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 100, encoding="utf-8")
    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path, tracking_uri: str) -> dict[str, str]:
    return {**os.environ, "ORCHESTRATOR_HOME": str(folder / "home"), "MLFLOW_TRACKING_URI": tracking_uri}


def call(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def first_run(folder: Path, environment: dict[str, str]) -> Any:
    done = call(environment, "run", folder / "spec.yaml", "--local", "--json")
    assert done.returncode == 0, done.stderr
    return done


def test_the_surface_is_frozen() -> None:
    """Scripts rely on these; a new option belongs into a specification, not here."""
    commands: Any = typer.main.get_command(cli.app)
    surface = {
        name: sorted(parameter.metavar or parameter.opts[0] for parameter in command.params)
        for name, command in commands.commands.items()
    }
    assert surface == {
        "quickstart": ["--json", "--local"],
        "run": ["--json", "--local", "SPEC"],
        "plan": ["--json", "SPEC"],
        "methods": ["--json", "name"],
        "show": ["--json", "REF"],
        "report": ["--json", "FILE", "OTHER", "REF"],
        "pull": ["--json", "--verify-key", "DIR", "URI"],
        "serve-config": [
            "--engine",
            "--explain",
            "--gpu-memory-gib",
            "--json",
            "--max-model-len",
            "--weight-bytes",
            "DIR",
            "NAME=VALUE",
            "REF",
        ],
        "simulate": [
            "--answer",
            "--burstiness",
            "--engine",
            "--gpu-memory-gib",
            "--json",
            "--max-model-len",
            "--paged-only",
            "--prefill-us",
            "--prefix-tokens",
            "--prefixes",
            "--prompt",
            "--rate",
            "--requests",
            "--samples",
            "--seed",
            "--step-ms",
            "--weight-bytes",
            "FILE",
            "FILE",
            "NAME=VALUE",
            "REF",
        ],
        "promote": [
            "--force",
            "--json",
            "--require-approval",
            "ALIAS",
            "KEY",
            "MODEL",
            "TEXT",
            "URI",
            "VERSION",
            "VERSION",
        ],
        "rollback": ["--force", "--json", "ALIAS", "KEY", "MODEL", "TEXT", "URI", "VERSION", "VERSION"],
        "approve": ["--json", "--reject", "ALIAS", "MODEL", "NAME", "TEXT", "TIME", "URI", "VERSION"],
        "history": ["--json", "ALIAS", "MODEL", "TIME", "URI"],
        "reconcile": ["--json", "MODEL", "URI"],
    }


def test_run_prints_one_json_document_and_nothing_else(first_run: Any) -> None:
    document = json.loads(first_run.stdout)
    assert [step["cached"] for step in document["steps"]] == [False, False, False]
    assert document["release"] is None
    assert "2/3 quantize rtn" in first_run.stderr


def test_a_cached_run_prints_the_same_digests(folder: Path, environment: dict[str, str], first_run: Any) -> None:
    again = json.loads(call(environment, "run", folder / "spec.yaml", "--local", "--json").stdout)
    assert all(step["cached"] for step in again["steps"])
    assert [s["artifact"] for s in again["steps"]] == [s["artifact"] for s in json.loads(first_run.stdout)["steps"]]


def test_plan_says_what_is_cached(folder: Path, environment: dict[str, str], first_run: Any) -> None:
    document = json.loads(call(environment, "plan", folder / "spec.yaml", "--json").stdout)
    assert [step["cached"] for step in document["steps"]] == [True, True, True]
    assert "cached, artifact" in call(environment, "plan", folder / "spec.yaml").stdout


def test_show_finds_an_artifact_by_prefix_and_path(environment: dict[str, str], first_run: Any) -> None:
    artifact = json.loads(first_run.stdout)["steps"][1]["artifact"]
    by_prefix = json.loads(call(environment, "show", artifact["digest"][:10], "--json").stdout)
    by_path = json.loads(call(environment, "show", artifact["path"], "--json").stdout)
    assert by_prefix == by_path
    assert by_prefix["manifest"]["invariants"]["grid"]["num_bits"] == 4
    text = call(environment, "show", artifact["digest"][:10]).stdout
    assert "quantize rtn" in text
    assert "model.safetensors" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "{folder}/none.yaml"], 2, "there is no specification"),
        (["run", "{folder}/wrong.yaml", "--local"], 2, 'did you mean "magnitude"?'),
        (["run", "{folder}/no-model.yaml", "--local"], 3, "there is no model folder"),
        (["run", "{folder}/gate.yaml", "--local"], 5, "max allowed is 0.1"),
        (["show", "00000000"], 2, "there is no artifact"),
        (["show", "models:/nobody@nothing"], 2, "nobody"),
        (["methods", "nothing"], 2, "no installed method"),
        (["pull", "nonsense", "{folder}/x"], 2, "no release address"),
        (["pull", "file://{folder}/releases/a/b", "{folder}/x"], 6, "no complete release"),
        (["run"], 2, "Missing argument"),
        (["run", "x.yaml", "--what"], 2, "No such option"),
    ],
)
def test_a_mistake_gets_its_exit_code_and_one_message(
    folder: Path, environment: dict[str, str], arguments: list[str], code: int, said: str
) -> None:
    (folder / "wrong.yaml").write_text(SPEC.replace("magnitude", "magnitud"), encoding="utf-8")
    (folder / "no-model.yaml").write_text(SPEC.replace("id: model", "id: ./nowhere"), encoding="utf-8")
    gate = SPEC.rstrip() + "\n    require: {perplexity_ratio: {max: 0.1}}\n"
    (folder / "gate.yaml").write_text(gate, encoding="utf-8")
    done = call(environment, *(argument.replace("{folder}", str(folder)) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_failed_run_still_prints_its_json_document(folder: Path, environment: dict[str, str]) -> None:
    (folder / "gate.yaml").write_text(
        SPEC.rstrip() + "\n    require: {perplexity_ratio: {max: 0.1}}\n", encoding="utf-8"
    )
    done = call(environment, "run", folder / "gate.yaml", "--local", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == document["error"]["exit_code"] == 5
    assert len(document["steps"]) == 3
    assert document["error"]["problems"][0]["where"].endswith("steps[2].validate.require.perplexity_ratio")


def test_methods_lists_every_family(environment: dict[str, str]) -> None:
    document = json.loads(call(environment, "methods", "--json").stdout)
    names = {(method["stage"], method["name"]) for method in document["methods"]}
    assert names >= {
        ("calibrate", "text"),
        ("prune", "magnitude"),
        ("prune", "wanda"),
        ("distill", "logits"),
        ("quantize", "rtn"),
        ("quantize", "gptq"),
        ("validate", "perplexity"),
        ("validate", "fidelity"),
        ("validate", "footprint"),
        ("register", "release"),
        ("register", "vllm"),
        ("register", "kserve"),
        ("register", "llm_d"),
        ("register", "production_stack"),
        ("register", "compose"),
    }
    assert document["broken"] == []
    assert document["clashes"] == []
    assert "num_bits" in call(environment, "methods", "gptq").stdout


def test_an_interrupted_run_says_so_and_leaves_nothing_at_work(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    text = SPEC.replace(
        "- prune: magnitude\n    with: {sparsity: 0.5}",
        "- distill: logits\n    with: {source: text.txt, updates: 100000, sequences: 8, length_tokens: 32}",
    )
    (folder / "long.yaml").write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(folder / "long.yaml"), "--local", "--json"],
        env={**environment, "ORCHESTRATOR_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # In the middle of its work: some libraries swallow an interrupt that arrives while they are being imported.
    assert process.stderr is not None
    assert any("update" in line for line in process.stderr), "the run ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; finished steps are kept" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"]["exit_code"] == 130
    left = [path.name for path in (home / "staging").iterdir()]  # for the run that goes on; no scratch
    assert left
    assert not [name for name in left if name.endswith(".scratch")]


def test_what_a_plugin_prints_does_not_reach_stdout(environment: dict[str, str], tmp_path: Path) -> None:
    package = tmp_path / "loud"
    (package / "loud-1.dist-info").mkdir(parents=True)
    (package / "loud-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1\n", "utf-8")
    (package / "loud-1.dist-info" / "entry_points.txt").write_text("[orchestrator.plugins]\nloud = loud\n", "utf-8")
    (package / "loud.py").write_text("import os\nprint('hello')\nos.system('echo hello')\n", encoding="utf-8")
    done = call({**environment, "PYTHONPATH": str(package)}, "methods", "--json")
    assert json.loads(done.stdout)["broken"][0]["plugin"] == "loud"
    assert done.stderr.count("hello") == 2
