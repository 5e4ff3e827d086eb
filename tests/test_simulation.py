"""The simulator against a plain one (`paging_reference`), its invariants at every step, and the paper's claims."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PreflightError, SpecError
from orchestrator.serving import GIB, KVPlan, ModelShape, plan_kv
from orchestrator.simulation import plot
from orchestrator.simulation.batching import Engine
from orchestrator.simulation.contiguous import ContiguousMemory
from orchestrator.simulation.measures import MOST_POINTS, LogHistogram, Tally
from orchestrator.simulation.paging import PagedMemory
from orchestrator.simulation.simulate import POLICIES, PagedPool, Timing, make_memory, simulate
from orchestrator.simulation.traffic import Distribution, Lengths, Request, Trace
from tests import paging_reference as reference

CASES = 160
TIMING = Timing(step_s=0.02, prefill_token_s=1e-4, decode_token_s=2e-5)


def small_case(seed: int) -> tuple[PagedPool, tuple[int, int, int], list[Request]]:
    """A few requests, often more than the memory takes, with shared text and parallel samples."""
    draw = random.Random(seed)
    size, longest = draw.choice([1, 2, 3, 4, 7, 16]), draw.choice([8, 20, 40, 60])
    pool = PagedPool(
        num_blocks=-(-(longest - 1) // size) + draw.choice([0, 1, 3, 8, 20, 60]),
        block_size=size,
        max_model_len=longest,
        max_num_seqs=draw.choice([2, 3, 8, 64]),
        max_num_batched_tokens=draw.choice([1, 8, 30, 1000]),
        watermark=draw.choice([0, 0, 0.05, 0.6]),
        prefix_caching=draw.random() < 0.8,
    )
    chunk, names, most, pause = (
        draw.choice(each) for each in ([1, 3, 4, 5, 8, 16], [1, 2, 4], [1, 1, 2, 3], [1, 10, 60])
    )
    requests, now = [], 0
    for _ in range(draw.randint(1, 30)):
        now += draw.choice([0, 0, draw.randint(0, pause * 100)])
        samples = tuple(draw.randint(1, longest // 2) for _ in range(draw.randint(1, most)))
        prefix = tuple(draw.randrange(names) for _ in range(draw.randint(0, 4))) if draw.random() < 0.7 else ()
        requests.append(Request(now, draw.randint(1, longest * 2 // 3), samples, prefix, chunk if prefix else 0))
    return pool, (draw.randint(1, 100), draw.choice([0, 3]), draw.choice([0, 1, 7])), requests


def engine_of(pool: PagedPool, policy: str, timing: tuple[int, int, int]) -> tuple[Engine, Any]:
    memory = make_memory(pool, policy)
    limits = {"max_num_seqs": pool.max_num_seqs, "max_num_batched_tokens": pool.max_num_batched_tokens}
    return Engine(memory, **limits, timing_ns=timing), memory


def figures(tally: Tally) -> dict[str, int]:
    return {
        "refused": sum(tally.refused.values()),
        "finished": tally.finished,
        "preemptions": tally.preemptions,
        "recomputed": tally.recomputed_tokens,
        "computed": tally.computed_tokens,
        "prompts": tally.prompt_tokens,
        "generated": tally.generated_tokens,
        "peak": tally.peak_running,
        "steps": tally.steps,
        "held": tally.held,
        "filled": tally.filled,
        "spare": tally.spare,
        "external": tally.external,
        "running": tally.running,
        "duration": tally.now_ns - tally.start_ns,
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_it_counts_what_a_token_by_token_simulation_counts(policy: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(CASES):
        pool, timing, requests = small_case(seed)
        plain: Any = reference.ReferencePieces(pool.slots, pool.max_model_len, policy)
        if policy == "paged":
            watermark = int(pool.watermark * pool.num_blocks)
            plain = reference.ReferencePages(
                pool.num_blocks, pool.block_size, watermark=watermark, caching=pool.prefix_caching
            )
        expected = reference.run(
            plain,
            requests,
            max_model_len=pool.max_model_len,
            max_num_seqs=pool.max_num_seqs,
            budget=pool.max_num_batched_tokens,
            timing=timing,
        )
        engine, _ = engine_of(pool, policy, timing)
        tally = engine.run(requests)
        found = figures(tally)
        assert found == {name: expected.get(name, 0) for name in found}, f"seed {seed}"
        delays = expected.get("delays", [])
        assert tally.delays.sum == sum(delays)
        for percent in (50, 99):
            exact = reference.percentile(delays, percent) if delays else 0
            assert tally.delays.quantile(percent) == pytest.approx(exact, rel=1 / 128), f"seed {seed}"
        seen.update(found)
        seen["saved"] += found["prompts"] - found["computed"]
    # The cases are of use only if all of it happens.
    assert seen["refused"] > 100 and seen["finished"] > 1000 and (seen["spare"] or policy == "oracle")
    if policy == "paged":
        assert min(seen["preemptions"], seen["recomputed"], seen["saved"]) > 300
    else:
        assert seen["external"]


def test_tables_references_and_queue_agree_after_every_step() -> None:
    copies = shared = 0
    for seed in range(CASES, CASES + 120):
        pool, timing, requests = small_case(seed)
        engine, memory = engine_of(pool, "paged", timing)
        assert isinstance(memory, PagedMemory)
        blocks = memory.pool
        for _ in engine.steps(requests):
            sequences = [sequence for group in engine.running.values() for sequence in group.sequences]
            tables = Counter(block for one in sequences for block in (*one.shared, *one.own))
            assert blocks.references == Counter(block for one in sequences for block in one.shared)
            assert all(tables[block] == 1 for one in sequences for block in one.own)
            queue = blocks.queued()
            assert len(queue) == blocks.available
            assert sorted([*queue, *tables]) == list(range(pool.num_blocks))
            assert all(blocks.cached[key] in tables or blocks.cached[key] in set(queue) for key in blocks.cached)
            # Waste is below one block for each sequence (arXiv:2309.06180, section 4.3).
            assert memory.held - memory.filled <= len(sequences) * (pool.block_size - 1)
            shared += sum(count > 1 for count in tables.values())
            copies += sum(one.partial for one in sequences)
        assert blocks.available == pool.num_blocks and not blocks.references
        assert memory.filled == memory.spare == memory.held == 0
        assert not memory._buckets and not memory._final and not memory._forks[1:]
        finished = engine.tally.finished + sum(engine.tally.refused.values())
        assert finished == len(requests)
    assert shared > 1000 and copies > 100


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
def test_contiguous_memory_is_whole_again_at_the_end(policy: str) -> None:
    for seed in range(60):
        pool, timing, requests = small_case(seed)
        engine, memory = engine_of(pool, policy, timing)
        assert isinstance(memory, ContiguousMemory)
        whole = [set(holes) for holes in memory.buddies._holes]
        engine.run(requests)
        assert memory.buddies._holes == whole
        assert memory.held == memory.filled == memory.spare == memory.external == 0


def test_a_case_by_hand() -> None:
    """Two requests of 5 + 4 tokens in blocks of 4: 8 slots hold 5, 6, 7 and 8 tokens, step by step."""
    pool = PagedPool(4, 4, 16)
    result = simulate(pool, [Request(0, 5, (4,)), Request(0, 5, (4,))], timing=Timing(1.0, 0.0), policies=["paged"])
    paged = result.results["paged"]
    assert (paged.steps, paged.duration_s, paged.peak_running, paged.mean_running) == (4, 4.0, 2, 2.0)
    assert paged.waste.tokens == pytest.approx((5 + 6 + 7 + 8) / (4 * 8))
    assert (paged.waste.internal, paged.waste.external) == (0, 0)
    assert paged.memory_in_use == 1.0 and paged.tokens_per_s == 2.0
    # Contiguous: 8 slots are exactly one piece of 8, 5 + 4 = 9 slots take a piece of 16, so one waits for the other.
    both = simulate(pool, [Request(0, 5, (4,)), Request(0, 5, (4,))], timing=Timing(1.0, 0.0)).results
    assert both["oracle"].duration_s == 4.0 and both["oracle"].waste.external == 0
    assert both["pow2"].duration_s == 8.0 and both["pow2"].queueing_mean_s == 2.0
    assert both["pow2"].waste.external == pytest.approx(7 / 16) and both["pow2"].waste.internal == pytest.approx(1 / 16)
    assert both["max"].waste.internal == pytest.approx(8 / 16)


def llama_plan(**changes: Any) -> KVPlan:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    }
    values: dict[str, Any] = {"gpu_memory_gib": 24.0, "memory_utilization": 0.92, "activation_gib": 1.0}
    shape = ModelShape.from_config(config)
    return plan_kv(shape, weight_bytes=6 * GIB, max_model_len=8192, **{**values, **changes})


def test_paged_memory_wastes_less_than_4_percent_and_contiguous_most_of_it() -> None:
    """arXiv:2309.06180: under 4 % paged; 61.8 to 79.6 % contiguous (figure 2), with ShareGPT's mean lengths."""
    traffic = Distribution(
        4000, 40.0, Lengths("lognormal", 161, high=2048), Lengths("lognormal", 338, high=2048), seed=1
    )
    report = simulate(PagedPool.from_plan(llama_plan()), traffic, timing=TIMING)
    assert list(report.results) == list(POLICIES)
    waste = {name: result.waste for name, result in report.results.items()}
    assert waste["paged"].total < 0.04
    assert all(waste[name].total > 0.5 for name in ("max", "pow2", "oracle"))
    for name, result in report.results.items():
        assert result.finished == result.requests == 4000, name
        assert result.waste.tokens + result.waste.total == pytest.approx(1)
    running = {name: result.mean_running for name, result in report.results.items()}
    assert running["paged"] > running["oracle"] > running["pow2"] > running["max"]


def test_short_sequences_in_big_blocks_waste_more_than_4_percent() -> None:
    traffic = Distribution(500, 40.0, Lengths("fixed", 20), Lengths("fixed", 20))
    waste = {
        size: simulate(PagedPool(16384 // size, size, 2048), traffic, timing=TIMING, policies=["paged"])
        for size in (1, 16, 128)
    }
    shares = [report.results["paged"].waste.total for report in waste.values()]
    assert shares[0] == 0 and 0.04 < shares[1] < shares[2] and shares[2] > 0.7


def test_shared_prefixes_are_computed_once_and_samples_share_their_prompt() -> None:
    lengths = Lengths("fixed", 40), Lengths("fixed", 20)
    alike = Distribution(300, 20.0, *lengths, prefixes=1, prefix_tokens=160)
    pool = PagedPool(2000, 16, 1024)
    cached = simulate(pool, alike, timing=TIMING, policies=["paged"]).results["paged"]
    # All but the first find the ten full blocks of the prefix.
    assert cached.prefix_tokens_saved == 299 * 160
    assert cached.prefix_hit_rate == pytest.approx(299 * 160 / (300 * 200))
    without = simulate(
        PagedPool(2000, 16, 1024, prefix_caching=False), alike, timing=TIMING, policies=["paged"]
    ).results["paged"]
    assert without.prefix_tokens_saved == 0 and without.memory_in_use > 1.5 * cached.memory_in_use
    several = Distribution(50, 5.0, Lengths("fixed", 320), Lengths("fixed", 20), samples=4)
    samples = simulate(pool, several, timing=TIMING, policies=["paged", "oracle"]).results
    assert samples["oracle"].memory_in_use > 2.5 * samples["paged"].memory_in_use
    assert samples["oracle"].prefix_tokens_saved == samples["paged"].prefix_tokens_saved == 0


def test_the_same_traffic_gives_the_same_report_in_bounded_memory() -> None:
    traffic = Distribution(3000, 30.0, Lengths("lognormal", 60), Lengths("lognormal", 60), prefixes=9, prefix_tokens=32)
    pool = PagedPool(900, 16, 4096)
    first, second = (json.dumps(simulate(pool, traffic, timing=TIMING).as_dict()) for _ in range(2))
    assert first == second
    for result in json.loads(first)["policies"].values():
        series = result["series"]
        assert 50 < len(series["time_s"]) <= MOST_POINTS
        assert all(len(column) == len(series["time_s"]) for column in series.values())
        assert series["time_s"] == sorted(series["time_s"])
        # The first half of the run has about as many points as the second.
        half = sum(time < result["duration_s"] / 2 for time in series["time_s"])
        assert half == pytest.approx(len(series["time_s"]) / 2, rel=0.4)
        assert sum(series["finished"]) == pytest.approx(result["finished"], abs=1)
        assert sum(series["preemptions"]) == result["preemptions"]


def test_a_recorded_trace_is_simulated(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 500 * number, "input_length": 1100, "output_length": 9, "hash_ids": [0, 1, 2 + number]}
        for number in range(20)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    result = simulate(PagedPool(500, 16, 4096), Trace(path), timing=TIMING).results["paged"]
    assert result.finished == 20 and result.prefix_tokens_saved == 19 * 1024


def test_requests_that_cannot_run_are_counted_by_reason() -> None:
    requests = [Request(0, 10, (10,)), Request(0, 30, (3,)), Request(0, 12, (12, 12, 12)), Request(0, 4, (1,) * 9)]
    pool = PagedPool(6, 4, 25, max_num_seqs=8)
    result = simulate(pool, requests, timing=TIMING, policies=["paged"]).results["paged"]
    assert result.finished == 1
    assert result.refused == {
        "longer than max_model_len": 1,
        "longer than the pool": 1,
        "more samples than max_num_seqs": 1,
    }
    nothing = simulate(pool, requests[1:], timing=TIMING).results["paged"]
    assert nothing.finished == 0 and nothing.waste.total == 0 and not nothing.series


def test_the_histogram_is_close_and_small() -> None:
    draw = random.Random(0)
    values = [int(draw.lognormvariate(15, 4)) for _ in range(20_000)]
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    assert histogram.mean() == sum(values) / len(values)
    for percent in (1, 50, 99, 100):
        exact = reference.percentile(values, percent)
        assert histogram.quantile(percent) == pytest.approx(exact, rel=1 / 128)
    assert len(histogram._counts) < 64 * 64


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"num_blocks": 10}, PreflightError, "needs 64 blocks of 16 tokens, 54 more than the 10 there are"),
        ({"num_blocks": 0}, SpecError, "num_blocks is 0"),
        ({"block_size": 0}, SpecError, "block_size is 0"),
        ({"max_model_len": 1}, SpecError, "max_model_len is 1"),
        ({"max_num_seqs": 0}, SpecError, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, SpecError, "max_num_batched_tokens is 0"),
        ({"watermark": float("nan")}, SpecError, "watermark is nan"),
    ],
)
def test_a_pool_that_makes_no_sense_is_refused(values: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        PagedPool(**{"num_blocks": 100, "block_size": 16, "max_model_len": 1024, **values})


def test_what_makes_no_sense_is_refused() -> None:
    pool, one = PagedPool(100, 16, 1024), [Request(0, 1, (1,))]
    with pytest.raises(SpecError, match="step_s is 0"):
        Timing(0, 0)
    with pytest.raises(SpecError, match="prefill_token_s is nan"):
        Timing(1, float("nan"))
    with pytest.raises(SpecError, match=r"no policy 'pages'.*choose from paged, max, pow2, oracle"):
        simulate(pool, one, timing=TIMING, policies=["pages"])
    with pytest.raises(SpecError, match="no policy to simulate"):
        simulate(pool, one, timing=TIMING, policies=[])
    with pytest.raises(SpecError, match="no requests"):
        simulate(pool, [], timing=TIMING)


def test_a_plan_becomes_a_pool() -> None:
    plan = llama_plan()
    pool = PagedPool.from_plan(plan, max_num_seqs=64)
    assert (pool.num_blocks, pool.block_size, pool.max_model_len) == (plan.num_blocks, 16, 8192)
    assert pool.max_num_seqs == 64 and pool.slots == plan.kv_tokens


def test_a_plot_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    traffic = Distribution(400, 30.0, Lengths("lognormal", 60), Lengths("lognormal", 60))
    report = simulate(PagedPool(900, 16, 4096), traffic, timing=TIMING)
    for name in ("one.svg", "two.svg"):
        plot.draw(report, tmp_path / name)
    first = (tmp_path / "one.svg").read_bytes()
    assert first == (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in first and len(first) > 10_000


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = simulate(PagedPool(100, 16, 1024), [Request(0, 1, (1,))], timing=TIMING)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PreflightError, match=r"compression-orchestrator\[bench\]"):
        plot.draw(report, tmp_path / "plot.svg")


def test_it_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, orchestrator.simulation.plot; print({'torch', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
