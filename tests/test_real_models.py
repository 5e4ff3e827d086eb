"""The whole chain on checkpoints as they come: the architectures it promises, and a real pretrained model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.home import Settings
from orchestrator.plugins import discover
from orchestrator.progress import TerminalObserver
from orchestrator.run import run_locally
from tests.tiny import make_model

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")

CHAIN = """\
version: 1
name: {name}
model: {{id: {model}}}
steps:
  - calibrate: text
    with: {{source: {text}, sequences: {sequences}, length_tokens: {length}}}
  - prune: wanda
    with: {{pattern: "2:4"}}
  - distill: logits
    with: {{updates: {updates}, batch_sequences: 2}}
  - quantize: gptq
    with: {{num_bits: {bits}, group_size: {group}, symmetric: {symmetric}, act_order: {act_order}}}
  - validate: perplexity
    with: {{source: {text}, length_tokens: {length}, windows: 16}}
  - validate: fidelity
    with: {{source: {text}, length_tokens: {length}, windows: 8}}
  - register: release
    engines: [{{vllm: {{gpu_memory_gib: 8, max_model_len: {length}}}}}]
"""


def chain(folder: Path, tracking_uri: str, **values: object) -> dict[str, float]:
    """Run the chain and return what the validate steps measured."""
    from rich.console import Console

    spec = folder / "spec.yaml"
    spec.write_text(CHAIN.format(**values), encoding="utf-8")
    observer = TerminalObserver(Console(stderr=True))
    document = run_locally(spec, discover(), Settings(folder / "home", tracking_uri), observer).document()
    assert document["release"]["files"]
    return {
        name: value
        for step in document["steps"]
        if step["stage"] == "validate"
        for name, value in step["metrics"].items()
    }


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        ("qwen2", {"bits": 4, "group": 32, "symmetric": "false", "act_order": "false"}),
        ("qwen3", {"bits": 3, "group": 64, "symmetric": "true", "act_order": "true"}),
        ("mistral", {"bits": 8, "group": "null", "symmetric": "true", "act_order": "false"}),
    ],
)
def test_an_architecture_goes_through_the_chain(
    tmp_path: Path, tracking_uri: str, architecture: str, quantization: dict[str, object]
) -> None:
    model = make_model(tmp_path / "model", architecture)
    (tmp_path / "text.txt").write_text("the quick brown fox reads a book of words. " * 300, encoding="utf-8")
    measured = chain(
        tmp_path,
        tracking_uri,
        name=architecture,
        model=model,
        text=tmp_path / "text.txt",
        sequences=6,
        length=32,
        updates=2,
        **quantization,
    )
    assert 0 < measured["kl_mean"] < 20
    assert measured["perplexity"] > 1


def test_the_tinystories_model_goes_through_the_chain(tmp_path: Path, tracking_uri: str) -> None:
    model, text = SHARED / "models" / "stories260k", SHARED / "text" / "tinyshakespeare.txt"
    if not (model.is_dir() and text.is_file()):
        pytest.skip(f"the shared models are not at {SHARED}; set ORCHESTRATOR_SHARED_DATA")
    measured = chain(
        tmp_path,
        tracking_uri,
        name="stories",
        model=model,
        text=text,
        sequences=32,
        length=128,
        updates=40,
        bits=4,
        group="null",
        symmetric="true",
        act_order="false",
    )
    # Half of the weights gone, the rest in 4 bits: it suffers, and is a language model still.
    assert 1.0 < measured["perplexity_ratio"] < 2.0
    assert measured["top1_agreement"] > 0.2
