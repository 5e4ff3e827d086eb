"""Names of layers: skip patterns and the sets that engines fuse."""

from __future__ import annotations

import pytest

from orchestrator.layers import fused_groups, ignored_layers, is_skipped, split_fused_groups

NAMES = [
    f"model.layers.{index}.{name}_proj"
    for index in range(12)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.0.mlp.down_proj", 1),
        ("down_proj", 12),
        ("mlp.down_proj", 12),
        ("mlp.*", 36),
        ("layers.1.*", 7),
        ("model.layers.1.*", 7),
        ("*.layers.1[01].*", 14),
        ("proj", 0),
        ("lm_head", 0),
        ("DOWN_PROJ", 0),
    ],
)
def test_patterns_match_whole_trailing_components(pattern: str, count: int) -> None:
    assert sum(is_skipped(name, [pattern]) for name in NAMES) == count


def test_the_output_head_is_always_ignored_and_the_list_is_sorted() -> None:
    assert ignored_layers(NAMES[:7], []) == ["lm_head"]
    assert ignored_layers(NAMES[:7], ["o_proj", "down_proj"]) == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
    ]


def test_fused_sets_are_found_per_block() -> None:
    groups = fused_groups(NAMES)
    assert len(groups) == 24
    assert groups[0] == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert groups[1] == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")


def test_a_skip_that_tears_a_fused_set_apart_is_told_once_per_set() -> None:
    assert split_fused_groups(NAMES, ["down_proj", "layers.3.*", "self_attn.[qkv]_proj"]) == []
    problems = split_fused_groups(NAMES, ["layers.2.self_attn.k_proj", "layers.5.*.up_proj"])
    assert len(problems) == 2
    assert problems[0].startswith("skip leaves out k_proj of model.layers.2.self_attn, but")
    assert problems[1].startswith("skip leaves out up_proj of model.layers.5.mlp, but")
