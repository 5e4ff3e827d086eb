"""What a killed run left is taken up by the very same run only, and only where its bytes are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import spec_of
from tests.faults.points import Point
from tests.faults.scene import Scene

NUM_BLOCKS = 3
LATE = Point("Stream.discard_passed", 2, "after")  # two of three blocks are finished


def _replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


GPTQ_BITS, WANDA_SPARSITY = "num_bits: 4", "sparsity: 0.5"
# (chain, change of the specification, change of the process)
KNOBS: dict[str, tuple[str, Callable[[str], str], list[Any]]] = {
    "one weight": ("gptq", _replaced("{id: model}", "{id: other-model}"), []),
    "calibration text": ("gptq", _replaced("source: text.txt", "source: other.txt"), []),
    "window length": ("gptq", _replaced("sequences: 8, length_tokens: 32", "sequences: 16, length_tokens: 16"), []),
    "seed": ("gptq", _replaced("name: faults", "name: faults\nseed: 5"), []),
    "bits": ("gptq", _replaced("num_bits: 4", "num_bits: 8"), []),
    "damping": ("gptq", _replaced("num_bits: 4", "num_bits: 4, damping: 0.05"), []),
    "skip": ("gptq", lambda text: text + "    skip: [down_proj]\n", []),
    "inputs": ("gptq", lambda text: text + "    inputs: dense\n", []),
    "sparsity": ("wanda", _replaced("sparsity: 0.5", "sparsity: 0.25"), []),
    "code": ("wanda", str, [["code"]]),
    "library": ("wanda", str, [["library"]]),
    "processor": ("wanda", str, [["processor"]]),
}


@pytest.fixture(scope="module")
def others(material: Path) -> Path:
    """A model that differs in one weight, and another text."""
    shutil.copytree(material / "model", material / "other-model")
    path = material / "other-model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40  # the low byte of the last bfloat16
    path.write_bytes(bytes(data))
    (material / "other.txt").write_text("a lazy dog jumps over no fox, whatever the book says. " * 400, "utf-8")
    return material


@pytest.mark.parametrize("knob", KNOBS)
def test_a_changed_knob_never_goes_on_from_another_runs_state(
    scene_of: Callable[[str], Scene], others: Path, knob: str
) -> None:
    chain, change, changes = KNOBS[knob]
    scene = scene_of(chain)
    spec = others / f"changed-{knob.replace(' ', '-')}.yaml"
    spec.write_text(change(scene.spec.read_text("utf-8")), "utf-8")
    scene.start_again()
    assert scene.run(LATE)["exit"] == -9
    before = scene.worked()
    assert before.blocks.total() == 2
    assert scene.run(spec=spec, changes=changes)["exit"] == 0
    assert scene.worked().blocks.total() == 2 + NUM_BLOCKS, "every block was begun anew"
    taken, _ = scene.result()
    scene.start_again()
    assert scene.run(spec=spec, changes=changes)["exit"] == 0
    undisturbed, _ = scene.result()
    assert taken == undisturbed
    assert (taken != scene.digests) == (knob != "processor")


@pytest.fixture(scope="module")
def killed(scene_of: Callable[[str], Scene], material: Path) -> Path:
    """The home of a run of `gptq` that was killed after two of its three blocks."""
    scene = scene_of("gptq")
    scene.start_again()
    assert scene.run(LATE)["exit"] == -9
    return Path(shutil.copytree(scene.home, material / "killed"))


def _flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(place * len(data)))] ^= 4
    path.write_bytes(bytes(data))


def _cut(path: Path, place: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data))])


def _add_garbage(path: Path, place: float) -> None:
    """Lines that are no progress, put before the last one; of the first kind also JSON can be read."""
    lines = path.read_bytes().splitlines(keepends=True)
    garbage = b"{}\n[1]\n" if place < 0.5 else b"\x00\xff\r\xfe not json\n"
    path.write_bytes(b"".join([*lines[:-1], garbage, lines[-1]]))


def _change_number(path: Path, place: float) -> None:
    """Another number in the last line, which stays good JSON."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = lines[-1].index(b'"zero_fraction":0.') + len(b'"zero_fraction":0.')
    changed = bytearray(lines[-1])
    changed[at] = ord("1") if changed[at] != ord("1") else ord("2")
    path.write_bytes(b"".join([*lines[:-1], bytes(changed)]))
    json.loads(changed)


DAMAGE = [
    ("*/model.safetensors", _flip, 0.3),
    ("*/model.safetensors", _flip, 0.001),  # in the header
    ("*/model.safetensors", _cut, 0.5),
    ("*.state/hidden-*.f32", _flip, 0.9),
    ("*.state/hidden-*.f32", _cut, 0.5),
    ("*.state/progress.jsonl", _flip, 0.05),
    ("*.state/progress.jsonl", _flip, 0.9),
    ("*.state/progress.jsonl", _cut, 0.95),
    ("*.state/progress.jsonl", _cut, 0.0),
    ("*.state/progress.jsonl", _add_garbage, 0.0),
    ("*.state/progress.jsonl", _add_garbage, 1.0),
    ("*.state/progress.jsonl", _change_number, 0.0),
]


@pytest.mark.parametrize(("pattern", "damage", "place"), DAMAGE)
def test_a_damaged_state_is_noticed(
    scene_of: Callable[[str], Scene], killed: Path, pattern: str, damage: Callable[[Path, float], None], place: float
) -> None:
    scene = scene_of("gptq")
    scene.start_again(killed)
    found = list((scene.home / "staging").glob(pattern))
    assert len(found) == 1
    damage(found[0], place)
    assert not scene.faults(scene.run())


@pytest.mark.parametrize("pattern", ["*.moment.safetensors", "*.factor.safetensors", "*.json"])
@pytest.mark.parametrize(("damage", "place"), [(_flip, 0.01), (_flip, 0.99), (_cut, 0.6)])
def test_damaged_statistics_are_noticed(
    scene_of: Callable[[str], Scene], pattern: str, damage: Callable[[Path, float], None], place: float
) -> None:
    scene = scene_of("gptq dense")
    scene.start_again()
    assert scene.run()["exit"] == 0
    for name in ("artifacts", "steps"):
        shutil.rmtree(scene.home / name)
    found = sorted((scene.home / "statistics").glob(pattern))
    assert found
    for path in found:
        damage(path, place)
    assert not scene.faults(scene.run())


def test_the_chains_that_are_changed_hold_what_changes(material: Path) -> None:
    for chain, change, changes in KNOBS.values():
        text = spec_of(material, chain).read_text("utf-8")
        assert changes or change(text) != text
