"""The simulator of KV memory: how fast it is, and what paged memory is worth on traffic like ShareGPT's.

    python -m benchmarks.paging [--requests 1000000] [--save]

1. A million requests and a tenth of that, each policy in a process of its own: CPU seconds, peak resident memory.
2. The setting of figure 2 of Kwon et al. 2023 (arXiv:2309.06180): OPT-13B on an A100 of 40 GB, 15.7 K slots, sequences
   of at most 2048 tokens with ShareGPT's mean lengths (section 6.1: 161 and 338 tokens); beside the published shares.
3. Llama-3.1-8B at 4 bits on 24 GiB under rising load: waste and concurrency of each policy (`paging.svg`).
4. Where "less than 4 %" does not hold: short sequences, big blocks.

The lengths are drawn (lognormal, standard deviation = mean), not ShareGPT's own: bring a trace for one's own traffic.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks import results, targets
from benchmarks.targets import Target
from orchestrator.serving import GIB, ModelShape, plan_kv
from orchestrator.simulation import plot
from orchestrator.simulation.simulate import POLICIES, PagedPool, SimulationReport, Timing, simulate
from orchestrator.simulation.traffic import Distribution, Lengths

# Llama-3.1-8B: config.json, and its weights at W4 g128 (two-byte scales) with embedding and head at two bytes.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
LLAMA_BYTES = LINEAR * (4 + 16 / 128) / 8 + 2 * 2 * 128256 * 4096
# Seconds of a step, of a prompt token and of a sequence in a step: about what such a model takes on such a card.
TIMING = Timing(step_s=0.02, prefill_token_s=1e-4, decode_token_s=2e-5)
SHAREGPT = Lengths("lognormal", 161, high=1024), Lengths("lognormal", 338, high=1024)
PUBLISHED = {"max": 0.204, "pow2": 0.268, "oracle": 0.382, "paged": 0.963}
RATES = (2, 4, 8, 12, 16, 20, 24)
SWEEP_REQUESTS = 10_000
SIZES, MEANS = (8, 16, 32, 64, 128), (16, 64, 256, 1024)


def speed_traffic(requests: int) -> Distribution:
    """160 prompt tokens, 64 of them shared with others, and 200 answer tokens."""
    lengths = Lengths("lognormal", 96, high=4000), Lengths("lognormal", 200, high=4000)
    return Distribution(requests, 36.0, *lengths, prefixes=50, prefix_tokens=64)


def timed(requests: int, policy: str) -> dict[str, float]:
    """Simulate in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.paging", "--requests", str(requests), "--only", policy]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output)
    return found


def one(requests: int, policy: str) -> dict[str, float]:
    """Simulate here, and say what it took."""
    pool = PagedPool(num_blocks=6000, block_size=16, max_model_len=8192)
    wall, cpu = time.perf_counter(), time.process_time()
    report = simulate(pool, speed_traffic(requests), timing=TIMING, policies=[policy])
    result = report.results[policy]
    assert result.finished == requests
    return {
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "steps": result.steps,
        "waste": round(result.waste.total, 4),
        "preemptions": result.preemptions,
        "prefix_hit_rate": round(result.prefix_hit_rate, 4),
    }


def speed(requests: int) -> dict[str, Any]:
    """Every policy at two lengths."""
    found = {name: {str(n): timed(n, name) for n in (requests // 10, requests)} for name in POLICIES}
    print(f"{'':<8}{'requests':>10}{'CPU s':>8}{'wall s':>8}{'peak MiB':>10}{'us/request':>12}")
    for name, by_count in found.items():
        for count, row in by_count.items():
            each = 1e6 * row["cpu_seconds"] / int(count)
            print(
                f"{name:<8}{count:>10}{row['cpu_seconds']:>8.1f}{row['wall_seconds']:>8.1f}"
                f"{row['peak_rss_mib']:>10.1f}{each:>12.1f}"
            )
    return found


def show(title: str, report: SimulationReport) -> None:
    """Print what became of the traffic."""
    print(f"\n{title}")
    columns = "".join(f"{name:>10}" for name in ("tokens", "reserved", "internal", "external", "running", "queue s"))
    print(f"{'':<8}{columns}{'preempted':>11}")
    for name, result in report.results.items():
        waste = result.waste
        print(
            f"{name:<8}{waste.tokens:>10.1%}{waste.reserved:>10.1%}{waste.internal:>10.1%}{waste.external:>10.1%}"
            f"{result.mean_running:>10.1f}{result.queueing_mean_s:>10.1f}{result.preemptions:>11}"
        )


def brief(report: SimulationReport) -> dict[str, Any]:
    """The figures of a report without its course over time."""
    policies = report.as_dict()["policies"]
    return {
        name: {
            key: round(value, 5) if isinstance(value, float) else value
            for key, value in result.items()
            if key not in ("policy", "series", "waste")
        }
        | {"waste": {key: round(value, 5) for key, value in result["waste"].items()}}
        for name, result in policies.items()
    }


def figure_2() -> SimulationReport:
    """The paper's setting, at a load that keeps requests waiting."""
    pool = PagedPool(num_blocks=15_700 // 16, block_size=16, max_model_len=2048, prefix_caching=False)
    return simulate(pool, Distribution(SWEEP_REQUESTS, 4.0, *SHAREGPT, seed=2), timing=TIMING)


def sweep(pool: PagedPool) -> dict[float, SimulationReport]:
    """Every policy at every rate."""
    reports: dict[float, SimulationReport] = {}
    for rate in RATES:
        reports[rate] = simulate(pool, Distribution(SWEEP_REQUESTS, rate, *SHAREGPT, seed=3), timing=TIMING)
        show(f"Llama-3.1-8B W4 on 24 GiB, {rate} requests/s", reports[rate])
    return reports


def limits() -> dict[str, dict[str, float]]:
    """Waste of paged memory by block size and mean length of prompt and answer."""
    found: dict[str, dict[str, float]] = {}
    print("\nWaste of paged memory (prompt and answer of the same mean length)")
    print(f"{'block':<8}" + "".join(f"{f'{mean} tokens':>14}" for mean in MEANS))
    for size in SIZES:
        row = {}
        for mean in MEANS:
            lengths = Lengths("lognormal", mean, high=8000)
            pool = PagedPool(131_072 // size, size, 16_384)
            report = simulate(pool, Distribution(2000, 20.0, lengths, lengths), timing=TIMING, policies=["paged"])
            row[str(mean)] = round(report.results["paged"].waste.total, 4)
        found[str(size)] = row
        print(f"{size:<8}" + "".join(f"{share:>14.1%}" for share in row.values()))
    return found


def main() -> None:
    """Measure, print the tables, and save them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--only", choices=POLICIES, help="simulate one policy here, and print JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/paging.json and paging.svg")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(one(arguments.requests, arguments.only)))
        return
    fast = speed(arguments.requests)
    paper = figure_2()
    show("The setting of arXiv:2309.06180, figure 2", paper)
    print("published tokens: " + ", ".join(f"{name} {share:.1%}" for name, share in PUBLISHED.items()))
    plan = plan_kv(
        ModelShape.from_config(LLAMA),
        weight_bytes=int(LLAMA_BYTES),
        gpu_memory_gib=24,
        memory_utilization=0.92,
        activation_gib=1.0,
        max_model_len=8192,
    )
    pool = PagedPool.from_plan(plan, max_num_seqs=512)
    print(f"\nweights {LLAMA_BYTES / GIB:.2f} GiB; {plan.num_blocks} blocks of {plan.block_size} tokens")
    reports = sweep(pool)
    table = limits()
    few, many = (str(arguments.requests // 10), str(arguments.requests))
    paged = fast["paged"]
    together = sum(row[many]["cpu_seconds"] for row in fast.values())
    most = max(report.results["paged"].waste.total for report in reports.values())
    aimed = [
        Target("CPU seconds, 1M requests, paged", 60.0, paged[many]["cpu_seconds"]),
        Target("CPU seconds, 1M requests, all four policies", 60.0, together),
        Target("peak memory, 1M requests / 100k", 1.05, paged[many]["peak_rss_mib"] / paged[few]["peak_rss_mib"]),
        Target("waste of paged memory, the paper's setting", 0.04, paper.results["paged"].waste.total),
        Target("waste of paged memory, highest in the sweep", 0.04, most),
        *(
            Target(
                f"tokens, {name}: distance from the published share",
                0.06,
                abs(paper.results[name].waste.tokens - share),
            )
            for name, share in PUBLISHED.items()
        ),
    ]
    targets.show(aimed)
    if arguments.save:
        plot.draw_sweep(reports, results.FOLDER / "paging.svg")
        results.save(
            "paging",
            {
                **results.circumstances(),
                "requests": arguments.requests,
                "speed": fast,
                "figure_2": {"published_tokens": PUBLISHED, **brief(paper)},
                "plan": plan.as_dict(),
                "sweep": {str(rate): brief(report) for rate, report in reports.items()},
                "limits": table,
                "targets": [target.record() for target in aimed],
            },
        )


if __name__ == "__main__":
    main()
