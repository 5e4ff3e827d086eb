"""What is predicted of a step, and what is refused: formulas by hand, real bytes on disk, a cap that is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import machine as machine_module
from orchestrator.artifact import ArtifactStore
from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError
from orchestrator.estimate import HEADROOM, WalkSize, most_workers, result_bytes, walk_memory
from orchestrator.export import ModelWriter
from orchestrator.facts import facts_of
from orchestrator.home import Settings
from orchestrator.job import WalkSettings
from orchestrator.machine import Experience, Machine, fit_line, memory_limit, num_threads
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import discover
from orchestrator.preflight import disk_problems, estimate_steps, foresee, memory_problems
from orchestrator.records import limit_from
from orchestrator.run import run_locally
from orchestrator.walk import walk
from orchestrator.work import BlockFacts, InputGroup, ModelFacts, Work
from tests.layer_methods import Identity, KeepLarge, Round, ScaleByInput
from tests.test_run import Watcher
from tests.tiny import ARCHITECTURES, OTHER_ARCHITECTURES, edit_config, make_model, make_tokens

GIB = 2**30
SPEC = """\
version: 1
name: foreseen
model: {id: model}
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 8, length_tokens: 32}
  - prune: wanda
  - quantize: gptq
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: text.txt, length_tokens: 32, windows: 8}
"""
# One block of a Llama with D = 8, I_ff = 24, one group of q/k/v, one of o, one of gate/up, one of down.
GROUPS = (InputGroup((8, 4, 4), 8), InputGroup((8,), 8), InputGroup((24, 24), 8), InputGroup((8,), 24))
BLOCK = BlockFacts(GROUPS, parameters=16 * 8 + 64 + 48 * 8 + 8 * 24 + 16, largest=24 * 8)
SMALL = ModelFacts(
    parameters=3 * BLOCK.parameters + 100 * 8,
    item_bytes=2,
    stored_bytes=2 * (3 * BLOCK.parameters + 100 * 8),
    rest_bytes=0,
    quantized=False,
    largest=100 * 8,
    largest_outside=100 * 8,
    hidden=8,
    intermediate=24,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=100,
    squares=False,
    blocks=(BLOCK,) * 3,
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox reads a book of words. " * 400, encoding="utf-8")
    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return folder


@pytest.fixture
def plan_of(material: Path, tmp_path: Path) -> Callable[[str], Plan]:
    def make(text: str) -> Plan:
        path = material / f"{tmp_path.name}.yaml"
        path.write_text(text, encoding="utf-8")
        return make_plan(path, discover(), tmp_path / "home")

    return make


def test_the_memory_of_a_walk_is_what_its_parts_take() -> None:
    tokens = 64
    weights = 4 * BLOCK.parameters
    records = [4 * num_in**2 + 16 * num_in for num_in in (8, 8, 8, 24)]
    # A batch is as many whole sequences as 1024 tokens hold: here sixteen.
    activations = 4 * 1024 * (3 * 8 + 3 * 24)
    for workers in (1, 2, 3):
        batches = workers + 2  # two more are what the allocator keeps
        dense = WalkSize(SMALL, Identity(), (4, tokens), "dense")
        assert walk_memory(dense, workers) == weights + sum(records) + batches * activations + 8 * 4 * tokens
        # Stage by stage there is one record at a time.
        staged = WalkSize(SMALL, Identity(), (4, tokens), "propagated")
        assert walk_memory(staged, workers) == weights + max(records) + batches * activations + 8 * 4 * tokens


def test_a_weight_only_walk_holds_one_layer_for_each_worker() -> None:
    size = WalkSize(replace(SMALL, largest=0, parameters=0), KeepLarge(), None)
    # The largest layers have 192 weights: in float32 and as stored, and five copies while they are compressed.
    assert walk_memory(size, 1) == max(192 * (4 + 2) + 5 * 4 * 192, 192 * 12)
    assert walk_memory(size, 2) == 2 * (192 * (4 + 2) + 5 * 4 * 192)


@pytest.mark.parametrize("method", [Identity(), ScaleByInput(), KeepLarge()], ids=lambda method: method.name)
def test_more_workers_never_take_less(method: Any) -> None:
    calibration = None if isinstance(method, KeepLarge) else (16, 256)
    taken = [walk_memory(WalkSize(SMALL, method, calibration), workers) for workers in range(1, 9)]
    assert taken == sorted(taken)
    size = WalkSize(SMALL, method, calibration)
    for workers in range(1, 9):
        chosen = most_workers(size, 8, int(taken[workers - 1] / HEADROOM) + 1)
        assert walk_memory(size, chosen) <= taken[workers - 1] + 1
        assert chosen >= workers
    assert most_workers(size, 8, None) == 8
    assert most_workers(size, 8, 1) == 1


def test_memory_depends_neither_on_depth_nor_on_samples() -> None:
    deep = replace(SMALL, blocks=SMALL.blocks * 30)
    few = walk_memory(WalkSize(SMALL, Identity(), (16, 64)), 2) - 8 * 16 * 64
    assert walk_memory(WalkSize(deep, Identity(), (160, 64)), 2) - 8 * 160 * 64 == few


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, *OTHER_ARCHITECTURES))
def test_facts_agree_with_the_model(architecture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture, tokenizer=False))
    facts = facts_of(checkpoint)
    weights = {layer.name: layer.out_features * layer.in_features for layer in checkpoint.block_layers()}
    assert sum(group.weights for block in facts.blocks for group in block.groups) == sum(weights.values())
    assert len(facts.blocks) == checkpoint.config["num_hidden_layers" if architecture != "gpt2" else "n_layer"]
    assert facts.stored_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert all(block.parameters >= sum(group.weights for group in block.groups) for block in facts.blocks)
    assert 0 < facts.hidden <= 128 and facts.vocabulary == 256


def test_layers_that_share_an_input_are_one_group(material: Path) -> None:
    checkpoint = Checkpoint(material / "model")
    leaves = [len(group.rows) for group in facts_of(checkpoint).blocks[0].groups]
    assert sorted(leaves) == [1, 1, 2, 3]
    skipping = facts_of(checkpoint, ["k_proj", "layers.1.*"])
    assert sum(group.skipped for group in skipping.blocks[0].groups) == 1
    assert all(group.skipped for group in skipping.blocks[1].groups)


@pytest.mark.parametrize(
    ("scheme", "skip"),
    [
        (None, ()),
        (Round().scheme(), ()),
        (Round(num_bits=3, symmetric=False).scheme(), ("down_proj",)),
        (Round(group_size=None).scheme(), ()),
    ],
    ids=["dense", "W4", "W3 asymmetric, one skipped", "W4 by channel"],
)
def test_predicted_bytes_are_those_of_the_result(material: Path, tmp_path: Path, scheme: Any, skip: Any) -> None:
    checkpoint = Checkpoint(material / "model")
    method: Any = KeepLarge()
    if scheme is not None:
        width = scheme.group_size
        method = Round(num_bits=scheme.num_bits, symmetric=scheme.symmetric, group_size=width)
    writer = ModelWriter(checkpoint, tmp_path / "out", scheme=scheme, skip=skip)
    walk(checkpoint, method, None, writer, skip=skip)
    writer.finish()
    actual = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.is_file())
    report = sum(len(layer.name) + 330 for layer in checkpoint.block_layers())
    assert result_bytes(checkpoint, scheme, skip) - report == actual


def test_a_cap_changes_the_workers_and_no_byte(
    material: Path, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, plan_of: Callable[[str], Plan]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    plan = plan_of(SPEC)
    free = foresee(plan, tmp_path / "nowhere", [None] * 4)
    sizes = [estimate.size for estimate in free[1:3]]
    assert [estimate.workers for estimate in free] == [None, 2, 2, None]
    one, two = (max(walk_memory(size, workers) for size in sizes if size) for workers in (1, 2))
    digests = []
    for cap, expected in ((one, 1), (two / HEADROOM + 1, 2)):
        assert one < two
        path = material / "capped.yaml"
        path.write_text(SPEC + f"max_memory_gib: {cap / GIB!r}\n", encoding="utf-8")
        settings = Settings(tmp_path / f"home-{expected}", tracking_uri)
        document = run_locally(path, discover(), settings, Watcher()).document()
        assert [step["predicted"].get("workers") for step in document["steps"][1:3]] == [expected] * 2
        digests.append([step["artifact"]["digest"] for step in document["steps"]])
    assert digests[0] == digests[1]


def test_the_walk_gives_the_same_bytes_with_any_number_of_workers(material: Path, tmp_path: Path) -> None:
    written = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        checkpoint = Checkpoint(material / "model")
        writer = ModelWriter(checkpoint, folder)
        tokens = CalibrationSet(make_tokens(sequences=90), {})
        walk(checkpoint, ScaleByInput(), tokens, writer, settings=WalkSettings(workers=workers))
        writer.finish()
        written.append((folder / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


def test_a_cap_that_is_too_small_is_refused_with_what_would_do(plan_of: Callable[[str], Plan], tmp_path: Path) -> None:
    plan = plan_of(SPEC + "max_memory_gib: 0.0001\n")
    with pytest.raises(PreflightError) as caught:
        foresee(plan, tmp_path / "home", [None] * 4)
    wanda, gptq = caught.value.problems
    assert "prune wanda needs" in wanda.what and "max_memory_gib allows 104.86 KiB" in wanda.what
    assert wanda.where and ":7" in wanda.where
    assert "set max_memory_gib (or ORCHESTRATOR_MAX_MEMORY_GIB) to 0.01 or more" in str(wanda.remedy)
    assert "quantize gptq" in gptq.what


def test_what_is_cached_is_not_refused(
    material: Path, tmp_path: Path, tracking_uri: str, plan_of: Callable[[str], Plan]
) -> None:
    settings = Settings(tmp_path / "home", tracking_uri)
    run_locally(material / "spec.yaml", discover(), settings, Watcher())
    plan = plan_of(SPEC + "max_memory_gib: 0.0001\n")
    store = ArtifactStore(settings.home)
    known = [store.lookup(step.fingerprint) for step in plan.steps]
    assert all(known), "a cap changes no fingerprint"
    foresee(plan, settings.home, known)


def test_long_windows_are_named_when_they_take_the_room() -> None:
    size = WalkSize(SMALL, Identity(), (2, 8192))
    short = walk_memory(WalkSize(SMALL, Identity(), (2, 2048)), 1)
    assert walk_memory(size, 1) > short > walk_memory(WalkSize(SMALL, Identity(), (2, 1024)), 1)


def test_the_machine_itself_can_be_too_small(plan_of: Callable[[str], Plan], tmp_path: Path) -> None:
    text = SPEC.replace("length_tokens: 32, windows: 8}", "length_tokens: 128, windows: 800, batch: 512}")
    plan = plan_of(text.replace("sequences: 8, length_tokens: 32", "sequences: 2, length_tokens: 4096"))
    machine = Machine(8 * GIB, 8 * GIB, 1)
    estimates = estimate_steps(plan, [None] * 4, machine, Experience(), None)
    dense = facts_of(plan.source)
    assert not any(memory_problems(s, e, machine, None, dense) for s, e in zip(plan.steps, estimates, strict=True))
    short_windows, all_at_once = estimates[2], estimates[3]
    for step, estimate, lever in ((2, short_windows, "windows of at most"), (3, all_at_once, "set batch to at most")):
        room = estimate.peak_memory_bytes - estimate.work.memory_bytes // 3
        tight = Machine(room - machine_module_resident(), 8 * GIB, 1)
        (problem,) = memory_problems(plan.steps[step], estimate, tight, None, dense)
        assert "are to be had on this machine" in problem.what
        assert lever in str(problem.remedy)


def test_a_teacher_that_does_not_fit_beside_its_student_is_offered_the_cache(
    plan_of: Callable[[str], Plan], tmp_path: Path
) -> None:
    text = SPEC[: SPEC.index("  - validate")]
    distill = "  - distill: {}\n    with: {{source: text.txt, sequences: 8, length_tokens: 32, updates: 2{}}}\n"

    def told(method: str, more: str = "", share: float = 0.97) -> str:
        plan = plan_of(text + distill.format(method, more))
        estimate = estimate_steps(plan, [None] * 4, Machine(8 * GIB, 8 * GIB, 1), Experience(), None)[3]
        room = estimate.peak_memory_bytes - int(estimate.work.memory_bytes * (1 - share))
        tight = Machine(room - machine_module_resident(), 8 * GIB, 1)
        (problem,) = memory_problems(plan.steps[3], estimate, tight, None, facts_of(plan.source))
        return str(problem.remedy)

    assert told("logits").endswith("or set teacher_top_k: 64")
    assert told("gkd", ", prompt_tokens: 4, answer_tokens: 4").endswith("or set sequences_at_once: 1")
    assert told("logits", share=0.5).endswith("or set teacher_top_k: 64 and sequences_at_once: 1 and recompute: true")


def machine_module_resident() -> int:
    from orchestrator.usage import resident_bytes

    return resident_bytes()


def test_a_full_disk_is_found_before_any_compute(
    plan_of: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(SPEC)
    estimates = estimate_steps(plan, [None] * 4, Machine(8 * GIB, 0, 1), Experience(), None)
    waiting = list(zip(plan.steps, estimates, strict=True))
    results = sum(estimate.disk_bytes for estimate in estimates)
    # Float32 of 8 x 32 tokens: before and behind a block, into and out of the last layers of its two halves.
    hidden = 8 * 32 * 4 * (2 * 64 + 64 + 64 + 128 + 64)
    assert max(estimate.work.scratch_bytes for estimate in estimates) == hidden
    statistics = sum(estimate.statistics_bytes for estimate in estimates)
    needed = results + hidden + statistics
    assert disk_problems(plan, waiting, Machine(GIB, needed, 1), tmp_path) == []
    (problem,) = disk_problems(plan, waiting, Machine(GIB, needed - 1, 1), tmp_path)
    assert "on the disk that holds" in problem.what and "ORCHESTRATOR_STATISTICS_GIB to" in str(problem.remedy)
    monkeypatch.setenv("ORCHESTRATOR_STATISTICS_GIB", "0.00001")
    assert disk_problems(plan, waiting, Machine(GIB, results + hidden + 20_000, 1), tmp_path) == []


def test_a_run_records_predictions_beside_measurements(
    material: Path, tmp_path: Path, tracking_uri: str, plan_of: Callable[[str], Plan]
) -> None:
    settings = Settings(tmp_path / "home", tracking_uri)
    execution = run_locally(material / "spec.yaml", discover(), settings, Watcher())
    store = ArtifactStore(settings.home)
    for step in execution.document()["steps"]:
        predicted = step["predicted"]
        assert {"seconds", "peak_memory_bytes", "disk_bytes"} <= predicted.keys()
        # Layers of a few thousand weights: the numbers reported of each are a good part of the artifact.
        if step["stage"] in ("prune", "quantize", "calibrate"):
            assert predicted["disk_bytes"] == pytest.approx(step["disk_bytes"], rel=0.15)
        record = store.record(step["fingerprint"])
        assert record is not None and record.predicted == predicted
        assert b"predicted" not in (Path(step["artifact"]["path"]) / "manifest.json").read_bytes()
    journal = [json.loads(line) for line in execution.journal.path.read_text().splitlines()]
    finished = [line for line in journal if line["event"] == "step finished"]
    assert all(line["predicted"]["peak_memory_bytes"] and line["peak_memory_bytes"] for line in finished)

    again = run_locally(material / "spec.yaml", discover(), settings, Watcher()).document()
    assert [step["predicted"] for step in again["steps"]] == [None] * 4


def test_what_was_measured_makes_the_next_prediction(material: Path, tmp_path: Path, tracking_uri: str) -> None:
    settings = Settings(tmp_path / "home", tracking_uri)
    run_locally(material / "spec.yaml", discover(), settings, Watcher())
    experience = Experience.read(settings.home)
    assert experience.engine == "local" and experience.base("quantize gptq", "local") > 100 << 20
    ((nominal, seconds),) = experience.seconds["quantize gptq"]
    assert experience.predict("quantize gptq", nominal) == pytest.approx(seconds, rel=0.3)
    (settings.home / "machine.json").write_text("{", encoding="utf-8")
    assert Experience.read(settings.home) == Experience()


def test_seconds_are_fitted_as_overhead_and_rate() -> None:
    pairs = [(nominal, 2.0 + 3.0 * nominal) for nominal in (0.1, 1.0, 10.0, 30.0)]
    overhead, ratio = fit_line(pairs, (0.5, 1.0))
    assert overhead == pytest.approx(2.0, rel=0.1) and ratio == pytest.approx(3.0, rel=0.1)  # the assumed line pulls
    assert fit_line([], (0.5, 1.0)) == pytest.approx((0.5, 1.0))
    assert min(fit_line([(1.0, 5.0), (10.0, 1.0)], (0.5, 1.0))) >= 0


def test_limits_come_from_the_environment() -> None:
    assert memory_limit({}) is None
    assert memory_limit({"ORCHESTRATOR_MAX_MEMORY_GIB": "1.5"}) == 3 * 2**29
    for text in ("nan", "-1", "much", "0"):
        with pytest.raises(PreflightError, match="ORCHESTRATOR_MAX_MEMORY_GIB"):
            memory_limit({"ORCHESTRATOR_MAX_MEMORY_GIB": text})
    assert limit_from({}) == 20 * GIB and limit_from({"ORCHESTRATOR_STATISTICS_GIB": "0.5"}) == GIB // 2
    for text in ("nan", "inf", "-1", "much"):
        with pytest.raises(PreflightError, match="ORCHESTRATOR_STATISTICS_GIB"):
            limit_from({"ORCHESTRATOR_STATISTICS_GIB": text})
    assert num_threads({"OMP_NUM_THREADS": "3"}) == 3
    assert 1 <= num_threads({}) <= 4096


def test_the_control_group_counts_if_it_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB",
        "/proc/self/cgroup": "0::/job",
        "/sys/fs/cgroup/memory.max": "max",
        "/sys/fs/cgroup/job/memory.max": "3000000",
        "/sys/fs/cgroup/job/memory.current": "2000000",
        "/sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 500\nactive_file 20",
    }
    monkeypatch.setattr(machine_module, "_text", lambda path: texts.get(str(path), ""))
    assert machine_module.available_memory() == 1_000_520
    texts["/sys/fs/cgroup/job/memory.max"] = "max"
    assert machine_module.available_memory() == 4000 * 1024


def test_work_adds_up_and_memory_is_used_again() -> None:
    both = Work(memory_bytes=5, disk_bytes=1, operations=2).then(Work(memory_bytes=3, disk_bytes=1, calls=4))
    assert both == Work(memory_bytes=5, disk_bytes=2, operations=2, calls=4)
    assert both.times(2) == Work(memory_bytes=5, disk_bytes=2, operations=4, calls=8)


@pytest.mark.parametrize(("step", "question"), [(2, "working_bytes"), (3, "estimate")])
def test_a_method_that_cannot_say_what_it_takes_is_named(
    plan_of: Callable[[str], Plan], monkeypatch: pytest.MonkeyPatch, step: int, question: str
) -> None:
    plan = plan_of(SPEC)
    monkeypatch.setattr(type(plan.steps[step].method), question, lambda *_: 1 / 0)
    name = type(plan.steps[step].method).__name__
    with pytest.raises(PreflightError, match=rf"{name} cannot say what it will take: ZeroDivisionError"):
        estimate_steps(plan, [None] * 4, Machine(8 * GIB, 8 * GIB, 1), Experience(), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_before_any_compute(
    plan_of: Callable[[str], Plan], tmp_path: Path
) -> None:
    plan = plan_of(SPEC + "device: cuda\n")
    with pytest.raises(PreflightError, match=r"device is cuda, but .*set device: cpu") as caught:
        foresee(plan, tmp_path / "nowhere", [None] * 4)
    assert len(caught.value.problems) == 2, "of the two steps that would use it"


def test_gptq_says_what_solving_takes() -> None:
    from orchestrator_quantization.gptq import GPTQ

    square, weight = 512**2, 256 * 512
    assert GPTQ(group_size=None).working_bytes(256, 512) == max(16 * square, 4 * square + 18 * weight)
    assert GPTQ(group_size=None, act_order=True).working_bytes(256, 512) == 20 * square


def test_config_that_says_less_is_enough(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tokenizer=False)
    edit_config(folder, num_key_value_heads=None, head_dim=None, vocab_size=None)
    facts = facts_of(Checkpoint(folder))
    assert (facts.kv_heads, facts.head_dim, facts.vocabulary) == (4, 16, 256)
    assert torch.is_tensor(make_tokens())
