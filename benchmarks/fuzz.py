"""Readers of what others wrote, fuzzed under coverage guidance (atheris: libFuzzer for Python), each in a process.

    python -m benchmarks.fuzz [--targets specification manifest pointer] [--seconds 60] [--save]

Targets and mutations are those of tests/test_fuzz.py; here libFuzzer keeps what reaches new code and goes on from it.
Anything but a valid result or an error for people counts as a crash, and so does more than 20 s or 2 GiB for one
input; the exit code is then 1, and the inputs are printed, to be added to `FOUND` of that test. Needs `atheris`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.material import REPOSITORY
from benchmarks.processes import environment
from benchmarks.results import circumstances, save

DEFAULT = ("specification", "manifest", "pointer")
INSTRUMENTED = ("orchestrator", "yaml")
MOST_BYTES = 1 << 14  # of one input
MOST_SECONDS = 20  # for one input
MOST_MIB = 2048
_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")


def main() -> int:
    """Fuzz the targets one after the other; 1 if any input was answered in another way than it should."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(DEFAULT), help="which; all are in tests/fuzz_targets.py")
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fuzz.json")
    parser.add_argument("--child", nargs=2, metavar=("TARGET", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _fuzz(arguments.child[0], Path(arguments.child[1]), arguments.seconds)
    if importlib.util.find_spec("atheris") is None:
        parser.exit(2, "this needs atheris: pip install atheris==3.0.0 (wheels for Linux, Python 3.11 to 3.13)\n")
    results = [_run(target, arguments.seconds) for target in arguments.targets]
    for result in results:
        print(
            f"{result['target']:<14} {result['executions']:>9,} executions in {result['seconds']} s,"
            f" {result['coverage']:,} edges, {result['features']:,} features, {len(result['crashes'])} crashes"
        )
        for crash in result["crashes"]:
            print(f"    {crash['how']}: {crash['input']}")
    if arguments.save:
        versions = {name: importlib.metadata.version(name) for name in ("atheris", "pyyaml", "pydantic")}
        found = circumstances()
        limits = {"bytes": MOST_BYTES, "seconds": MOST_SECONDS, "mib": MOST_MIB}
        save("fuzz", {**found, "versions": found["versions"] | versions, "limits": limits, "targets": results})
    return int(any(result["crashes"] for result in results))


def _run(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and say what came of it."""
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--seconds", str(seconds), "--child", target, name]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, errors="replace", check=False
        )
        progress = _PROGRESS.findall(done.stderr)
        executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        if not progress or executed is None:
            raise RuntimeError(f"{target} was not fuzzed:\n{done.stderr[-3000:]}")
        crashes = [
            {"how": path.with_suffix(".txt").read_text(encoding="utf-8").strip(), "input": repr(path.read_bytes())}
            for path in sorted((folder / "found").glob("*.bin"))
        ]
        # What libFuzzer itself names: too slow, too much memory, a signal.
        crashes += [
            {"how": path.name.partition("-")[0], "input": repr(path.read_bytes())} for path in folder.glob("*-*")
        ]
        if done.returncode and not crashes:
            crashes.append({"how": f"the process ended with {done.returncode}", "input": done.stderr[-500:]})
        edges, features, corpus = map(int, progress[-1])
        return {
            "target": target,
            "seconds": seconds,
            "executions": int(executed[1]),
            "coverage": edges,
            "coverage_of_seeds": int(progress[0][0]),
            "features": features,
            "corpus": corpus,
            "crashes": crashes,
        }


def _fuzz(target: str, folder: Path, seconds: int) -> int:
    """Let libFuzzer drive a target. What it finds is written down at once, by place, and it goes on."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED), enable_loader_override=False):
        from tests.fuzz_mutations import mutate
        from tests.fuzz_targets import TARGETS, check, seeds

    corpus, found = folder / "corpus", folder / "found"
    corpus.mkdir()
    found.mkdir()
    for number, seed in enumerate(seeds(target)):
        (corpus / str(number)).write_bytes(seed)

    def one_input(data: bytes) -> None:
        try:
            check(TARGETS[target], data)
        except Exception as error:  # whatever it is: that is what is looked for
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            path = found / f"{re.sub('[^A-Za-z0-9]+', '-', place)}.bin"
            if not path.exists() or len(data) < path.stat().st_size:
                path.write_bytes(data)
                path.with_suffix(".txt").write_text(
                    f"{place}: {str(error)[:200]}\n", encoding="utf-8", errors="replace"
                )

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        """Half of the mutations know JSON and YAML, half are libFuzzer's own."""
        random = Random(seed)  # the same choices for the same seed
        return mutate(data, random)[:most] if random.randrange(2) else bytes(atheris.Mutate(data, most))

    options = {
        "max_total_time": seconds,
        "max_len": MOST_BYTES,
        "timeout": MOST_SECONDS,
        "rss_limit_mb": MOST_MIB,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/",
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input, custom_mutator=mutated)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
