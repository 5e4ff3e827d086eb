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
SHORTER = 2  # of the lengths: a prompt shorter than a piece
ONE_BY_ONE = 100  # tokens after the first piece that are also read alone, each
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
        logits = _read(method, model, laboratory, tokens_T[:length], shape, findings)
        if logits is None:
            return
        read.append(logits)
    if findings.failed("K2 finite"):
        return
    again = _read(method, model, laboratory, tokens_T, shape, findings, global_seed=1)
    if again is not None:
        findings.expect(
            "C8 deterministic",
            torch.equal(again, read[-1]),
            "a second stream of the same tokens gives other logits; draw only from generators of your own, and keep "
            "nothing from one stream to the next",
        )
    # The first piece is the prompt, which may be read whole before anything is forgotten: it is the same in both.
    alone = _read(method, model, laboratory, tokens_T[: PIECE + ONE_BY_ONE], shape, findings, piece=1)
    if alone is not None:
        off = _apart(alone, read[-1])
        findings.expect(
            "K4 in pieces",
            off <= TOLERANCE,
            f"after the first {PIECE}, tokens read {PIECE} at once give logits that are {off:.2g} of the largest away "
            "from those of tokens read one by one; let each token see what it would see alone",
        )
    off = _apart(read[SHORTER], read[-1])
    findings.expect(
        "K4 in pieces",
        off <= TOLERANCE,
        f"the tokens of a prompt of {LENGTHS[SHORTER]} give logits that are {off:.2g} of the largest away from those "
        f"that they give as the beginning of one of {PIECE}; let no token see what comes after it",
    )
    _compare(before, _state(model, tokens_T), findings)


def _read(
    method: CachePolicy,
    model: Any,
    laboratory: Laboratory,
    tokens_T: torch.Tensor,
    shape: ModelShape,
    findings: Findings,
    *,
    piece: int = PIECE,
    global_seed: int = 0,
) -> torch.Tensor | None:
    """Read a stream through a fresh cache, `PIECE` tokens and then `piece` at a time.

    Returns the logits [T, V], or None if that failed.
    """
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
        for part_T in (tokens_T[:PIECE], *torch.split(tokens_T[PIECE:], piece)):
            if not len(part_T):  # nothing follows the first piece
                break
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


def _apart(logits_TV: torch.Tensor, longer_TV: torch.Tensor) -> float:
    """The largest difference to the beginning of the logits of a longer stream, over the largest logit."""
    return float((logits_TV - longer_TV[: len(logits_TV)]).abs().max() / logits_TV.abs().max())


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
