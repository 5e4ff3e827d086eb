"""Whether the walk can take a model apart: asked before any step computes, and once for each model.

The answer needs torch and Transformers, whose import takes seconds. `run` is about to import them anyway; `plan`
(`apart`) asks a process of its own. That a model fits is remembered in the home; that it does not is found anew.

    python -m orchestrator.fit FOLDER    prints the problems as JSON, and ends with the exit code of the error
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from orchestrator.artifact import Artifact
from orchestrator.canonical import digest_of
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError, PreflightError, Problem
from orchestrator.layer_method import LayerMethod
from orchestrator.machine import Experience
from orchestrator.model import import_libraries
from orchestrator.plan import Plan

_CHUNK_BYTES = 1 << 24


def check_fit(plan: Plan, known: Sequence[Artifact | None], home: Path, *, apart: bool = False) -> str | None:
    """Refuse a model that a waiting step would have to walk and cannot.

    known: the artifacts of the steps that have one. apart: ask a process of its own; not of a model that would run its
    own code for the answer. Returns what `remember_fit` takes; None if nothing was asked.
    Raises `PreflightError`, placed at the first such step.
    """
    step = next((s for s in plan.steps if isinstance(s.method, LayerMethod) and known[s.index] is None), None)
    if step is None or (apart and plan.source.code):
        return None
    key = digest_of([plan.source_digest, step.identity["core"], step.identity["environment"]])
    if key in Experience.read(home).fitting:
        return None
    try:
        if apart:
            _examine_apart(plan.source.path)
        else:
            examine(plan.source)
    except PreflightError as error:
        raise PreflightError([Problem(p.what, p.where or step.place, p.remedy) for p in error.problems]) from None
    return key


def remember_fit(home: Path, key: str | None) -> None:
    """Spare later runs the question that `check_fit` has answered. A home that cannot be written costs them time."""
    if key is not None:
        experience = Experience.read(home)
        experience.learn_fit(key)
        experience.write(home)


def examine(checkpoint: Checkpoint) -> None:
    """Build the model's modules without their weights, and compare them with what is stored.

    Raises `PreflightError`: an architecture that is not known and cannot be proved, missing or misshapen tensors, and
    matrices that config.json ties but that are stored with different numbers.
    """
    from orchestrator.proof import prove
    from orchestrator.skeleton import Skeleton

    import_libraries(checkpoint)
    with closing(Skeleton(checkpoint)) as skeleton:
        is_known = skeleton.is_known
        for tied, source in skeleton.stored_ties():
            if not _same_bytes(checkpoint, tied, source):
                raise PreflightError(
                    f"config.json of {checkpoint.path} ties {tied} to {source}, but the two are stored with different"
                    " numbers: Transformers would use both, most engines one of them",
                    remedy=f"set tie_word_embeddings to false there, or remove {tied} from the weights",
                )
    if not is_known:
        prove(checkpoint)


def _examine_apart(folder: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.fit", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    try:
        problems = [Problem(**entry) for entry in json.loads(done.stdout)]
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        problems = [Problem(f"{folder} could not be examined: {last}", None, "report it: this is a fault of ours")]
    raise PreflightError(problems)


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with (checkpoint.path / first.file).open("rb") as left, (checkpoint.path / second.file).open("rb") as right:
        left.seek(first.start)
        right.seek(second.start)
        remaining = first.num_bytes
        while remaining:
            size = min(remaining, _CHUNK_BYTES)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True


def main() -> int:
    """The process that `plan` asks."""
    try:
        examine(Checkpoint(Path(sys.argv[1])))
    except OrchestratorError as error:
        sys.stdout.write(json.dumps([vars(problem) for problem in error.problems]))
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
