"""A third-party distribution is installed with pip, listed, planned and run, without touching the environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_model

SOURCE = Path(__file__).parent / "foreign_plugin"
ROOT = Path(__file__).parents[1]
CALIBRATE = "  - calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 24}\n"
TOPMEAN = "  - prune: topmean\n    with: {sparsity: 0.5}\n"
VALIDATE = "  - validate: perplexity\n    with: {source: text.txt, windows: 4, length_tokens: 24}\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the plugin was installed from its sources, offline."""
    folder = tmp_path_factory.mktemp("foreign")
    source = shutil.copytree(SOURCE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and text."""
    folder = tmp_path_factory.mktemp("work")
    make_model(folder / "model", layers=2)
    (folder / "text.txt").write_text("the quick brown fox prunes a model, layer by layer; import os\n" * 200)
    return folder


def orchestrator(site: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with the plugin's folder on the path."""
    path = [str(site), *(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "ORCHESTRATOR_HOME": str(work / "home"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, check=False)


def write_spec(work: Path, name: str, *steps: str) -> Path:
    path = work / f"{name}.yaml"
    path.write_text(f"version: 1\nname: {name}\nmodel: {{id: ./model}}\nsteps:\n" + "".join(steps), encoding="utf-8")
    return path


def test_methods_lists_it_with_its_distribution(site: Path, work: Path) -> None:
    done = orchestrator(site, work, "methods", "topmean", "--json")
    assert done.returncode == 0, done.stderr
    (method,) = json.loads(done.stdout)["methods"]
    assert (method["stage"], method["kind"]) == ("prune", "LayerMethod")
    assert (method["distribution"], method["version"]) == ("orchestrator-plugin-topmean", "0.3.0")
    assert [parameter["name"] for parameter in method["parameters"]] == ["sparsity", "correct"]


def test_it_is_unknown_where_it_is_not_installed(work: Path, tmp_path: Path) -> None:
    done = orchestrator(tmp_path, work, "plan", str(write_spec(work, "unknown", CALIBRATE, TOPMEAN)))
    assert done.returncode == 2
    assert 'no installed prune method is called "topmean"' in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_planned_and_run_and_its_result_is_pruned(site: Path, work: Path) -> None:
    from safetensors import safe_open

    spec = write_spec(work, "foreign", CALIBRATE, TOPMEAN, VALIDATE)
    planned = orchestrator(site, work, "plan", str(spec), "--json")
    assert planned.returncode == 0, planned.stderr
    steps = json.loads(planned.stdout)["steps"]
    assert [(step["stage"], step["method"], step["cached"]) for step in steps] == [
        ("calibrate", "text", False),
        ("prune", "topmean", False),
        ("validate", "perplexity", False),
    ]

    done = orchestrator(site, work, "run", str(spec), "--local", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [step["fingerprint"] for step in document["steps"]] == [step["fingerprint"] for step in steps]
    pruned, report = document["steps"][1], document["steps"][2]
    # The record of a step names the distribution that its method came from.
    manifest = json.loads(orchestrator(site, work, "show", pruned["artifact"]["digest"], "--json").stdout)["manifest"]
    assert manifest["identity"]["plugin"]["distribution"] == "orchestrator-plugin-topmean"
    assert report["metrics"]["perplexity"] > 1
    assert report["metrics"]["perplexity"] != report["metrics"]["dense_perplexity"]
    with safe_open(Path(pruned["artifact"]["path"]) / "model.safetensors", framework="pt") as file:
        weight_OI = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    assert ((weight_OI == 0).sum(1) >= weight_OI.shape[1] // 2).all()

    again = orchestrator(site, work, "run", str(spec), "--local", "--json")
    assert again.returncode == 0, again.stderr
    repeated = json.loads(again.stdout)["steps"]
    assert [step["fingerprint"] for step in repeated] == [step["fingerprint"] for step in steps]
    assert [step["cached"] for step in repeated] == [True, True, True]


def test_chain_that_would_lose_zeros_is_refused_while_planning(site: Path, work: Path) -> None:
    spec = write_spec(work, "losing", CALIBRATE, "  - prune: wanda\n", TOPMEAN)
    done = orchestrator(site, work, "plan", str(spec))
    assert done.returncode == 2
    assert "losing.yaml:8" in done.stderr
    assert "prune topmean would destroy the zeros that prune wanda established" in done.stderr
    assert done.stdout == ""


def test_its_own_tests_pass_where_it_is_installed(site: Path, work: Path) -> None:
    path = os.pathsep.join([str(site), str(ROOT), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(site.parent / "source" / "tests")],
        capture_output=True,
        text=True,
        cwd=site.parent / "source",
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_nothing_of_it_is_left_in_this_environment(site: Path) -> None:
    code = (
        "import importlib.metadata as m; print([d.name for d in m.distributions(name='orchestrator-plugin-topmean')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not list(SOURCE.rglob("*.dist-info"))
