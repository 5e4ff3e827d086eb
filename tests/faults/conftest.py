"""The zygote, and what the scenes are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.scene import Scene
from tests.faults.zygote import Zygote
from tests.tiny import make_model

HEAD = "version: 1\nname: faults\nmodel: {id: model}\nsteps:\n"
CALIBRATE = "  - calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 32}\n"
WANDA = "  - prune: wanda\n    with: {sparsity: 0.5}\n"
GPTQ = "  - quantize: gptq\n    with: {num_bits: 4, group_size: 32}\n"
RTN = "  - quantize: rtn\n    with: {num_bits: 4, group_size: 32}\n"
DENSE = "    inputs: dense\n"
DISTILL = "  - distill: logits\n    with: {updates: 2, batch_sequences: 2}\n"
VALIDATE = "  - validate: perplexity\n    with: {source: text.txt, length_tokens: 32, windows: 4}\n"
CHAINS = {
    "propagated": HEAD + CALIBRATE + WANDA + GPTQ,
    "dense": HEAD + CALIBRATE + WANDA + DENSE + GPTQ + DENSE,
    "weights only": HEAD + RTN,
    "wanda": HEAD + CALIBRATE + WANDA,
    "gptq": HEAD + CALIBRATE + GPTQ,
    "gptq dense": HEAD + CALIBRATE + GPTQ + DENSE,
    "every kind": HEAD + CALIBRATE + WANDA + DISTILL + GPTQ + VALIDATE,
}
BATCHES = ("batch_tokens", 128)  # two batches of the calibration set


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """One process that forks the victims of all tests."""
    found = Zygote()
    yield found
    found.close()


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks, text, and a specification for each of `CHAINS`."""
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 400, encoding="utf-8")
    for name, text in CHAINS.items():
        spec_of(folder, name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def scene_of(zygote: Zygote, material: Path) -> Callable[[str], Scene]:
    """The scene of one of `CHAINS`; its undisturbed run is made once."""
    made: dict[str, Scene] = {}

    def scene(name: str) -> Scene:
        if name not in made:
            folder = material / f"scene {name}"
            made[name] = Scene(folder, spec_of(material, name), zygote, changes=[BATCHES])
        return made[name]

    return scene


def spec_of(folder: Path, name: str) -> Path:
    """Where a specification is."""
    return folder / f"{name.replace(' ', '-')}.yaml"
