"""Kills runs at many points, and counts what the runs after them had to do again and whether a byte differs.

    python -m benchmarks.soak [--points 200] [--seed 0] [--model FOLDER] [--text FILE] [--save]

Half of the kills strike at an event (a write, in the middle of a write, a flush, a rename, …), chosen at random among
all that the undisturbed run has; half after a random time. One trial in four is killed three times in a row. After
each trial a further run, without artifacts, must find the same from the statistics that were left. The chains are
those of the tests (propagated, dense, weights alone) over a tiny model, and the quickstart's model; with --model all
kills are by time, over that model.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.quickstart import prepare
from tests.faults.conftest import BATCHES, CALIBRATE, CHAINS, DENSE, GPTQ, HEAD, WANDA
from tests.faults.points import Point, all_points
from tests.faults.scene import Scene, Trial
from tests.faults.zygote import Zygote
from tests.tiny import make_model

CHAINS_OF_A_MODEL = {
    "propagated": CHAINS["propagated"],
    "dense": HEAD + CALIBRATE + WANDA + DENSE + GPTQ + DENSE,
}
KILLS_IN_A_ROW, EVERY = 3, 4


def kills_of(scene: Scene, chance: random.Random, number: int, events: bool) -> list[Point | float]:
    """The kills of one trial."""
    points = all_points(scene.counts)
    by_event = events and number % 2 == 0

    def one() -> Point | float:
        if not by_event:
            return chance.uniform(0.0, 1.0) * scene.seconds
        event = chance.choice(sorted(scene.counts))  # every event alike, however often it happens
        return chance.choice([point for point in points if point.event == event])

    return [one() for _ in range(KILLS_IN_A_ROW if number % EVERY >= EVERY - 1 else 1)]


def soak(scenes: dict[str, Scene], points: int, seed: int, events: bool) -> dict[str, Any]:
    """Run trials until `points` runs were killed; return the counts."""
    chance = random.Random(seed)
    redone: Counter[int] = Counter()
    kills: Counter[str] = Counter()
    struck: Counter[str] = Counter()
    faults: list[str] = []
    trials, hangs, differing = 0, 0, 0
    names = sorted(scenes)
    while kills.total() < points:
        name = names[trials % len(names)]
        chosen = kills_of(scenes[name], chance, trials // len(names), events)
        trial: Trial = scenes[name].trial(chosen, records=True)
        trials += 1
        kills[name] += trial.kills
        struck.update(kill.event if isinstance(kill, Point) else "a time" for kill in chosen)
        redone[trial.redone] += 1
        hangs += any("hung" in fault for fault in trial.faults)
        differing += any("other bytes" in fault for fault in trial.faults)
        for fault in trial.faults:
            faults.append(f"{name}, {', '.join(map(str, chosen))}: {fault}")
            print(faults[-1], file=sys.stderr, flush=True)
    return {
        "trials": trials,
        "kills": kills.total(),
        "kills_by_chain": dict(sorted(kills.items())),
        "kills_chosen_by_event": dict(sorted(struck.items())),
        "trials_by_blocks_redone": {str(number): count for number, count in sorted(redone.items())},
        "hangs": hangs,
        "trials_with_differing_bytes": differing,
        "faults": faults,
    }


def tiny_scenes(folder: Path, zygote: Zygote) -> dict[str, Scene]:
    """Scenes over a tiny model of four blocks and over the quickstart's model."""
    make_model(folder / "model", layers=4)
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 400, encoding="utf-8")
    prepare(folder / "quickstart")
    scenes = {}
    for name in ("propagated", "dense", "weights only"):
        spec = folder / f"{name.replace(' ', '-')}.yaml"
        spec.write_text(CHAINS[name], encoding="utf-8")
        scenes[name] = Scene(folder / f"scene {name}", spec, zygote, changes=[BATCHES])
    spec = folder / "quickstart" / "soak.yaml"
    spec.write_text(CHAINS["propagated"].replace("text.txt", "valid.txt"), encoding="utf-8")
    scenes["quickstart"] = Scene(folder / "scene quickstart", spec, zygote, changes=[BATCHES])
    return scenes


def model_scenes(folder: Path, zygote: Zygote, model: Path, text: Path) -> dict[str, Scene]:
    """Scenes over a model and text of one's own, with calibration sets as people use them."""
    scenes = {}
    for name, chain in CHAINS_OF_A_MODEL.items():
        spec = folder / f"{name}.yaml"
        content = chain.replace("{id: model}", f"{{id: {model.absolute()}}}").replace("text.txt", str(text.absolute()))
        content = content.replace("sequences: 8, length_tokens: 32", "sequences: 32, length_tokens: 128")
        spec.write_text(content, encoding="utf-8")
        scenes[name] = Scene(folder / f"scene {name}", spec, zygote)
    return scenes


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak, print the counts, and save them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=200, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny one and the quickstart's")
    parser.add_argument("--text", type=Path, help="text to calibrate that model on")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/soak.json")
    options = parser.parse_args(arguments)
    if options.model and not options.text:
        parser.error("--model needs --text")
    started = time.perf_counter()
    zygote = Zygote()
    try:
        with tempfile.TemporaryDirectory() as name:
            if options.model:
                scenes = model_scenes(Path(name), zygote, options.model, options.text)
            else:
                scenes = tiny_scenes(Path(name), zygote)
            found = soak(scenes, options.points, options.seed, events=not options.model)
    finally:
        zygote.close()
    print(json.dumps(found, indent=2))
    if options.save:
        path = Path(__file__).parent / "results" / "soak.json"
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        saved[options.model.name if options.model else "tiny and quickstart"] = {
            "date": datetime.date.today().isoformat(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()[0]},
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("compression-orchestrator", "torch", "transformers", "safetensors")
            },
            "seed": options.seed,
            "seconds": round(time.perf_counter() - started),
            **found,
        }
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    if found["faults"]:
        sys.exit(f"{len(found['faults'])} faults")


if __name__ == "__main__":
    main()
