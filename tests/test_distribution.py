"""What a user installs: the wheel's content, and nothing heavy or private in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True,
        timeout=300,
    )
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_installs_only_our_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {
        "orchestrator",
        "orchestrator_calibration",
        "orchestrator_pruning",
        "orchestrator_distillation",
        "orchestrator_quantization",
        "orchestrator_evaluation",
        "orchestrator_kvcache",
        "orchestrator_serving",
        "orchestrator_export",
        "orchestrator_flows",
    }


def test_the_wheel_holds_what_the_quickstart_needs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {
        "orchestrator/quickstart/quickstart.yaml",
        "orchestrator/quickstart/model/model.safetensors",
        "orchestrator/quickstart/model/tokenizer.json",
        "orchestrator/quickstart/model/config.json",
        "orchestrator/html_report/style.css",
        "orchestrator_serving/schemas/compose.json",
        "orchestrator_serving/schemas/vllm-0.33.0.json",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pyc"))]
    assert sum(info.file_size for info in wheel.infolist()) < 6_000_000


def test_entry_points_name_every_family(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    families = ("calibration", "pruning", "distillation", "quantization", "evaluation", "kvcache", "serving", "export")
    for family in families:
        assert f"{family} = orchestrator_{family}" in text
    assert "orchestrator = orchestrator.cli:main" in text
