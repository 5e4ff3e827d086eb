"""Serve the model of this release with OpenVINO GenAI as ``pipeline.json`` beside this file says.

    python pipeline.py [--tokens N] PROMPT ...

Prompts are answered together, greedily, one line of JSON each; the last line has the figures of the cache. From another
program: ``load(folder)`` returns the `openvino_genai.ContinuousBatchingPipeline`. Needs `pip install openvino-genai`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

SETTINGS = "pipeline.json"


def load(folder: Path) -> Any:
    """Return the pipeline that the settings in `folder`, the one of this file in a release, describe."""
    genai = importlib.import_module("openvino_genai")
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    scheduler = genai.SchedulerConfig()
    for name, value in settings["scheduler"].items():
        setattr(scheduler, name, value)
    eviction = settings.get("cache_eviction")
    if eviction is not None:
        mode = getattr(genai.AggregationMode, eviction["aggregation_mode"])
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(**{**eviction, "aggregation_mode": mode})
    model = folder / settings["model"]
    return genai.ContinuousBatchingPipeline(model, scheduler, settings["device"], settings["properties"])


def main() -> int:
    """Answer the prompts of the command line."""
    genai = importlib.import_module("openvino_genai")
    parser = argparse.ArgumentParser(description="Serve this release with OpenVINO GenAI.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    arguments = parser.parse_args()
    pipeline = load(Path(__file__).resolve().parent)
    tokenizer = pipeline.get_tokenizer()
    wanted = genai.GenerationConfig()
    wanted.max_new_tokens, wanted.do_sample = arguments.tokens, False
    handles = [pipeline.add_request(number, prompt, wanted) for number, prompt in enumerate(arguments.prompts)]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    for prompt, handle in zip(arguments.prompts, handles, strict=True):
        tokens = list(handle.read_all()[0].generated_ids)
        answer = {"prompt": prompt, "text": tokenizer.decode(tokens), "tokens": tokens}
        sys.stdout.write(json.dumps(answer) + "\n")
    figures = pipeline.get_metrics()
    usage = {"cache_size_in_bytes": figures.cache_size_in_bytes, "max_cache_usage_percent": figures.max_cache_usage}
    sys.stdout.write(json.dumps(usage) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
