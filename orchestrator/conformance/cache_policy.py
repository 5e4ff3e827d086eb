"""Checks for a `CachePolicy`: the tiny model reads streams through it, all at once and a few tokens at a time.

Shape legend: T = tokens of a stream, V = vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.cache_policy import CachePolicy
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.serving import ModelShape

if TYPE_CHECKING:
    import torch

PIECE = 50  # tokens of a forward pass: no power of two, so that it ends inside blocks and groups
LENGTHS = (1, 2, 33, 600)  # of streams; the last is longer than a block, a group and most windows
ONE_BY_ONE = 90  # tokens that are also read alone, each
TOLERANCE = 1e-3  # of the largest logit: sums are taken in another order, and rounded values may round the other way


def check_cache_policy(method: CachePolicy, laboratory: Laboratory, findings: Findings) -> None:
    """The checks K1 to K6, C7 and C8."""
    import torch

    model: Any = laboratory.dense.load()
    shape = ModelShape.from_config(laboratory.dense.config)
    with findings.attempt("K1 runs", "`check_model` for a Llama"):
        method.check_model(laboratory.dense.config)
    with findings.attempt("K1 runs", "`reach_tokens`"):
        reach = method.reach_tokens()
        findings.expect(
            "K1 runs",
            reach is None or (type(reach) is int and reach >= 0),
            f"`reach_tokens` returned {reach!r}; return a number of tokens, or None for all",
        )
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(int(laboratory.dense.config["vocab_size"]), (LENGTHS[-1],), generator=generator)
    before = _state(model, tokens_T)
    read: list[torch.Tensor] = []
    for length in LENGTHS:
        logits = _read(method, model, laboratory, tokens_T[:length], PIECE, shape, 0, findings)
        if logits is None:
            return
        read.append(logits)
    if findings.failed("K2 finite"):
        return
    again = _read(method, model, laboratory, tokens_T, PIECE, shape, 1, findings)
    if again is not None:
        findings.expect(
            "C8 deterministic",
            torch.equal(again, read[-1]),
            "a second stream of the same tokens gives other logits; draw only from generators of your own, and keep "
            "nothing from one stream to the next",
        )
    alone = _read(method, model, laboratory, tokens_T[:ONE_BY_ONE], 1, shape, 0, findings)
    if alone is not None:
        off = float((alone - read[-1][:ONE_BY_ONE]).abs().max() / alone.abs().max())
        findings.expect(
            "K4 in pieces",
            off <= TOLERANCE,
            f"tokens read {PIECE} at once give logits that are {off:.2g} of the largest away from those of tokens read "
            "one by one; let each token see what it would see alone",
        )
    _compare(before, _state(model, tokens_T), findings)


def _read(
    method: CachePolicy,
    model: Any,
    laboratory: Laboratory,
    tokens_T: torch.Tensor,
    piece: int,
    shape: ModelShape,
    global_seed: int,
    findings: Findings,
) -> torch.Tensor | None:
    """Read a stream through a fresh cache; return the logits [T, V], or None if that failed."""
    import torch

    parts: list[torch.Tensor] = []
    held = None
    doing = f"reading {len(tokens_T)} tokens, {min(piece, len(tokens_T))} at a time,"
    with (
        findings.attempt("K1 runs", doing),
        left_alone(findings, doing, seed=global_seed),
        method.attached(model, laboratory.dense) as cache,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        for begin in range(0, len(tokens_T), piece):
            part_T = tokens_T[begin : begin + piece]
            parts.append(model(part_T[None], past_key_values=cache, use_cache=True).logits[0])
        held = method.held_bytes(cache)
    if held is None:
        return None
    logits_TV = torch.cat(parts)
    findings.expect(
        "K2 finite", bool(logits_TV.isfinite().all()), f"{doing} gives logits that are not finite; look for 0 / 0"
    )
    with findings.attempt("K3 bytes", "`planned_bytes`"):
        planned = method.planned_bytes(shape, len(tokens_T))
        findings.expect(
            "K3 bytes",
            type(held) is int and held == planned,
            f"after {len(tokens_T)} tokens `held_bytes` is {held!r}, but `planned_bytes` {planned!r}; count every "
            "tensor that is kept between calls, and no more",
        )
    return logits_TV


def _state(model: Any, tokens_T: torch.Tensor) -> Mapping[str, Any]:
    """What of a model a policy must leave as it was."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules: Sequence[torch.nn.Module] = list(model.modules())
    with torch.no_grad():
        logits = model(tokens_T[None, :33], use_cache=False).logits
    return {
        "the attention function": model.config._attn_implementation,
        "the attention functions that Transformers knows": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "hooks of the model's modules": [
            (list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules
        ],
        "methods of the model's modules": ["forward" in vars(module) for module in modules],
        "whether the model trains": [module.training for module in modules],
        "what the model computes by itself": logits,
        "the model's weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def _compare(before: Mapping[str, Any], after: Mapping[str, Any], findings: Findings) -> None:
    for name, value in before.items():
        check = "K6 weights" if name == "the model's weights" else "K5 undone"
        findings.expect(
            check, _same(value, after[name]), f"{name} is not what it was before; put it back when the context closes"
        )


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return bool(one == other)
