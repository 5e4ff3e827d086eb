"""The README cannot lie: its commands are run, in order, in a copy of the repository; its code too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds: the tracked files, and new ones that are not ignored."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.timeout(900)
def test_the_commands_run_in_order_and_the_model_loads_without_us(clone: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ORCHESTRATOR_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "MAKEFLAGS", "MAKELEVEL")
    }
    bin_folder = Path(sys.executable).parent
    environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert "make quickstart" in commands
    for command in commands:
        # `make install` is what made this environment; here its result stands in for a second installation.
        actual = (
            command.replace("make ", f"make BIN={bin_folder} -o install ") if command.startswith("make ") else command
        )
        done = subprocess.run(
            actual, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (program,) = (block for block in blocks("python") if "pulled-model" in block)
    isolated = {**environment, "HF_HUB_OFFLINE": "1"}
    watch = "import sys\n" + program + "\nassert not [m for m in sys.modules if m.startswith('orchestrator')]\n"
    done = subprocess.run(
        [sys.executable, "-c", watch], cwd=clone, env=isolated, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def read_text(path):")


def test_the_plugin_shown_conforms(tmp_path: Path) -> None:
    (program,) = (block for block in blocks("python") if "hookimpl" in block)
    (tmp_path / "my_plugin.py").write_text(program, encoding="utf-8")
    check = "import my_plugin; from orchestrator.testing import check_method; check_method(my_plugin.TopK())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_specification_shown_is_the_one_that_runs() -> None:
    shipped = (ROOT / "orchestrator" / "quickstart" / "quickstart.yaml").read_text(encoding="utf-8")
    assert shipped in blocks("yaml")


def test_the_fragments_are_valid_steps() -> None:
    from orchestrator.plugins import discover
    from orchestrator.spec import PipelineSpec, validate_strictly

    installed = discover()
    fragments = [block for block in blocks("yaml") if block.lstrip().startswith("- ")]
    assert fragments
    for fragment in fragments:
        spec = validate_strictly(
            PipelineSpec, {"version": 1, "name": "x", "model": {"id": "x"}, "steps": yaml.safe_load(fragment)}
        )
        for step in spec.steps:
            validate_strictly(installed.find(step.stage, step.method).cls, step.with_)


def test_links_lead_somewhere() -> None:
    for page in ("README.md", "orchestrator/README.md", "infra/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
