"""What every step of a plan will take on this machine, and the refusal of what cannot fit. Imports no torch.

`plan` shows it, `run` records it beside what was measured and learns from the difference (`orchestrator.machine`).
A layer method's step is given as many workers as its memory allows; their number changes no bit of the result.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.allocation import planned_schemes
from orchestrator.artifact import Artifact
from orchestrator.canonical import digest_of
from orchestrator.errors import OrchestratorError, PreflightError, Problem
from orchestrator.estimate import (
    WalkSize,
    model_bytes,
    most_workers,
    packed_weight_bytes,
    record_bytes,
    report_bytes,
    result_bytes,
    walk_memory,
    walk_work,
)
from orchestrator.facts import facts_of
from orchestrator.home import HOME_VARIABLE, check_home
from orchestrator.layer_method import LayerMethod, Needs
from orchestrator.machine import MEMORY_VARIABLE, Experience, Machine, memory_limit, nominal_seconds
from orchestrator.method import Calibrator, Evaluator, Invariant, ModelMethod, Publisher
from orchestrator.plan import Plan, Step
from orchestrator.records import LIMIT_VARIABLE, limit_from
from orchestrator.report import size_text
from orchestrator.usage import has_torch, resident_bytes
from orchestrator.variants import variant_work
from orchestrator.work import ModelFacts, Work

DEFAULT_CALIBRATION = (128, 512)  # where a calibrator does not say what it will give
_SHORTEST = 32
# Parameters that bound what a method holds at once; the first that helps is proposed.
_LEVERS = ("batch", "batch_sequences", "length_tokens")


@dataclass(frozen=True)
class Estimate:
    """What a step will take.

    seconds; peak_memory_bytes: of the process, interpreter and libraries included; disk_bytes: of the artifact;
    device_memory_bytes: of the accelerator, None without one; workers: of a layer method's walk.
    work: what that follows from. nominal: seconds by the default rates. statistics_bytes: of records that are kept.
    size: the walk, if it is one. record_key: names the records, if others may use them.
    """

    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    device_memory_bytes: int | None
    workers: int | None
    work: Work
    nominal: float
    statistics_bytes: int = 0
    size: WalkSize | None = None
    record_key: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form in which it is shown and recorded."""
        return {
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            **({} if self.device_memory_bytes is None else {"device_memory_bytes": self.device_memory_bytes}),
            **({} if self.workers is None else {"workers": self.workers}),
        }


def foresee(
    plan: Plan, home: Path, known: Sequence[Artifact | None], *, engine: str | None = None
) -> tuple[Estimate, ...]:
    """Estimate every step. Raises `PreflightError` for steps without an artifact that cannot fit this machine.

    known: the artifacts of the steps that have one. engine: what runs them; None: what ran last.
    """
    machine, experience = Machine.here(home), Experience.read(home)
    limit = memory_limit(os.environ) if plan.max_memory_bytes is None else plan.max_memory_bytes
    limit_from(os.environ)  # refuses what is no number, also where all is cached
    estimates = estimate_steps(plan, known, machine, experience, limit, engine)
    waiting = [(step, estimates[step.index]) for step in plan.steps if known[step.index] is None]
    if waiting:
        check_home(home)
    dense = facts_of(plan.source)
    problems = [p for step, estimate in waiting for p in memory_problems(step, estimate, machine, limit, dense)]
    problems += [problem for step, _ in waiting for problem in device_problems(step)]
    problems += [problem for step, _ in waiting for problem in window_problems(step)]
    problems += disk_problems(plan, waiting, machine, home)
    if problems:
        raise PreflightError(problems)
    return estimates


def estimate_steps(
    plan: Plan,
    known: Sequence[Artifact | None],
    machine: Machine,
    experience: Experience,
    limit: int | None,
    engine: str | None = None,
) -> tuple[Estimate, ...]:
    """What each step takes; `limit` is what a layer method may use beside interpreter and libraries."""
    dense = facts_of(plan.source)
    packed: int | None = None  # bytes of the weight files, once they are quantized
    calibration = DEFAULT_CALIBRATION
    imported = has_torch()
    estimates: list[Estimate] = []
    for step in plan.steps:
        method, artifact = step.method, known[step.index]
        base = experience.base(step.label, engine)
        with _asking(step):
            if isinstance(method, Calibrator):
                calibration = _calibration(method, artifact)
            if isinstance(method, LayerMethod):
                allowed = max(0, machine.memory_bytes - max(0, base - resident_bytes()))
                allowed = allowed if limit is None else min(allowed, limit)
                estimate = _walk(step, method, calibration, machine, experience, allowed)
                schemes = planned_schemes(step.reads, method, step.skip)
                if schemes:
                    packed = packed_weight_bytes(step.reads, schemes, step.skip)
            else:
                model = facts_of(step.reads)
                if packed is not None:
                    model = replace(model, quantized=True, stored_bytes=packed)
                made = variant_work(step, plan.steps, [earlier.work for earlier in estimates])
                estimate = _other(step, model, dense, calibration, machine, experience, made)
            if isinstance(method, ModelMethod) and packed is not None:
                depth = len(facts_of(step.reads).blocks)
                kept = Invariant.GRID in method.keeps
                packed = packed * len(facts_of(step.gives).blocks) // max(1, depth) if kept else None
                estimate = replace(estimate, disk_bytes=packed or estimate.disk_bytes)
        seconds = estimate.seconds
        if artifact is None and not imported and (step.formats or not isinstance(method, Publisher)):
            seconds, imported = seconds + experience.import_seconds, True
        estimates.append(replace(estimate, seconds=seconds, peak_memory_bytes=base + estimate.work.memory_bytes))
    return tuple(estimates)


@contextmanager
def _asking(step: Step) -> Iterator[None]:
    """Turn what a method raises when it is asked what it will take into an error that names the method."""
    try:
        yield
    except OrchestratorError as error:
        placed = [Problem(p.what, p.where or step.place, p.remedy) for p in error.problems]
        raise type(error)(placed) from error
    except Exception as error:  # a plugin may fail in any way
        raise PreflightError(
            f"{type(step.method).__name__} cannot say what it will take: {type(error).__name__}: {error}",
            where=step.place,
            remedy="tell the plugin's authors, or use another method",
        ) from error


def device_problems(step: Step) -> list[Problem]:
    """Say why a layer method's device is not to be had, as far as can be seen without importing torch."""
    if step.device == "cpu" or not isinstance(step.method, LayerMethod):
        return []
    remedy = "set device: cpu, or run where there is one"
    if importlib.metadata.version("torch").endswith("+cpu"):
        return [Problem(f"device is {step.device}, but the installed torch is a CPU build", step.place, remedy)]
    if sys.platform == "linux" and not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return [Problem(f"device is {step.device}, but this machine has no NVIDIA device", step.place, remedy)]
    return []


def window_problems(step: Step) -> list[Problem]:
    """Say which windows of a text of its own a method would cut longer than the model can take."""
    positions, length = step.reads.positions, getattr(step.method, "length_tokens", None)
    has_text = getattr(step.method, "source", None) is not None
    if not has_text or positions is None or not isinstance(length, int) or length <= positions:
        return []
    what = f"windows of {length} tokens are longer than the {positions} positions of the model"
    return [Problem(what, step.place, f"set length_tokens to at most {positions}")]


def _walk(
    step: Step,
    method: LayerMethod,
    calibration: tuple[int, int],
    machine: Machine,
    experience: Experience,
    allowed: int,
) -> Estimate:
    calibrated = method.needs is not Needs.WEIGHT
    inputs = step.calibrated_on or method.inputs
    key = None
    if calibrated and inputs == "dense":
        facts = ("core", "environment", "inputs", "device")
        key = digest_of([*(step.identity[name] for name in facts), method.needs is Needs.INPUT_MOMENT])
    size = WalkSize(
        facts_of(step.reads, step.skip),
        method,
        calibration if calibrated else None,
        inputs,
        step.device,
        recorded=key in experience.recorded,
    )
    workers = most_workers(size, machine.threads, allowed)
    schemes = planned_schemes(step.reads, method, step.skip)
    work = replace(walk_work(size, workers), disk_bytes=result_bytes(step.reads, schemes, step.skip))
    nominal = nominal_seconds(work)
    return Estimate(
        experience.predict(step.label, nominal),
        0,
        work.disk_bytes,
        None if step.device == "cpu" else work.memory_bytes,
        workers,
        work,
        nominal,
        record_bytes(size),
        size,
        key,
    )


def _other(
    step: Step,
    model: ModelFacts,
    dense: ModelFacts,
    calibration: tuple[int, int],
    machine: Machine,
    experience: Experience,
    variants: Work,
) -> Estimate:
    method = step.method
    work = method.estimate(model, dense, calibration)
    if isinstance(method, ModelMethod):
        work = replace(
            work,
            disk_bytes=model_bytes(step.gives) + work.disk_bytes,
            moved_bytes=work.moved_bytes + 20 * dense.stored_bytes,
        )
    elif isinstance(method, Evaluator):
        work = replace(work, disk_bytes=report_bytes(method)).then(variants)
    for export in step.formats:
        added = export.estimate(model, dense, calibration)
        work = work.then(replace(added, disk_bytes=0, scratch_bytes=added.disk_bytes + added.scratch_bytes))
    nominal = nominal_seconds(work, machine.threads)
    return Estimate(experience.predict(step.label, nominal), 0, work.disk_bytes, None, None, work, nominal)


def _calibration(method: Calibrator, artifact: Artifact | None) -> tuple[int, int]:
    """Sequences, and tokens of each: of the set that is there, else as the method says."""
    if artifact is not None:
        sequences, tokens = int(artifact.metrics["sequences"]), int(artifact.metrics["tokens"])
        return sequences, max(1, tokens // max(1, sequences))
    return method.expected_shape() or DEFAULT_CALIBRATION


def memory_problems(
    step: Step, estimate: Estimate, machine: Machine, limit: int | None, dense: ModelFacts
) -> list[Problem]:
    """Say what of a step does not fit into memory, and what would. dense: the sizes of the model before any step."""
    needed = estimate.work.memory_bytes
    found = []
    if limit is not None and estimate.size is not None and needed > limit:
        remedies = [f"set max_memory_gib (or {MEMORY_VARIABLE}) to {_gib(needed)} or more"]
        remedies += _shorter_windows(estimate.size, limit)
        found.append(
            Problem(
                f"{step.label} needs {size_text(needed)} beside the interpreter and its libraries, working on one thing"
                f" at a time; max_memory_gib allows {size_text(limit)}",
                step.place,
                ", or ".join(remedies),
            )
        )
    whole = estimate.peak_memory_bytes + estimate.work.child_memory_bytes
    free = machine.memory_bytes + resident_bytes()
    if whole > free and not found:
        remedies = [f"free memory, or use a machine with {size_text(whole)} free"]
        room = free - (whole - needed)
        if estimate.size is not None:
            remedies += _shorter_windows(estimate.size, room)
        else:
            remedies += _smaller(step, dense, room)
        what = f"{step.label} needs {size_text(whole)} of memory, and {size_text(free)} are to be had on this machine"
        found.append(Problem(what, step.place, ", or ".join(remedies)))
    return found


def _shorter_windows(size: WalkSize, room: int) -> list[str]:
    """The longest halving of the calibration windows with which a walk fits, as a proposal."""
    if size.calibration is None:
        return []
    sequences, length = size.calibration
    while length // 2 >= _SHORTEST:
        length //= 2
        if walk_memory(replace(size, calibration=(sequences, length)), 1) <= room:
            return [f"calibrate on windows of at most {length} tokens"]
    return []


def _smaller(step: Step, dense: ModelFacts, room: int) -> list[str]:
    """What of the method's own proposals, or the largest halving of a parameter, would make it fit."""
    facts = facts_of(step.reads)
    if isinstance(step.method, ModelMethod):
        changes = list(step.method.economies())
        together = {name: value for change in changes for name, value in change.items()}
        for change in [*changes, together] if len(changes) > 1 else changes:
            work = step.method.model_copy(update=dict(change)).estimate(facts, dense, DEFAULT_CALIBRATION)
            if work.memory_bytes + work.child_memory_bytes <= room:
                return ["set " + " and ".join(f"{name}: {_yaml(value)}" for name, value in change.items())]
    for name in _LEVERS:
        value = getattr(step.method, name, None)
        while isinstance(value, int) and value > 1:
            value //= 2
            smaller = step.method.model_copy(update={name: value})
            work = smaller.estimate(facts, dense, DEFAULT_CALIBRATION)
            if work.memory_bytes + work.child_memory_bytes <= room and (name != "length_tokens" or value >= _SHORTEST):
                return [f"set {name} to at most {value}"]
    return []


def disk_problems(plan: Plan, waiting: Sequence[tuple[Step, Estimate]], machine: Machine, home: Path) -> list[Problem]:
    """Say what does not fit onto the home's disk, and what would."""
    if not waiting:
        return []
    results = sum(estimate.disk_bytes for _, estimate in waiting)
    for step, estimate in waiting:
        if isinstance(step.method, Publisher) and str(step.method.uri).startswith(home.absolute().as_uri()):
            results += estimate.work.scratch_bytes
    passing = max(
        (e.work.scratch_bytes for s, e in waiting if s.formats or not isinstance(s.method, Publisher)), default=0
    )
    statistics = min(limit_from(os.environ), sum(estimate.statistics_bytes for _, estimate in waiting))
    needed = results + passing + statistics
    if needed <= machine.disk_bytes:
        return []
    what = (
        f"the steps need {size_text(needed)} on the disk that holds {home}, and {size_text(machine.disk_bytes)} are"
        f" free: {size_text(results)} for results, {size_text(passing)} for hidden states, {size_text(statistics)} for"
        " statistics"
    )
    more = size_text(needed - machine.disk_bytes)
    remedy = f"free {more} there, or set {HOME_VARIABLE} to a folder on a larger disk"
    room = machine.disk_bytes - results - passing
    if room > 0 and statistics:
        remedy += f", or set {LIMIT_VARIABLE} to {math.floor(room / 2**30 * 100) / 100}"
    return [Problem(what, str(plan.spec_path), remedy)]


def learn(
    home: Path, engine: str, step: Step, estimate: Estimate, *, seconds: float, import_seconds: float, base_bytes: int
) -> None:
    """Remember what a step really took.

    seconds: without `import_seconds`, which the libraries took. base_bytes: resident memory after the step.
    """
    experience = Experience.read(home)
    experience.engine = engine
    experience.base_bytes.setdefault(engine, {})[step.label] = base_bytes
    experience.learn(step.label, estimate.nominal, seconds)
    if import_seconds > 0:
        experience.import_seconds = round(import_seconds, 3)
    if estimate.record_key is not None:
        experience.learn_record(estimate.record_key)
    experience.write(home)


def _yaml(value: Any) -> str:
    """A parameter's value as a specification writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(count: int) -> str:
    """GiB as a setting takes it, rounded up."""
    return f"{math.ceil(count / 2**30 * 100) / 100:.2f}"
