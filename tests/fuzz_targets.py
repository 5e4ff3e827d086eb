"""What is fuzzed: functions that read bytes which somebody else may have written.

Each target takes bytes and must return, or raise an `OrchestratorError` that says what to do: `check` lets no other
exception through. `tests/test_fuzz.py` drives them with hypothesis, `benchmarks/fuzz.py` with a coverage-guided fuzzer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from orchestrator.artifact import MANIFEST, ArtifactStore
from orchestrator.attention import ModelShape
from orchestrator.bill import check_bill
from orchestrator.canonical import canonical_json
from orchestrator.checkpoint import SINGLE_WEIGHT_FILE, WEIGHT_INDEX, Checkpoint
from orchestrator.checks import check_config
from orchestrator.digests import FileDigests
from orchestrator.errors import OrchestratorError
from orchestrator.facts import facts_of
from orchestrator.html_report import read_lineage, run_page
from orchestrator.journal import Journal
from orchestrator.promotion.approval import Approvals
from orchestrator.promotion.history import History
from orchestrator.promotion.policy import VARIABLE, policy_for
from orchestrator.provenance import CARD, describe_source
from orchestrator.release import parse
from orchestrator.serving import plan_kv
from orchestrator.signing import check_signature
from orchestrator.simulation.trace import Trace
from orchestrator.spec import PipelineSpec, load_spec, read_spec, validate_strictly
from orchestrator.store import open_store
from orchestrator.zeros import zeros_note

REPOSITORY = Path(__file__).parents[1]
DIGEST = "0" * 64
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 4,
}


@contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder, in memory where there is such a place: a fuzzer makes thousands."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place) as name:
        yield Path(name)


def specification(data: bytes) -> None:
    """A specification: what is valid of it, and all of it; a valid one says the same when written as JSON again."""
    with _folder() as folder:
        path = folder / "spec.yaml"
        path.write_bytes(data)
        parts = read_spec(path)
        for fault in parts.faults:
            assert fault.what and fault.where and str(fault), fault
            assert parts.line_of(fault) > 0, fault
        spec = load_spec(path).spec
        again = validate_strictly(PipelineSpec, spec.model_dump(mode="json", by_alias=True))
        assert again == spec


def plan(data: bytes) -> None:
    """A specification, planned on a model that is there: parameters, gates, paths, chains. The hub is not asked."""
    from orchestrator.plan import make_plan

    away = OSError("offline")
    with (
        _folder() as folder,
        patch("huggingface_hub.snapshot_download", side_effect=away),
        patch("huggingface_hub.HfApi.dataset_info", side_effect=away),
    ):
        _write_model(folder / "model", canonical_json(_LLAMA), _weights())
        (folder / "train.txt").write_text("a b c " * 2000)
        (folder / "valid.txt").write_text("d e f " * 2000)
        (folder / "spec.yaml").write_bytes(data)
        make_plan(folder / "spec.yaml", _methods(), folder / "home")


def manifest(data: bytes) -> None:
    """manifest.json of an artifact: found by path, verified, shown, and made a page of."""
    with _folder() as folder:
        made = folder / "home" / "artifacts" / "made"
        made.mkdir(parents=True)
        (made / MANIFEST).write_bytes(data)
        artifact = ArtifactStore(folder / "home").find(str(made))
        artifact.damage()
        assert artifact.bytes >= 0
        json.dumps(artifact.metrics)
        run_page(read_lineage(folder / "home", artifact))


def listing(data: bytes) -> None:
    """release.json of a release."""
    release = parse("file:///store/model/1", data)
    for file in release.files:
        assert not {"..", ""} & set(file.key.split("/")), file
    check_signature(release, None, None)


def papers(data: bytes) -> None:
    """model.sig and bom.cdx.json of a release; both are given the same bytes."""
    release = parse("file:///store/model/1", canonical_json({"files": [{"key": "a", "sha256": DIGEST, "bytes": 0}]}))
    for read in (
        lambda: check_signature(release, data, None),
        lambda: check_bill(release.uri, data, release.files),
    ):
        try:
            read()
        except OrchestratorError as error:
            check_message(error)


def pointer(data: bytes) -> None:
    """The first entry of a promotion history, a decision, and the policy: all given the same bytes."""
    with _folder() as folder:
        store = open_store(str(folder))
        for place in ("m/.promotion/history/00000001.json", f"m/.promotion/approvals/{DIGEST}/production/000001.json"):
            (folder / place).parent.mkdir(parents=True)
            (folder / place).write_bytes(data)
        (folder / "promotion.yaml").write_bytes(data)
        history = History(store, "m")
        for read in (
            lambda: [stored.entry.document() for stored in history.entries()],
            history.head,
            lambda: Approvals(store, "m").decisions(DIGEST, "production"),
            lambda: Approvals(store, "m").require(DIGEST, "production"),
            lambda: policy_for("m", folder, {VARIABLE: ""}),
        ):
            try:
                read()
            except OrchestratorError as error:
                check_message(error)


def weights(data: bytes) -> None:
    """A safetensors file, its header and its tensors."""
    with _folder() as folder:
        _write_model(folder, canonical_json(_LLAMA), data)
        _look_at(Checkpoint(folder))


def index(data: bytes) -> None:
    """model.safetensors.index.json, and the model card."""
    with _folder() as folder:
        _write_model(folder, canonical_json(_LLAMA), _weights())
        (folder / WEIGHT_INDEX).write_bytes(data)
        (folder / CARD).write_bytes(data)
        checkpoint = Checkpoint(folder)
        describe_source(checkpoint)
        for name in checkpoint.weight_files:
            assert "/" not in name, name


def config(data: bytes) -> None:
    """config.json: what planning, serving plans and zeros read of it."""
    with _folder() as folder:
        _write_model(folder, data, _weights())
        checkpoint = Checkpoint(folder)
        described = checkpoint.config
        for read in (
            lambda: _look_at(checkpoint),
            lambda: describe_source(checkpoint),
            lambda: _planned(described),
        ):
            try:
                read()
            except OrchestratorError as error:
                check_message(error)


def settings(data: bytes) -> None:
    """Values of `--set`, one a line, for every serving engine that is installed."""
    from orchestrator.cli_serving import _engine
    from orchestrator.method import Stage

    lines = data.decode("utf-8", "replace").split("\n")[:8]
    for name in ("vllm", "sglang", "llama_cpp"):
        assert _methods().find(Stage.REGISTER, name)
        try:
            engine = _engine(name, 8.0, 64, lines)
            engine.plan(ModelShape.from_config(_LLAMA), 1000)
        except OrchestratorError as error:
            check_message(error)


def trace(data: bytes) -> None:
    """A recorded trace, as JSON lines, as a table, and packed."""
    with _folder() as folder:
        for name in ("trace.jsonl", "trace.csv", "trace.jsonl.gz"):
            (folder / name).write_bytes(data)
            try:
                for at, _ in enumerate(Trace(folder / name)):
                    if at > 1000:
                        break
            except OrchestratorError as error:
                check_message(error)


def home(data: bytes) -> None:
    """Files of the home folder: journal, memory of digests, record of a step. Damaged ones cost time, or say so."""
    with _folder() as folder:
        for name in ("runs/1.jsonl", "file-digests.json", f"steps/{DIGEST}.json", "registry-answers.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        Journal(folder, "1").events()
        assert FileDigests(folder, trust=True).sha256(folder / "file-digests.json")
        ArtifactStore(folder).lookup(DIGEST)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        specification, plan, manifest, listing, papers, pointer, weights, index, config, settings, trace, home,
    )
}  # fmt: skip


def check(target: Callable[[bytes], None], data: bytes) -> bool:
    """Run a target: it returns, or raises an error for people. Anything else is a bug. Whether it took the bytes."""
    try:
        target(data)
    except OrchestratorError as error:
        check_message(error)
        return False
    return True


def check_message(error: OrchestratorError) -> None:
    """What went wrong is said, with what to do about it or the place where it stands; short, and it can be shown."""
    assert error.problems
    for problem in error.problems:
        assert problem.what.strip(), error
        assert problem.remedy or problem.where, f"nothing says what to do: {problem}"
        assert len(str(problem)) < 5000, f"{len(str(problem))} characters: {str(problem)[:200]}"
        assert "\x1b" not in str(problem), f"would steer a terminal: {problem!r}"
    str(error).encode()


def with_entries(name: str, **entries: Any) -> bytes:
    """The first valid input of a target that is JSON, with other entries."""
    return canonical_json({**json.loads(seeds(name)[0]), **entries})


def seeds(name: str) -> list[bytes]:
    """Valid inputs of a target, from which a fuzzer starts."""
    specs = [path.read_bytes() for path in sorted((REPOSITORY / "flows" / "specs").glob("*.yaml"))]
    entry = {
        "layout": 1, "sequence": 1, "time": "2026-11-29T00:00:00.000000Z", "kind": "promote", "model": "m",
        "alias": "production", "version": "1", "release": {"name": "m/1", "uri": "file:///m/1", "digest": DIGEST},
        "previous": None, "actor": "a", "reason": None, "forced": [], "approval": None, "previous_sha256": None,
        "nonce": "0",
    }  # fmt: skip
    placed = {"version": "1", "release": entry["release"], "since": 1, "promoted": 1}
    decision = {
        "layout": 1, "model": "m", "version": "1", "digest": DIGEST, "alias": "production", "decision": "approve",
        "by": "a", "actor": "a", "time": entry["time"], "expires": "2036-11-29T00:00:00.000000Z", "reason": None,
    }  # fmt: skip
    made = {
        "schema": 1, "fingerprint": DIGEST, "stage": "quantize", "method": "rtn", "kind": "model", "inputs": {},
        "identity": {"parameters": {"num_bits": 4}, "name": "m", "plugin": {"distribution": "d", "version": "1"}},
        "invariants": {"zeros": {"sparsity": 0.5}}, "metrics": {"perplexity": 1.5},
        "files": {"a": {"sha256": DIGEST, "bytes": 1}},
    }  # fmt: skip
    events = [
        {"time": 1.5, "event": "run started", "pipeline": "p",
         "steps": [{"stage": "quantize", "method": "rtn", "fingerprint": DIGEST, "demands": {"require": {}}}]},
        {"time": 2.5, "event": "step finished", "step": 0, "digest": DIGEST, "cached": False, "seconds": 1.0,
         "predicted": {"seconds": 2.0}, "gates": []},
        {"time": 3.5, "event": "run failed", "error": "e", "kind": "GateError"},
    ]  # fmt: skip
    statement = {"_type": "t", "predicateType": "p", "predicate": {"resources": [
        {"name": "a", "algorithm": "sha256", "digest": DIGEST}]}}  # fmt: skip
    from base64 import b64encode

    signature = {
        "verificationMaterial": {"publicKey": {"hint": "h"}},
        "dsseEnvelope": {"payload": b64encode(canonical_json(statement)).decode(), "payloadType": "t",
                         "signatures": [{"sig": "c2ln", "keyid": ""}]},
    }  # fmt: skip
    bill = {"components": [{"type": "file", "name": "a", "hashes": [{"alg": "SHA-256", "content": DIGEST}]}]}
    quantized = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {
        "targets": ["Linear", "re:.*q_proj"], "weights": {"num_bits": 4, "group_size": 4}}}}  # fmt: skip
    tables = {
        "specification": specs,
        "plan": [_PLANNED, specs[0], specs[-1]],  # without those that ask another process about shapes
        "manifest": [canonical_json(made)],
        "listing": [canonical_json({"schema": 1, "files": [{"key": "a/b", "sha256": DIGEST, "bytes": 1}]})],
        "papers": [canonical_json(signature), canonical_json(bill)],
        "pointer": [
            canonical_json({**entry, "state": {"production": placed}}),
            canonical_json(decision),
            b"models:\n  m*:\n    require_approval: [production]\n    approvers: [ada]\n    webhook: https://a.b/c\n",
        ],
        "weights": [_weights()],
        "index": [
            canonical_json({"metadata": {}, "weight_map": {"lm_head.weight": SINGLE_WEIGHT_FILE}}),
            b"---\nlicense: mit\ndate: 2001-01-01\n---\n# A model\n",
        ],
        "config": [
            canonical_json(_LLAMA),
            canonical_json({**_LLAMA, "rope_scaling": {"rope_type": "yarn"}, "quantization_config": quantized}),
            *(canonical_json({**_LLAMA, **more}) for more in _OTHERS),
        ],
        "settings": [b"block_size=16\nkv_cache_dtype=fp8", b"prompt_tokens=10\nshared_prefix_tokens=4"],
        "trace": [
            b'{"arrival_s": 0.5, "prompt_tokens": 161, "answer_tokens": [3, 4], "prefix_ids": [7], "chunk_tokens": 64}',
            b'{"timestamp": 1, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}',
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n",
        ],
        "home": [b"\n".join(map(canonical_json, events)), b'{"seconds": 1, "digest": "a"}', b'{"/a": [1]}'],
    }  # fmt: skip
    return tables[name]


_PLANNED = b"""version: 1
name: planned
model: {id: model}
steps:
  - calibrate: text
    with: {source: train.txt, sequences: 4, length_tokens: 16}
  - prune: wanda
    with: {sparsity: 0.5}
    skip: [q_proj]
  - quantize: rtn
    with: {num_bits: 4, group_size: 8}
  - validate: perplexity
    with: {source: valid.txt}
    require: {perplexity_ratio: {max: 1.05}}
    must_not_fall: [perplexity]
  - register: release
    with: {alias: candidate}
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 64}}]
    require: {max_concurrency.vllm: {min: 8}}
"""
# Entries of other families, beside those of a Llama.
_OTHERS: list[dict[str, Any]] = [
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 8, "sliding_window_pattern": 2},
    {"model_type": "deepseek_v3", "kv_lora_rank": 8, "qk_rope_head_dim": 4},
    {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_expand": 2, "mamba_d_conv": 4,
     "mamba_d_state": 4},
    {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-", "mamba_num_heads": 1, "mamba_head_dim": 2,
     "n_groups": 1, "ssm_state_size": 2, "conv_kernel": 4, "head_dim": 4},
    {"model_type": "llama4_text", "head_dim": 4, "no_rope_layers": [1], "attention_chunk_size": 8},
    {"model_type": "lfm2", "layer_types": ["conv"], "conv_L_cache": 3},
]  # fmt: skip


def _write_model(folder: Path, described: bytes, tensors: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(described)
    (folder / SINGLE_WEIGHT_FILE).write_bytes(tensors)


@cache
def _weights() -> bytes:
    """A tiny Llama as safetensors, all zeros."""
    shapes = {
        "lm_head.weight": [4, 8],
        "model.embed_tokens.weight": [4, 8],
        "model.norm.weight": [8],
        "model.layers.0.self_attn.q_proj.weight": [8, 8],
        "model.layers.0.self_attn.k_proj.weight": [4, 8],
        "model.layers.0.mlp.gate_proj.weight": [8, 8],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = canonical_json(header)
    return len(text).to_bytes(8, "little") + text + bytes(end)


def _look_at(checkpoint: Checkpoint) -> None:
    """Everything that planning reads of a model, without torch."""
    for layer in checkpoint.block_layers():
        assert layer.out_features >= 0
    checkpoint.layers_by_block()
    checkpoint.dense_layers()
    for read in (
        lambda: check_config(checkpoint),
        checkpoint.schemes,
        lambda: (checkpoint.positions, checkpoint.stored_dtype, checkpoint.dtype_name, checkpoint.is_quantized),
        lambda: facts_of(checkpoint),
        lambda: zeros_note(checkpoint, {}),
        checkpoint.weight_bytes,
        checkpoint.digest,
    ):
        try:
            read()
        except OrchestratorError as error:
            check_message(error)


def _planned(described: Mapping[str, Any]) -> None:
    shape = ModelShape.from_config(described)
    length = min(64, shape.max_position_embeddings)
    plan_kv(shape, weight_bytes=1000, gpu_memory_gib=8, memory_utilization=0.9, activation_gib=0, max_model_len=length)
    for engine in _engines():
        try:
            engine.plan(shape, 1000)
        except OrchestratorError as error:
            check_message(error)


@cache
def _methods() -> Any:
    from orchestrator.plugins import discover

    return discover()


@cache
def _engines() -> list[Any]:
    from orchestrator.serving_engine import ServingEngine

    classes = [found.cls for found in _methods().installed.values() if issubclass(found.cls, ServingEngine)]
    return [cls(gpu_memory_gib=8.0, max_model_len=1) for cls in classes if cls.name in ("vllm", "llama_cpp", "sglang")]
