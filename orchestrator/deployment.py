"""The serving folder of one engine: its own files, ``kv-plan.json``, and a README that says what was assumed.

Used for releases (`orchestrator.bundle`) and for ``orchestrator serve-config``. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, StepError
from orchestrator.serving import KVPlan, ModelShape, gib, tensor_parallel_sizes
from orchestrator.serving_engine import ServingEngine, UnsupportedPolicyError

PLAN_FILE = "kv-plan.json"
README_FILE = "README.md"
_OWN = (PLAN_FILE, README_FILE)
_MOST_DEVICES = 8  # tensor parallelism beyond one machine is not offered as an alternative


def check_engine(engine: ServingEngine, installed: Iterable[type[ServingEngine]]) -> None:
    """Ask an engine whether it can do what its parameters say. Raises `SpecError`; a policy that it cannot honour is
    answered with the installed engines that can."""
    try:
        engine.preflight()
    except UnsupportedPolicyError as error:
        can = sorted(other.name for other in installed if error.policy in other.policies)
        raise UnsupportedPolicyError(error.engine, error.policy, can) from None


def serving_files(engine: ServingEngine, shape: ModelShape, weight_bytes: int) -> dict[str, str]:
    """Return all files of the engine's folder by name. Raises `SpecError`, `PreflightError`, or `StepError`."""
    plan = engine.plan(shape, weight_bytes)
    files: dict[str, str] = {}
    for name, text in engine.render(shape, plan).items():
        if Path(name).name != name or name in _OWN:
            raise StepError(f"the engine {engine.name!r} rendered a file called {name!r}")
        files[name] = text
    document = plan_document(engine, shape, plan, weight_bytes)
    files[PLAN_FILE] = json.dumps(document, indent=2, sort_keys=True) + "\n"
    files[README_FILE] = _readme(engine, shape, plan, document, sorted(files))
    return files


# Numbers of an engine's plan that a gate of a register step can bound, as NAME.ENGINE.
KV_METRICS: Mapping[str, str] = {
    "max_concurrency": "sequences of max_model_len tokens that the KV cache holds at once",
    "kv_tokens": "tokens that the KV cache holds",
    "num_blocks": "blocks of the KV cache",
    "bytes_per_token": "bytes of the KV cache that a token takes on one device",
    "available_bytes": "bytes left to the KV cache on one device",
}


def kv_metrics(engines: Iterable[ServingEngine], shape: ModelShape, weight_bytes: int) -> dict[str, float]:
    """Return `KV_METRICS` of every engine, as NAME.ENGINE. Raises `SpecError` or `PreflightError`."""
    plans = {engine.name: engine.plan(shape, weight_bytes) for engine in engines}
    return {f"{name}.{engine}": float(getattr(plan, name)) for engine, plan in plans.items() for name in KV_METRICS}


def plan_document(engine: ServingEngine, shape: ModelShape, plan: KVPlan, weight_bytes: int) -> dict[str, Any]:
    """The plan as JSON values, with what fits otherwise: other element types, more devices, the expected traffic."""
    return {
        **plan.as_dict(),
        "engine": engine.name,
        "engine_version": engine.version(),
        "model_type": shape.model_type,
        "whole_sequences": plan.whole_sequences,
        "other_dtypes": {
            name: _fitting(engine, shape, weight_bytes, kv_cache_dtype=name)
            for name in engine.cache_dtypes
            if name not in ("auto", plan.kv_cache_dtype)
        },
        "tensor_parallel": {
            str(size): _fitting(engine, shape, weight_bytes, tensor_parallel_size=size)
            for size in tensor_parallel_sizes(shape)
            if size <= _MOST_DEVICES
        },
        "traffic": expected_traffic(engine, plan),
    }


def expected_traffic(engine: ServingEngine, plan: KVPlan) -> dict[str, Any] | None:
    """What the blocks hold of sequences as they are expected; None where nothing is.

    A prefix that all prompts share is kept once. Room for cached prefixes is what running sequences leave.
    """
    if engine.prompt_tokens is None or engine.answer_tokens is None:
        return None
    length = min(engine.prompt_tokens + engine.answer_tokens, plan.max_model_len)
    whole = plan.blocks_for(length)
    sharing = [group for group in plan.groups if group.cap_tokens is None and group.fixed_blocks is None]
    prefix = engine.shared_prefix_tokens if plan.policy == "paged" and engine.shares_prefixes else 0
    shared = sum(min(prefix, plan.held_tokens) // group.block_size for group in sharing)
    own = max(whole - shared, 1)
    usable = plan.num_blocks - plan.reserved_blocks - shared
    sequences = usable / own
    running = min(int(sequences), getattr(engine, "max_num_seqs", None) or int(sequences))
    return {
        "prompt_tokens": engine.prompt_tokens,
        "answer_tokens": engine.answer_tokens,
        "shared_prefix_tokens": engine.shared_prefix_tokens,
        "blocks_of_a_sequence": own,
        "blocks_shared": shared,
        "concurrency": sequences,
        "running": running,
        "prefix_room_blocks": usable - running * own,
    }


def _fitting(engine: ServingEngine, shape: ModelShape, weight_bytes: int, **changes: Any) -> dict[str, Any]:
    """What fits with other parameters, or why nothing does."""
    try:
        other = engine.model_copy(update=changes)
        plan = other.plan(shape, weight_bytes)
        other.render(shape, plan)
    except OrchestratorError as error:
        return {"refused": error.problems[0].what}
    facts = {name: getattr(plan, name) for name in ("bytes_per_token", "num_blocks", "kv_tokens", "max_concurrency")}
    traffic = expected_traffic(other, plan)
    return facts if traffic is None else {**facts, "traffic_concurrency": traffic["concurrency"]}


def _readme(
    engine: ServingEngine, shape: ModelShape, plan: KVPlan, document: Mapping[str, Any], files: list[str]
) -> str:
    """What a person needs who finds this folder."""
    kept = f"at least the last {engine.recent_tokens}"
    policy = {
        "paged": "all of it",
        "window": f"{kept} tokens",
        "streaming_llm": f"the first {engine.sink_tokens} tokens and {kept}",
        "h2o": f"the {engine.heavy_tokens} most attended tokens and {kept}",
    }[plan.policy]
    if plan.policy != "paged":
        policy += f", at most {plan.held_tokens} tokens"
    lines = [
        f"# Serving with {engine.name}",
        "",
        f"Written for {engine.written_for()} (calculated by the rule of {engine.version()}). Files: "
        f"{', '.join(files)}.",
    ]
    if engine.command():
        lines += ["", "From the root of the release, where the model lies:", "", f"    {engine.command()}"]
    lines += [
        "",
        "## The KV cache",
        "",
        f"Of a sequence of up to {plan.max_model_len} tokens the cache keeps {policy}, in {plan.element_dtype}.",
        f"{plan.whole_sequences} of them fit at once: {plan.num_blocks} blocks of {plan.block_size} tokens.",
        "",
        *(f"- {step}" for step in plan.steps),
        "",
        "## Assumed",
        "",
        f"- Rule: {plan.rule}.",
        "- Weights take in memory what they take on disk, evenly divided among the devices.",
        f"- {gib(int(engine.activation_gib * 2**30))} for activations and graphs (activation_gib); engines that "
        "measure it when they start say what it is.",
        *(f"- {note}" for note in engine.notes(shape, plan)),
    ]
    traffic = document["traffic"]
    if traffic:
        lines += [
            "",
            "## Expected traffic",
            "",
            f"Prompts of {traffic['prompt_tokens']} tokens ({traffic['shared_prefix_tokens']} shared) and answers of "
            f"{traffic['answer_tokens']}: {traffic['concurrency']:.1f} sequences at once. With {traffic['running']} "
            f"running, {traffic['prefix_room_blocks']} blocks are left for cached prefixes.",
        ]
    for key, title in (("other_dtypes", "With another element type"), ("tensor_parallel", "On more devices")):
        if sum("refused" not in facts for facts in document[key].values()) > (key == "tensor_parallel"):
            lines += ["", f"## {title}", "", "| | tokens | sequences |", "|---|---|---|"]
            lines += [f"| {name} | {_cells(facts)} |" for name, facts in document[key].items()]
    return "\n".join(lines) + "\n"


def _cells(facts: Mapping[str, Any]) -> str:
    if "refused" in facts:
        return f"{facts['refused']} | -"
    return f"{facts['kv_tokens']:,} | {facts['max_concurrency']:.2f}"
