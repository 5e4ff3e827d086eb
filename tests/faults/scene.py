"""A specification with its undisturbed run, and trials in which runs of it are killed: shared by tests and the soak.

Every trial works in a home folder at one and the same path, because a release carries its address.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.artifact import ArtifactStore
from tests.faults.points import Point
from tests.faults.zygote import Zygote

PASSES_OF_A_BLOCK = 5  # four stages that measure, and one that sends the tokens on


@dataclass
class Work:
    """What runs did, by what they noted: blocks that were begun, and passes of all tokens through a block."""

    blocks: Counter[str] = field(default_factory=Counter)
    passes: int = 0
    errors: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, log: Path) -> Work:
        """Read a log that `tests.faults.victim` wrote."""
        work = cls()
        for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
            kind, *facts = json.loads(line)
            if kind == "block":
                work.blocks[" ".join(facts)] += 1
            elif kind == "pass":
                work.passes += 1
            else:
                work.errors += facts
        return work


@dataclass
class Trial:
    """What came of one trial. faults: what is not as it must be; kills: runs that really died; redone: blocks."""

    kills: int
    redone: int
    faults: list[str]
    seconds: float


class Scene:
    """A folder with a specification, the home of the runs, and the zygote that runs them."""

    def __init__(
        self, folder: Path, spec: Path, zygote: Zygote, *, tracked: bool = False, changes: Sequence[Any] = ()
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.spec = spec
        self._zygote = zygote
        self._tracked = tracked
        self._changes = list(changes)
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._result = folder / "log.jsonl", folder / "result.json"
        self.start_again()
        answer = self.run()
        if answer["exit"] != 0:
            raise RuntimeError(f"the undisturbed run failed: {answer}")
        self.seconds: float = answer["seconds"]
        found = json.loads(self._result.read_text(encoding="utf-8"))
        self.counts: dict[str, int] = found["counts"]
        self.digests = _digests(found["document"])
        self.work = Work.read(self._log)

    def start_again(self, base: Path | None = None) -> None:
        """Begin with no home, or with a copy of `base`."""
        shutil.rmtree(self.home, ignore_errors=True)
        if base is not None:
            shutil.copytree(base, self.home, symlinks=True)
        self._log.unlink(missing_ok=True)

    def run(self, kill: Point | float | None = None, *, changes: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
        """One run in the home as it is; the zygote's answer."""
        self._result.unlink(missing_ok=True)
        zygote: Zygote = more.pop("zygote", self._zygote)
        request = {
            "spec": str(more.pop("spec", self.spec)),
            "home": str(self.home),
            "log": str(self._log),
            "result": str(self._result),
            "tracked": self._tracked,
            "changes": [*self._changes, *changes],
            "limit": max(60.0, 20 * getattr(self, "seconds", 10.0)),
            **more,
        }
        if isinstance(kill, Point):
            request["point"] = astuple(kill)
        elif kill is not None:
            request["kill_after"] = kill
        return zygote.trial(request)

    def result(self) -> tuple[list[str], dict[str, Any]]:
        """The digests of the last run's artifacts, and its document."""
        document = json.loads(self._result.read_text(encoding="utf-8"))["document"]
        return _digests(document), document

    def worked(self) -> Work:
        """What all runs since `start_again` did."""
        return Work.read(self._log)

    def trial(
        self,
        kills: Sequence[Point | float],
        *,
        base: Path | None = None,
        records: bool = False,
        count: bool = True,
    ) -> Trial:
        """Kill a run, and the one that goes on from it, and so on; then let one come to its end, and check.

        base: home to begin with. records: whether a last run, without artifacts, must find the same from what the
        others left in the statistics folder. count: whether the work is compared with that of the undisturbed run.
        """
        self.start_again(base)
        died, faults, seconds = 0, [], 0.0
        for kill in kills:
            answer = self.run(kill)
            seconds += answer["seconds"]
            died += answer["exit"] == -9
            if answer["exit"] not in (-9, 0):
                faults.append(f"a run that was to die ended with {answer['exit']}: {answer['errors'][-1500:]}")
        answer = self.run()
        seconds += answer["seconds"]
        faults += self.faults(answer)
        work = self.worked()
        redone = (work.blocks - self.work.blocks).total()
        if count and redone > died:
            faults.append(f"{redone} blocks redone after {died} kills: {dict(work.blocks - self.work.blocks)}")
        if count and work.passes > self.work.passes + PASSES_OF_A_BLOCK * died:
            faults.append(f"{work.passes} passes instead of {self.work.passes}, after {died} kills")
        if records and not faults:
            for name in ("artifacts", "steps"):
                shutil.rmtree(self.home / name)
            faults += [f"from records: {fault}" for fault in self.faults(self.run())]
        return Trial(died, redone, faults, seconds)

    def faults(self, answer: dict[str, Any], expected: list[str] | None = None) -> list[str]:
        """What is wrong with a run that was to come to its end."""
        if answer["exit"] is None:
            return ["it hung"]
        if answer["exit"] != 0:
            return [f"it ended with {answer['exit']}: {' '.join(self.worked().errors)} {answer['errors'][-1500:]}"]
        digests, document = self.result()
        found = []
        if digests != (expected or self.digests):
            steps = [step["method"] for step in document["steps"]]
            differing = [s for s, a, b in zip(steps, digests, expected or self.digests, strict=True) if a != b]
            found.append(f"other bytes: {', '.join(differing)}")
        store = ArtifactStore(self.home)
        found += [f"{d[:8]}: {damage}" for d in digests if (damage := store.find(d).damage())]
        staging = self.home / "staging"
        left = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*"))
        if left:
            found.append(f"left in staging: {', '.join(left[:5])}")
        torn = [p.name for p in (self.home / "artifacts").rglob("*.part")]
        if torn:
            found.append(f"torn files in artifacts: {torn}")
        return found


def _digests(document: dict[str, Any]) -> list[str]:
    return [step["artifact"]["digest"] for step in document["steps"]]
