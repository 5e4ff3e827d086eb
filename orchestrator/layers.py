"""Which layers of a model a step touches, how they are stored, and which of them serving engines fuse.

Known from names and config.json alone: imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.scheme import QuantScheme

# Serving engines load each of these sets as one matrix, so its members must share one quantization scheme. Phi-3 and
# GPT-NeoX store them as one from the start.
FUSED_SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# All experts of a block are one layer to an engine, with one scheme.
_EXPERT_LAYER = re.compile(r"(?P<experts>.+\.experts)\.\d+\..+")
# These choose experts, or weigh them: tiny, and a wrong choice costs more than all that compressing them could save.
ROUTERS = ("gate", "router", "shared_expert_gate")
_BLOCK = re.compile(r"((?:.+\.)?(?:layers|h|blocks)\.)(\d+)(?=\.)")
# Matrices that are looked up, not multiplied with.
_EMBEDDING = re.compile(r"(embed_(tokens|positions|in)|(tokens|positions)_embed|word_embeddings|wte|wpe)")
# Architectures whose linear layers in blocks are stored as [in, out] (`Conv1D` of Transformers).
_TRANSPOSED = ("gpt2", "openai-gpt")


def is_router(name: str) -> bool:
    """Whether a layer chooses or weighs experts. Such layers are never compressed."""
    return name.rpartition(".")[2] in ROUTERS


def is_expert(name: str) -> bool:
    """Whether a layer belongs to one of the experts among which a router chooses."""
    return _EXPERT_LAYER.fullmatch(name) is not None


def is_embedding(name: str) -> bool:
    """Whether a two-dimensional weight is a table that is looked up."""
    return _EMBEDDING.fullmatch(name.rpartition(".")[2]) is not None


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the linear layers in the blocks are stored as [in, out]."""
    return config.get("model_type") in _TRANSPOSED


def unsupported(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what keeps a model from being taken apart, and what to do; None if config.json shows nothing."""
    kind = config.get("model_type")
    if "vision_config" in config or "audio_config" in config:
        return (
            f"a {kind!r} model has parts for images or sound beside its language model",
            "save its language model alone, as a causal language model (of Gemma 3: model_type gemma3_text)",
        )
    if config.get("is_encoder_decoder"):
        return f"a {kind!r} model has an encoder beside its decoder", "use a decoder-only model"
    return None


def unquantizable(
    config: Mapping[str, Any], names: Sequence[str], skip: Sequence[str], scheme: QuantScheme
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield what would make a quantized model that nobody can load: where in the step, what, and what to do.

    As found by trying Transformers 5.23 with compressed-tensors 0.20: it decompresses experts while it merges them,
    all of them and without zero points. vLLM's kernels for experts take no zero points either.
    """
    if stores_transposed(config):
        yield (
            (),
            f"a {config['model_type']!r} model keeps its layers as Conv1D, stored transposed; compressed-tensors knows"
            " Linear layers only, so neither Transformers nor vLLM could load it quantized",
            "prune it only, or use a model with Linear layers",
        )
    experts = [name for name in names if is_expert(name)]
    skipped = [name for name in experts if is_skipped(name, skip)]
    if experts and scheme.input_activations is not None:
        yield (
            (),
            "Transformers merges the experts of a mixture while loading and then quantizes none of their inputs, so the"
            " result could not be checked",
            "quantize weights only (gptq, awq), or a model without experts",
        )
    if experts and not scheme.symmetric:
        yield (
            ("with",),
            "the experts of a mixture cannot be loaded with zero points (compressed-tensors in Transformers and vLLM)",
            "set symmetric: true",
        )
    if skipped:
        yield (
            ("skip",),
            f"Transformers cannot load a quantized model that holds some experts unquantized, such as {skipped[0]}",
            "quantize all experts, or prune without quantizing",
        )


def several_schemes(names: Sequence[str], schemes: Sequence[QuantScheme]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield what keeps Transformers 5.24 from loading several schemes in one model, as `unquantizable` does."""
    if any(map(is_expert, names)):
        yield (
            (),
            "Transformers decompresses the experts of a mixture by the first of several schemes: weights are wrong",
            "use one scheme (gptq, awq), or a model without experts",
        )
    if not all(scheme.symmetric for scheme in schemes):
        yield (
            ("with",),
            "Transformers loads several schemes beside each other only if none has zero points",
            "set symmetric: true",
        )


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a pattern of `skip` matches the full layer name or its last components.

    ``down_proj``, ``mlp.*``, ``layers.0.*`` and ``model.layers.[01].*`` are all patterns; case matters.
    """
    parts = name.split(".")
    tails = [".".join(parts[start:]) for start in range(len(parts))]
    return any(fnmatchcase(tail, pattern) for pattern in skip for tail in tails)


def ignored_layers(names: Iterable[str], skip: Sequence[str]) -> list[str]:
    """Return the layers that stay unquantized, sorted: the output head and what `skip` matches."""
    return sorted({"lm_head", *(name for name in names if is_skipped(name, skip))})


def renumbered(layers: Iterable[str], blocks: Sequence[int] | None) -> dict[str, str]:
    """The names that layers have when only the decoder blocks `blocks` are left, and for each the one it has now."""
    if blocks is None:
        return {layer: layer for layer in layers}
    places = {old: new for new, old in enumerate(blocks)}
    names = {}
    for layer in layers:
        match = _BLOCK.match(layer)
        if match is None:
            names[layer] = layer
        elif int(match[2]) in places:
            names[f"{match[1]}{places[int(match[2])]}{layer[match.end() :]}"] = layer
    return names


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the sets of layers among `names` that engines fuse: those of `FUSED_SETS`, and all experts of a block."""
    present = set(names)
    groups = set()
    experts: dict[str, list[str]] = {}
    for name in present:
        match = _EXPERT_LAYER.fullmatch(name)
        if match:
            experts.setdefault(match["experts"], []).append(name)
            continue
        parent, _, leaf = name.rpartition(".")
        for members in FUSED_SETS:
            if leaf in members:
                full = [f"{parent}.{member}" if parent else member for member in members]
                groups.add(tuple(member for member in full if member in present))
    groups.update(tuple(sorted(members)) for members in experts.values())
    return sorted(group for group in groups if len(group) > 1)


def split_fused_groups(names: Iterable[str], skip: Sequence[str]) -> list[str]:
    """Return one sentence for each fused set that `skip` would tear apart."""
    return list(_splits(names, skip))


def _splits(names: Iterable[str], skip: Sequence[str]) -> Iterator[str]:
    for group in fused_groups(names):
        skipped = [name for name in group if is_skipped(name, skip)]
        if not skipped or len(skipped) == len(group):
            continue
        match = _EXPERT_LAYER.fullmatch(group[0])
        parent = match["experts"] if match else group[0].rpartition(".")[0]
        left_out = ", ".join(name.removeprefix(f"{parent}.") for name in skipped[:4])
        if match:
            more = f" and {len(skipped) - 4} more" if len(skipped) > 4 else ""
            members = "all experts of a block"
        else:
            more = ""
            members = ", ".join(name.rpartition(".")[2] for name in group)
        yield (
            f"skip leaves out {left_out}{more} of {parent}, but serving engines fuse {members} into one matrix with one"
            " quantization scheme"
        )
