"""What reads bytes of others says what is wrong with them, or reads them: never any other exception.

Inputs are changed from valid ones (`tests.fuzz_mutations`); `benchmarks/fuzz.py` does the same, guided by coverage.
What either found once is in `FOUND`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import OrchestratorError, Problem, SpecError
from orchestrator.method import Stage
from orchestrator.spec import MAX_BYTES, PipelineSpec, load_spec, validate_strictly
from tests.fuzz_mutations import mutate
from tests.fuzz_targets import TARGETS, check, seeds, with_entries

EXAMPLES = {
    "specification": 40,
    "plan": 12,
    "manifest": 50,
    "listing": 150,
    "papers": 120,
    "pointer": 50,
    "weights": 120,
    "index": 50,
    "config": 60,
    "settings": 8,
    "trace": 100,
    "home": 80,
}
DEEP = b"[" * 20_000
# By target: bytes that once ended in a traceback, in minutes of work or in gigabytes of memory.
FOUND: dict[str, list[bytes]] = {
    "specification": [
        b"\xed\xa0\x80",
        b"version: " + b"x" * 6000,
        b"? \x1b[2J\n: 1\n",
        b"a: " + b"9" * 5000,
        b"[" * 600,
    ],
    "manifest": [
        b"",
        b"[]",
        b'"a"',
        DEEP,
        with_entries("manifest", files={"a": "0x1F"}),
        with_entries("manifest", files=[]),
        with_entries("manifest", files={"../../x": {"sha256": "0" * 64, "bytes": "~"}}),
        with_entries("manifest", identity=["a"]),
        with_entries("manifest", identity={"parameters": 3, "plugin": "~"}),
        with_entries("manifest", inputs="a"),
        with_entries("manifest", inputs={"a": 1}),
        with_entries("manifest", invariants="~nobody"),
        with_entries("manifest", metrics={"perplexity": [1.5]}),
        with_entries("manifest", metrics=10**30),
    ],
    "listing": [DEEP, with_entries("listing", files=[{"key": "x" * 6000, "sha256": "0" * 64, "bytes": 1}])],
    "papers": [
        DEEP,
        b'{"components": [{"type": "file", "name": 0, "hashes": [{"alg": "SHA-256", "content": "0"}]}]}',
    ],
    "pointer": [
        b"models:\n  m: {require_approval: 2001-99-99}\n",
        b"!!float x0---\n",
        b"!!timestamp x\n",
        b"models: {m: {}}\n? \x1b[2J\n: 1\n",
        DEEP,
    ],
    "index": [
        b"---\ndate: 2001-81-01\n---\n",
        b"---\n!!timestamp xlicense: mit\n---\n",
        b"---\n" + b"[" * 600 + b"\n---\n",
        b'{"weight_map": {"lm_head.weight": "../../x.safetensors"}}',
        b'{"weight_map": {"lm_head.weight": "/etc/passwd"}}',
        b'{"metadata":{},"weight\x80' + b"9" * 6000,
        DEEP,
    ],
    "config": [
        with_entries("config", num_hidden_layers=2**40),
        with_entries("config", model_type="gemma2", num_hidden_layers=2**40, head_dim=4, sliding_window=8),
        with_entries("config", model_type="lfm2", layer_types=["conv"], conv_L_cache=3),
        with_entries("config", architectures=5),
        with_entries("config", architectures={}),
        with_entries("config", rope_scaling="nan"),
        with_entries("config", quantization_config=[]),
        with_entries(
            "config",
            quantization_config={
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4, "group_size": 4}}},
            },
        ),
        with_entries(
            "config",
            quantization_config={"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": [1]}}},
        ),
        DEEP,
    ],
    "home": [b'{"a": 1, "seconds": 1e400}', b'{"/a": 1}', "\u2028".encode(), b"\xe2\x80", DEEP],
    "settings": [b"block_size=2001-99-99", b"block_size=!!timestamp x", b"block_size=" + b"[" * 600, b"a=b", b"="],
    "trace": [DEEP, b"\x1f\x8b\x08", b"\0"],
}


def test_every_target_is_driven() -> None:
    assert EXAMPLES.keys() == TARGETS.keys()


# Seeds that are refused although nothing is wrong with them: a model of the hub, which is not asked here; a model card,
# which is read where the index is.
REFUSED_SEEDS = {"plan": [1, 2], "index": [1]}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_valid_bytes_are_read(name: str) -> None:
    refused = [number for number, data in enumerate(seeds(name)) if not check(TARGETS[name], data)]
    assert refused == REFUSED_SEEDS.get(name, [])


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in FOUND.items() for data in found])
def test_what_was_found_once_is_answered(name: str, data: bytes) -> None:
    check(TARGETS[name], data)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_changed_bytes_are_read_or_refused_with_what_to_do(name: str) -> None:
    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(seeds(name)), st.randoms(use_true_random=False))
    def drive(seed: bytes, random: Any) -> None:
        check(TARGETS[name], mutate(seed, random))

    drive()


@settings(max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_answered_by_every_reader(data: bytes) -> None:
    for name, target in TARGETS.items():
        if name not in ("settings", "plan"):
            check(target, data)


@st.composite
def specifications(draw: st.DrawFn) -> dict[str, Any]:
    """Valid specifications, as far as the core can tell."""
    words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=6,
    )
    bounds = st.sampled_from([{"max": 1.05}, {"min": 0, "max": 1}, {"retain": 0.9, "confidence": 0.95}])
    steps = [
        {
            stage: draw(words),
            "with": draw(st.dictionaries(words, values, max_size=3)),
            "skip": draw(st.lists(words, max_size=2)),
            "require": draw(st.dictionaries(words, bounds, max_size=2)),
        }
        for stage in draw(st.lists(st.sampled_from([stage.value for stage in Stage]), min_size=1, max_size=3))
    ]
    model = {"id": draw(words), "revision": draw(words), "dtype": draw(st.sampled_from(["auto", "bfloat16"]))}
    name = draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True))
    seed = draw(st.integers(0, 2**63 - 1))
    return {"version": 1, "name": name, "model": model, "seed": seed, "steps": steps}


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(specifications(), st.booleans())
def test_a_valid_specification_says_the_same_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], flow: bool
) -> None:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(yaml.safe_dump(content, default_flow_style=flow), encoding="utf-8")
    assert load_spec(path).spec == validate_strictly(PipelineSpec, content)


def test_a_specification_of_megabytes_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"a: [" + b"1, " * 4_000_000 + b"]\n")
    with pytest.raises(SpecError, match=f"more than {MAX_BYTES} bytes"):
        load_spec(path)
    path.write_bytes(b"#" * MAX_BYTES)  # as long as may be: it is read, and found empty
    with pytest.raises(SpecError, match="a specification is a mapping"):
        load_spec(path)


def test_what_a_message_quotes_is_short_and_steers_no_terminal() -> None:
    shown = str(Problem("a\x1b[2Jb\x07\u202e" + "x" * 10_000, "c\x9bd", "line one\nline two"))
    assert "\\x1b[2Jb\\x07\\u202e" in shown
    assert "c\\x9bd" in shown
    assert "line one\nline two" in shown
    assert len(shown) < 2200
    assert str(OrchestratorError("half a character: \ud800")).encode() == b"half a character: \\ud800"
