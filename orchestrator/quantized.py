"""What config.json says of a quantized model: which layer is stored by which scheme.

Known from names and config.json alone: imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from orchestrator.kv_scales import DENSE_ENTRY, KV_CACHE_SCHEME, has_kv_scales
from orchestrator.packing import PACKED, SCALE_SUFFIX, check_scheme
from orchestrator.scheme import InputScheme, QuantScheme

MIXED_FORMAT = "mixed-precision"
COMPRESSED_TENSORS = "compressed-tensors"


def quantization_entries(
    schemes: Mapping[str, QuantScheme], ignored: Collection[str], *, kv_scales: bool = False
) -> dict[str, Any]:
    """Return what config.json says of quantization: of layers, by scheme, and of the KV cache; {} for neither.

    Scales of a KV cache are for engines; stock Transformers is to load and compute as without them. Beside dense
    weights they are declared as `compression_config`, which vLLM and SGLang read where there is no
    `quantization_config`: that one would make Transformers ask for compressed-tensors to load plain weights, and fail
    on the experts of a mixture (5.24).
    """
    if schemes:
        return {"quantization_config": quantization_config(schemes, ignored, kv_scales=kv_scales)}
    if not kv_scales:
        return {}
    entry = {"quant_method": COMPRESSED_TENSORS, "format": "dense", "config_groups": {}, "ignore": []}
    return {DENSE_ENTRY: {**entry, "kv_cache_scheme": dict(KV_CACHE_SCHEME)}}


def quantization_config(
    schemes: Mapping[str, QuantScheme], ignored: Collection[str], *, kv_scales: bool = False
) -> dict[str, Any]:
    """Return the `quantization_config` entry of config.json. schemes: by layer.

    ``dequantize`` makes Transformers decompress while it loads; engines that keep weights packed ignore it. It is asked
    for where it gives the right weights (Transformers 5.24 with compressed-tensors 0.20): without it a packed zero
    point does not load at all, with it all layers are decompressed by the first scheme, and no input is quantized.

    kv_scales: whether the checkpoint holds scales of an fp8 KV cache. With ``dequantize`` Transformers ignores them.
    Without, compressed-tensors has it round its own keys and values wherever attention takes `past_key_values` (before
    Transformers 5.24). So such an entry holds itself once more without `kv_cache_scheme`: Transformers reads what is
    nested under the name of the entry, engines what is outside.
    """
    layers: dict[QuantScheme, list[str]] = {}
    for name in sorted(schemes):
        layers.setdefault(schemes[name], []).append(name)
    order = sorted(layers, key=lambda scheme: layers[scheme])
    formats = {scheme.format for scheme in order}
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(order) == 1 else layers[scheme],
            "weights": scheme.weight_args(),
            "input_activations": scheme.input_args(),
            "output_activations": None,
            **({"format": scheme.format} if len(order) > 1 else {}),
        }
        for index, scheme in enumerate(order)
    }
    dequantize = len(order) == 1 and order[0].format == PACKED
    entry = {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else MIXED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        **({"dequantize": True} if dequantize else {}),
    }
    if not kv_scales:
        return entry
    nested = {} if dequantize else {"quantization_config": dict(entry)}
    return {**entry, "kv_cache_scheme": dict(KV_CACHE_SCHEME), **nested}


def quantizes_weights(config: Mapping[str, Any]) -> bool:
    """Whether a config.json speaks of quantized weights, and not only of scales of a KV cache beside dense ones."""
    entry = config.get("quantization_config")
    if entry is None or not has_kv_scales(config):
        return entry is not None
    return bool(entry.get("config_groups")) or entry.get("quant_method") != COMPRESSED_TENSORS


def schemes_of(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, QuantScheme] | None:
    """Return the scheme of every quantized layer of a checkpoint with these tensors; {} for a dense one.

    None for a quantization other than what `quantization_config` writes: other formats, quantized outputs, groups of
    layers that overlap.
    """
    if not quantizes_weights(config):
        return {}
    groups = read_groups(config)
    if groups is None:
        return None
    found: dict[str, QuantScheme] = {}
    for name in sorted(n.removesuffix(SCALE_SUFFIX) for n in tensors if n.endswith(SCALE_SUFFIX)):
        fitting = [scheme for targets, scheme in groups if _targeted(name, targets)]
        if len(fitting) != 1:
            return None
        found[name] = fitting[0]
    return found


def read_groups(config: Mapping[str, Any]) -> list[tuple[list[str], QuantScheme]] | None:
    """Return targets and scheme of every group of a config.json, or None if they are not ones that we write."""
    entry = config.get("quantization_config") or {}
    groups = entry.get("config_groups")
    if entry.get("quant_method") != COMPRESSED_TENSORS or not isinstance(groups, dict) or not groups:
        return None
    if entry.get("sparsity_config"):
        return None
    found = []
    for group in groups.values():
        scheme = _scheme(group) if isinstance(group, dict) else None
        if scheme is None or (group.get("format") or entry.get("format")) != scheme.format:
            return None
        targets = group.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(one, str) and _is_cheap(one) for one in targets):
            return None
        found.append((targets, scheme))
    return found


def _is_cheap(target: str) -> bool:
    """Whether a target is a name, or a pattern that cannot take for ever: few repetitions, none of them of a group."""
    if not target.startswith("re:"):
        return True
    try:
        re.compile(target[3:])
    except (re.error, RecursionError, OverflowError):
        return False
    repeated = sum(target.count(sign) for sign in "*+{")
    return len(target) <= 500 and repeated <= 3 and not re.search(r"\)[*+{]", target)


def _scheme(group: Mapping[str, Any]) -> QuantScheme | None:
    if group.get("output_activations"):
        return None
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        return None
    # Files by others spell out defaults that are not carried here (observer, block_structure).
    known = {name: value for name, value in weights.items() if name in QuantScheme.model_fields}
    if known.get("actorder") == "weight":
        known["actorder"] = "static"  # two names of one thing in compressed-tensors
    try:
        if inputs:
            names = InputScheme.model_fields
            known["input_activations"] = InputScheme(**{n: value for n, value in inputs.items() if n in names})
        scheme = QuantScheme(**known)
    except ValueError:
        return None
    return None if check_scheme(scheme) else scheme


def _targeted(layer: str, targets: Iterable[str]) -> bool:
    """Whether a group's targets name a layer: by class, in full, or by a pattern."""
    return any(
        target in ("Linear", layer) or (target.startswith("re:") and re.match(target[3:], layer)) for target in targets
    )
