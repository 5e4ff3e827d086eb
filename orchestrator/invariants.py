"""What a model artifact must have kept of the artifact it was made from, checked on the stored bytes.

Both are read layer by layer; packed integers are decoded. A claim that does not hold raises `StepError` with the name
of the layer: a step is never taken for done because it says so.

Shape legend: O = out features, I = in features, M = neighbouring weights of an N:M pattern.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.canonical import canonical_json
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import StepError
from orchestrator.kv_scales import check_kv_scales, read_kv_scales, renumbered_scales
from orchestrator.layers import is_skipped, renumbered
from orchestrator.packing import unpack
from orchestrator.quantized import MIXED_FORMAT
from orchestrator.reader import FLOAT_DTYPES, TensorReader

if TYPE_CHECKING:
    import torch

    from orchestrator.scheme import QuantScheme

# A layer with fewer zeros was not pruned: trained weights hold a zero here and there by chance.
_PRUNED_FROM = 0.01
_SEARCHED_PATTERNS = ("2:4", "4:8")


def check_artifact(
    before: Checkpoint,
    after: Checkpoint,
    kept: Mapping[str, Any],
    *,
    claims: Mapping[str, Any] | None = None,
    blocks: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Check `after` against `before` and return the invariants of `after` for its manifest.

    kept: the invariants of `before` that must survive, as this function returned them for it; {} if there are none.
    claims: what the step says it made: ``{"zeros": {"pattern": "2:4", "skip": [...]}}`` after pruning (every linear
        layer in a block but the skipped ones must then be pruned, and keep to the pattern if it is N:M), ``{"grid":
        {...}}`` after quantizing (with the scheme's fields that must be found), ``{"kv_scales": {}}`` after measuring
        the scales of a KV cache.
    blocks: of a step that removes decoder blocks, those of `before` that are left: block i of `after` is compared with
        block ``blocks[i]`` of `before`.

    The result has these entries, each only if it applies:
    zeros: `fraction` of the weights of all linear layers in blocks; `pattern`: "2:4", "4:8", "row" (every row of a
        pruned layer has as many zeros) or None; `layers`: number of pruned layers.
    grid: the scheme in the words of compressed-tensors, and its `format`; of several the `schemes`, each with the
        number of its `layers`.
    kv_scales: the scheme of the KV cache in the words of compressed-tensors, and the number of `layers` with scales.

    Raises `StepError` when a zero was lost, a pattern or the grid does not hold, scales are missing, changed or stale,
    or a number is not finite.
    """
    claims = claims or {}
    with TensorReader(before) as read_before, TensorReader(after) as read_after:
        _check_finite(after, read_after)
        expected = None
        if "grid" in kept:
            schemes = before.schemes()
            expected = {new: schemes[old] for new, old in renumbered(schemes, blocks).items()}
        grid = _check_grid(after, expected, claims.get("grid"))
        zeros = None
        weights = _Weights(after, read_after)
        if "zeros" in kept:
            zeros = _check_kept_zeros(_Weights(before, read_before), weights, kept["zeros"], blocks)
        if grid is None or "zeros" in claims:  # the zeros of a grid are otherwise no mask that anybody meant
            zeros = _find_zeros(weights, claims.get("zeros")) or zeros
    scales = renumbered_scales(read_kv_scales(before), blocks) if "kv_scales" in kept else None
    kv_scales = check_kv_scales(after, scales, claimed="kv_scales" in claims)
    facts = {"zeros": zeros, "grid": grid, "kv_scales": kv_scales}
    return {name: fact for name, fact in facts.items() if fact is not None}


class _Weights:
    """The linear layers in a checkpoint's blocks, plain or packed, as numbers."""

    def __init__(self, checkpoint: Checkpoint, read: TensorReader) -> None:
        self._read = read
        self._schemes = checkpoint.schemes()
        self._transposed = checkpoint.stores_transposed
        self.layers = sorted({layer.name for layer in checkpoint.block_layers()} | self._schemes.keys())

    def __call__(self, layer: str) -> torch.Tensor:
        """Return the weight [O, I]."""
        if layer in self._schemes:
            quantized = unpack(self._read, layer, self._schemes[layer])
            return quantized.dequantize(quantized.scale_OG.dtype)
        weight = self._read(f"{layer}.weight")
        return weight.T if self._transposed else weight


def _check_finite(checkpoint: Checkpoint, read: TensorReader) -> None:
    for name, info in checkpoint.tensors.items():
        if info.dtype in FLOAT_DTYPES and not all(piece.float().isfinite().all() for _, piece in read.chunks(name)):
            raise StepError(f"{name} holds numbers that are not finite", where=str(checkpoint.path))


def _check_grid(
    after: Checkpoint, kept: Mapping[str, QuantScheme] | None, claimed: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Hold the schemes against those of the layers before, by name, and against what the step says of all."""
    schemes = after.schemes()
    if not schemes:
        if kept is None and claimed is None:
            return None
        raise StepError("the model is not quantized, though it should be", where=str(after.path))
    for layer in sorted(schemes.keys() ^ kept.keys()) if kept is not None else ():
        raise StepError(f"{layer} is quantized in only one of the two models", where=str(after.path))
    for layer, scheme in (kept or {}).items():
        if schemes[layer] != scheme:
            raise StepError(f"{layer} is quantized as {schemes[layer]}, not as {scheme}", where=str(after.path))
    grid = grid_fact(schemes)
    for name, value in (claimed or {}).items():
        if grid.get(name) != value:
            raise StepError(f"{name} of the quantization is {grid.get(name)}, not {value}", where=str(after.path))
    return grid


def grid_fact(schemes: Mapping[str, QuantScheme]) -> dict[str, Any]:
    """Return what a manifest says of the schemes of quantized layers, by name: the one, or how many have which."""
    count = Counter(schemes.values())
    facts = [{**s.weight_args(), "input_activations": s.input_args(), "format": s.format} for s in count]
    if len(facts) == 1:
        return facts[0]
    several = [{**fact, "layers": layers} for fact, layers in zip(facts, count.values(), strict=True)]
    formats = {fact["format"] for fact in facts}
    return {
        "format": formats.pop() if len(formats) == 1 else MIXED_FORMAT,
        "schemes": sorted(several, key=lambda fact: canonical_json(fact)),
    }


def _check_kept_zeros(
    before: _Weights, after: _Weights, fact: Mapping[str, Any], blocks: Sequence[int] | None
) -> dict[str, Any]:
    """Every zero of `before` must be one in `after`; its pattern then holds too, which is checked all the same."""
    origins = renumbered(before.layers, blocks)
    if sorted(origins) != after.layers:
        changed = sorted(origins.keys() ^ set(after.layers))
        raise StepError(f"{changed[0]} is in only one of the two models, so its zeros cannot be compared")
    zeros = total = 0
    for layer in after.layers:
        before_OI, after_OI = before(origins[layer]), after(layer)
        if before_OI.shape != after_OI.shape:
            raise StepError(f"{layer} changed its shape from {tuple(before_OI.shape)} to {tuple(after_OI.shape)}")
        lost = int(((before_OI == 0) & (after_OI != 0)).sum())
        if lost:
            raise StepError(f"{layer} lost {lost} of its {int((before_OI == 0).sum())} zeros")
        pattern = fact.get("pattern")
        if _is_n_of_m(pattern) and _follows(before_OI, pattern) and not _follows(after_OI, pattern):
            raise StepError(f"{layer} does not keep to the pattern {pattern}")
        zeros += int((after_OI == 0).sum())
        total += after_OI.numel()
    return {"fraction": zeros / max(total, 1), "pattern": fact.get("pattern"), "layers": fact.get("layers")}


def _find_zeros(after: _Weights, claimed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Count zeros, find the pattern that all pruned layers share, and hold it against the claim."""
    pattern = str((claimed or {}).get("pattern"))
    skip = list((claimed or {}).get("skip", ()))
    candidates = [*_SEARCHED_PATTERNS, "row"]
    if _is_n_of_m(pattern) and pattern not in candidates:
        candidates.insert(0, pattern)
    zeros = total = pruned = 0
    for layer in after.layers:
        weight_OI = after(layer)
        count = int((weight_OI == 0).sum())
        zeros += count
        total += weight_OI.numel()
        if claimed is not None and not is_skipped(layer, skip):
            if count == 0:
                raise StepError(f"{layer} was to be pruned, but holds no zero")
            if _is_n_of_m(pattern) and not _follows(weight_OI, pattern):
                raise StepError(f"{layer} does not keep to the pattern {pattern}")
        elif count < _PRUNED_FROM * weight_OI.numel():
            continue
        pruned += 1
        candidates = [name for name in candidates if _follows(weight_OI, name)]
    if not pruned:
        return None
    found = pattern if pattern in candidates else next(iter(candidates), None)
    return {"fraction": zeros / total, "pattern": found, "layers": pruned}


def _is_n_of_m(pattern: Any) -> bool:
    return isinstance(pattern, str) and re.fullmatch(r"\d+:\d+", pattern) is not None


def _follows(weight_OI: torch.Tensor, pattern: Any) -> bool:
    """Whether at most N of every M neighbours are non-zero ("N:M"), or each row has as many zeros ("row")."""
    if pattern == "row":
        zeros_O = (weight_OI == 0).sum(1)
        return bool((zeros_O == zeros_O[0]).all())
    most, width = (int(part) for part in str(pattern).split(":"))
    if weight_OI.shape[1] % width:
        return False
    used = (weight_OI != 0).reshape(weight_OI.shape[0], -1, width).sum(-1)
    return bool((used <= most).all())
