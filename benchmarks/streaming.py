"""Every cache policy on streams eight trained windows long: perplexity, bytes held, speed, what is still known.

    python -m benchmarks.streaming [--model quickstart|quickstart-sink|reference-7m|stories260k ...] [--streams N]
                                   [--policy "fp8, scale 1" ...] [--quick] [--save]

Three models with text of the kind that each was trained on (as in `benchmarks.conformance`: stories260k writes its
own). A trained window is what they were trained on at once, 256 tokens (quickstart; its positions are 512) or 512. Each
policy reads the same streams with `validate: streaming`, sixteen tokens a forward pass, which gives what one at a time
gives. Budgets: StreamingLLM and the window hold a trained window; H2O a fifth of that, so StreamingLLM is there with a
fifth as well. The others keep every token. fp8 is there with scales of 1, and for quickstart also with scales that
`quantize: kv_scales` measures on its training text. Beside them the contiguous cache of Transformers, and the model
without a cache, its trained window moved along the stream: what there is to know. Curves are saved as they are drawn,
two points for each trained window.

None of the three has an attention sink, so to drop the first tokens costs them nothing, and the plain window is as good
as StreamingLLM. quickstart-sink is the first with a sink built in (`benchmarks.attention_sink`), as large models have.

Speed is measured by itself, one token a forward pass, after 512 tokens, the policy and the contiguous cache in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.attention_sink import add_sink
from benchmarks.chains import Kitchen
from benchmarks.conformance_models import stories
from benchmarks.material import shared_data
from benchmarks.streaming_plot import POINTS_PER_WINDOW, draw
from orchestrator.api import CachePolicy, Checkpoint, Context, Measured, ModelShape, Stage
from orchestrator.errors import OrchestratorError
from orchestrator.plugins import Methods, discover
from orchestrator.quickstart import prepare
from orchestrator.text import token_windows

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WINDOWS = 8
# Tokens that they were trained on at once.
MODELS = {"quickstart": 256, "quickstart-sink": 256, "stories260k": 512, "reference-7m": 512}
SINK = "quickstart-sink"
CHUNK, DECODED, TURNS, PASSAGES = 16, 64, 3, 8
FP8 = "fp8, calibrated"
SHOWN = ("stream_perplexity", "first_window_perplexity", "last_window_perplexity", "recomputed_ratio")


def policies(window: int, head_dim: int) -> Mapping[str, tuple[str, dict[str, Any]] | None]:
    """By the name in tables: policy and parameters; None is the contiguous cache. window: the trained one, tokens."""
    fifth, group = round(0.2 * window), min(32, head_dim)
    return {
        "contiguous": None,
        "paged": ("paged", {}),
        "window": ("window", {"window": window}),
        "streaming_llm": ("streaming_llm", {"sinks": 4, "window": window - 4}),
        "streaming_llm, a fifth": ("streaming_llm", {"sinks": 4, "window": fifth - 4}),
        "h2o, a fifth": ("h2o", {"heavy": fifth // 2, "recent": fifth - fifth // 2}),
        "int8": ("int8", {}),
        "kivi, 4 bits": ("kivi", {"num_bits": 4, "group_size": group}),
        "kivi, 2 bits": ("kivi", {"num_bits": 2, "group_size": group}),
        "fp8, scale 1": ("fp8", {"scales": "one"}),
        FP8: ("fp8", {}),
    }


def material(name: str, folder: Path) -> tuple[Path, Path]:
    """Return a model and its text."""
    if name in ("quickstart", SINK):
        prepare(folder / "quickstart")
        model, text = folder / "quickstart" / "model", folder / "quickstart" / "valid.txt"
        if name == SINK:
            tokens = token_windows(
                str(folder / "quickstart" / "train.txt"),
                Checkpoint(model).load_tokenizer(),
                num_sequences=1,
                length=MODELS[name],
                random=False,
            )
            add_sink(model, folder / SINK, tokens.tokens_NT[0])
            model = folder / SINK
        return model, text
    model = (shared_data() / "models" / name).resolve()
    if name == "reference-7m":
        return model, shared_data() / "text" / "heldout-code.txt"
    text = folder / "stories.txt"
    text.write_text("\n".join(stories(model, 0, 160)), encoding="utf-8")
    return model, text


def with_scales(model: Path, text: Path, folder: Path, window: int) -> Checkpoint:
    """The model with the scales of an fp8 cache, measured on 64 windows of text."""
    sample = {"source": str(text), "sequences": 64, "length_tokens": window}
    steps: list[dict[str, Any]] = [{"calibrate": "text", "with": sample}, {"quantize": "kv_scales"}]
    return Kitchen(model, folder, folder / "home").run(steps, 0)[0]


def policy_of(methods: Methods, chosen: tuple[str, dict[str, Any]] | None) -> CachePolicy | None:
    """Make a policy from its name and parameters."""
    if chosen is None:
        return None
    name, parameters = chosen
    policy = methods.find(Stage.VALIDATE, name).cls.model_validate(parameters)
    assert isinstance(policy, CachePolicy)
    return policy


def measured(
    model: Checkpoint,
    text: Path,
    policy: CachePolicy | None,
    folder: Path,
    *,
    streams: int,
    window: int,
    windows: int,
    start_token: bool,
) -> dict[str, Any]:
    """One policy on one model: the evaluator's numbers and curves."""
    from orchestrator_evaluation.streaming import Streaming

    evaluator = Streaming(
        source=str(text),
        stream_tokens=windows * window,
        window_tokens=window,
        chunk_tokens=CHUNK,
        streams=streams,
        start_token=start_token,
        passages=PASSAGES,
    )
    context = Context(0, model, None, folder, policy=policy)
    found = evaluator.measure(model, model, context)
    assert isinstance(found, Measured)
    timed = {name for name in found.metrics if "per_second" in name}  # of another way of reading; see `speeds`
    return {
        "metrics": {name: rounded(value) for name, value in found.metrics.items() if name not in timed},
        "curves": {
            name.removesuffix("_by_position"): coarser(curve, window)
            for name, curve in found.curves.items()
            if "perplexity" in name
        },
    }


def coarser(curve: Sequence[tuple[int, float]], window: int) -> list[float]:
    """Join points (tokens read, perplexity up to there) to `POINTS_PER_WINDOW`: geometric means."""
    parts: dict[int, list[float]] = {}
    for tokens, perplexity in curve:
        parts.setdefault((tokens - 2) * POINTS_PER_WINDOW // window, []).append(math.log(perplexity))
    return [rounded(math.exp(sum(values) / len(values))) for values in parts.values()]


def rounded(value: float) -> float:
    """Five digits of a measurement; a count as it is."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def speeds(model: Checkpoint, text: Path, policy: CachePolicy | None, window: int) -> dict[str, float]:
    """Tokens per second, one at a time after a window: the policy's, the contiguous cache's (medians), their ratio."""
    from orchestrator_evaluation.forward import load_float32
    from orchestrator_evaluation.stream import FullCache, Reader

    tokens = token_windows(str(text), model.load_tokenizer(), num_sequences=1, length=window + DECODED, random=False)
    loaded = load_float32(model)
    pieces = [CHUNK] * (window // CHUNK) + [1] * DECODED
    rates: dict[str, list[float]] = {"tokens_per_second": [], "contiguous_tokens_per_second": []}
    for _ in range(TURNS):
        for name, keeping in zip(rates, (policy or FullCache(), FullCache()), strict=True):
            passes = Reader(loaded, model, keeping).read(tokens.tokens_NT[0], pieces).passes[-DECODED:]
            rates[name].append(DECODED / sum(step.seconds for step in passes))
    ratio = statistics.median(mine / other for mine, other in zip(*rates.values(), strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {name: rounded(value) for name, value in (medians | {"speed_ratio": ratio}).items()}


def run(
    name: str,
    folder: Path,
    streams: int,
    windows: int,
    methods: Methods,
    only: Collection[str] = (),
    rows: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """One model: what is found so far, after each policy. only: the policies to measure; rows: of the others."""
    path, text = material(name, folder)
    model, window = Checkpoint(path), MODELS[name]
    rows = dict(rows or {})
    recomputed: list[float] = []
    scale = {"streams": streams, "window": window, "windows": windows, "start_token": name == SINK}
    for label, chosen in policies(window, ModelShape.from_config(model.config).head_dim).items():
        if only and label not in only:
            continue
        if label == FP8:
            if name != "quickstart":  # the only one with text that it was trained on, and no sink
                continue
            model = with_scales(path, text.with_name("train.txt"), folder, window)
        began = time.perf_counter()
        try:
            policy = policy_of(methods, chosen)
            rows[label] = measured(model, text, policy, folder, **scale) | {
                "speed": speeds(model, text, policy, window),
                "policy": None if chosen is None else {chosen[0]: chosen[1]},
            }
            # The same for every policy.
            recomputed = rows[label]["curves"].pop("recomputed_perplexity")
        except OrchestratorError as error:
            rows[label] = {"failed": str(error)}
        print(f"{name:<14} {label:<22} {time.perf_counter() - began:5.0f} s  {summary(rows[label])}", flush=True)
        yield {
            "text": text.name,
            "window_tokens": window,
            "streams": streams,
            "recomputed_perplexity": recomputed,
            "policies": rows,
        }


def saved() -> dict[str, Any]:
    """The models of an earlier run, so that one model can be measured again by itself."""
    path = results.FOLDER / "streaming.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["models"]) if path.is_file() else {}


def summary(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "failed" in row:
        return str(row["failed"])
    metrics = row["metrics"]
    shown = "  ".join(f"{metrics[name]:8.2f}" for name in SHOWN)
    known = "  ".join(f"{metrics[f'retrieval_gain_{where}']:5.2f}" for where in ("inside", "outside"))
    held = f"{metrics['cache_bytes_max'] / 2**10:8.0f} KiB  {metrics['served_cache_bytes_ratio']:6.3f}"
    return f"{shown}  {held}  {row['speed']['speed_ratio']:5.2f}  {known}"


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--policy", nargs="+", choices=list(policies(256, 32)), default=[])
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one stream of two windows")
    parser.add_argument("--save", action="store_true", help="write results/streaming.json and streaming.svg")
    options = parser.parse_args()
    methods = discover()
    found = saved() if options.save else {}
    print(f"{'':<42}{'perplexity: stream, first, last, / recomputed; held; served ratio; speed; gain near, far'}")
    for name in options.model:
        with tempfile.TemporaryDirectory(prefix="streaming-") as folder:
            streams, windows = (1, 2) if options.quick else (options.streams, WINDOWS)
            kept = found[name]["policies"] if options.policy and name in found else {}
            for so_far in run(name, Path(folder), streams, windows, methods, options.policy, kept):
                found[name] = so_far
                if options.save:
                    results.save("streaming", {**results.circumstances(), "models": found})
        if options.save:
            draw({name: found[name] for name in MODELS if name in found}, results.FOLDER / "streaming.svg")


if __name__ == "__main__":
    main()
