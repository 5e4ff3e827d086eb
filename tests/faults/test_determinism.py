"""The same specification gives the same bytes, in processes of their own, however many threads there are."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.statistics import InputMomentBuilder
from tests.faults.conftest import BATCHES, CHAINS
from tests.faults.scene import Scene
from tests.faults.zygote import Zygote
from tests.tiny import make_model

WIDTHS = {"tiny": (64, 128), "wide": (320, 896)}  # the wide one takes several strips of H and panels of its factor


@pytest.fixture(scope="module")
def two_threads() -> Iterator[Zygote]:
    """A process whose torch has two threads."""
    found = Zygote(threads=2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def scenes(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Scene]:
    """Scenes by width and chain, with one thread and one worker."""
    folder = tmp_path_factory.mktemp("determinism")
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 400, encoding="utf-8")

    def scene(width: str, chain: str, run_by: Zygote = zygote) -> Scene:
        hidden, inner = WIDTHS[width]
        if not (folder / width).exists():
            make_model(folder / width, layers=2, hidden_size=hidden, intermediate_size=inner)
        spec = folder / f"{width}-{chain.replace(' ', '-')}.yaml"
        spec.write_text(CHAINS[chain].replace("{id: model}", f"{{id: {width}}}"), encoding="utf-8")
        return Scene(folder / f"scene {width} {chain}", spec, run_by, changes=[BATCHES])

    return scene


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chain", ["propagated", "gptq dense", "weights only"])
def test_bytes_do_not_depend_on_threads_and_workers(
    scenes: Callable[[str, str], Scene], two_threads: Zygote, width: str, chain: str
) -> None:
    scene = scenes(width, chain)
    variants: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("from records and factors", [["workers", 2]], {"keep": True}),
        ("three workers", [["workers", 3]], {}),
        ("two threads", [], {"zygote": two_threads}),
        ("two threads, from records and factors", [["workers", 1]], {"zygote": two_threads, "keep": True}),
    ]
    for name, changes, more in variants:
        if more.pop("keep", False):
            for folder in ("artifacts", "steps"):
                shutil.rmtree(scene.home / folder)
        else:
            scene.start_again()
        assert not scene.faults(scene.run(changes=changes, **more)), name


def test_every_kind_of_step_gives_the_same_bytes_again_with_the_same_two_threads(
    scenes: Callable[..., Scene], two_threads: Zygote
) -> None:
    """Of training the README promises no more: torch sums gradients of this width otherwise with another number."""
    scene = scenes("wide", "every kind", two_threads)
    scene.start_again()
    assert not scene.faults(scene.run())


def test_the_second_process_does_have_two_threads(two_threads: Zygote, tmp_path: Path) -> None:
    answer = two_threads.trial({"log": str(tmp_path / "log"), "show_threads": True})
    assert answer["exit"] == 2


def test_batches_without_a_token_keep_nobody_waiting() -> None:
    """An expert that sees no token of batch 1, while batch 0 is not there yet, must still get batch 2."""
    builder = InputMomentBuilder(4, with_hessian=True)
    skipping = threading.Thread(target=builder.pass_over, args=(1,), daemon=True)
    skipping.start()
    builder.add(torch.ones(3, 4), 0)
    last = threading.Thread(target=builder.add, args=(torch.ones(2, 4), 2), daemon=True)
    last.start()
    last.join(30)
    assert not last.is_alive()
    assert builder.finish().num_tokens == 5
