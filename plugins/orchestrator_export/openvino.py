"""OpenVINO IR: the model as OpenVINO GenAI serves it, with the proof that it says what Transformers says.

What `gptq`, `awq` and the others chose is kept as the very integers and scales; OpenVINO multiplies 4 and 8 bits
without unpacking them. The folder is loaded by OpenVINO GenAI, with its paged cache and continuous batching, before
it is released.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.api import (
    Checkpoint,
    Context,
    ExportFacts,
    ExportFormat,
    ModelFacts,
    PreflightError,
    QuantizedWeight,
    QuantScheme,
    SpecError,
    Stage,
    StepError,
    TensorReader,
    Work,
    unpack,
)
from orchestrator_export.comparison import LENGTH, reference_logits, tokens_for
from orchestrator_export.openvino_graph import stateful_model, store_weights
from orchestrator_export.openvino_run import GENERATED, check_texts, generate, logits_of, shortfall
from orchestrator_export.vocabulary import PROBES

INSTALL = "pip install 'compression-orchestrator[openvino]'"
REMEDY = "leave openvino out of `formats`"
# Attention over all tokens through PyTorch's SDPA, which is what OpenVINO GenAI finds and pages. For each of them the
# tests compare OpenVINO with Transformers.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"})
ROPES = frozenset({"default", "linear", "llama3", "yarn"})  # the same for a text of every length
_COUNTED = re.compile(r"(Parameter|Result)_\d+")
PROMPTS = 2
ALLOWED_KL = 1e-4  # nats; float32 on both sides, 1e-8 is usual
ALLOWED_SHORTFALL = 0.02  # nats
_DTYPES: Mapping[str, tuple[str, ...]] = {"auto": ("f16", "bf16"), "f16": ("f16!",), "f32": ()}
_FILES = ("config.json", "generation_config.json")  # of which OpenVINO GenAI takes the end of text


class OpenVINO(ExportFormat):
    """Writes OpenVINO IR with its tokenizer, and has OpenVINO GenAI serve it before it is released."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "openvino"
    paper: ClassVar = "No paper: OpenVINO's intermediate representation (docs.openvino.ai)."
    libraries: ClassVar = ("openvino", "openvino-genai", "openvino-tokenizers")

    type: Literal["auto", "f16", "f32"] = Field(
        "auto",
        description="Type of the matrices. auto: the smallest that changes no weight: the integers of a grid, else 16 "
        "bits where they hold every weight, else f32.",
    )
    tokens: int = Field(
        256, ge=16, le=65_536, description="Tokens on which logits are compared: of the calibration set, else random."
    )

    def preflight(self) -> None:
        """Raise `PreflightError` if OpenVINO GenAI is missing."""
        names = ("openvino", "openvino_genai", "openvino_tokenizers")
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise PreflightError(f"OpenVINO export needs the package {' and '.join(missing)}", remedy=INSTALL)

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The model in float32 in Transformers and in OpenVINO at once; its file."""
        held = max(model.load_bytes(as_float32=True), dense.float32_bytes)
        scored = model.forward(self.tokens, LENGTH, LENGTH, head=True).times(3)
        logits = 4 * self.tokens * model.vocabulary
        file = dense.float32_bytes if self.type == "f32" else max(model.stored_bytes, dense.float32_bytes // 2)
        return Work(3 * held + 3 * logits, file, 0, file, moved_bytes=30.0 * held, calls=10_000).then(scored)

    def check(self, facts: ExportFacts) -> None:
        """Raise `SpecError` or `PreflightError` for what OpenVINO would compute otherwise, before anything runs."""
        config = facts.model.config
        faults = list(_faults(config))
        if faults:
            raise PreflightError("; ".join(f"OpenVINO GenAI cannot serve {fault}" for fault in faults), remedy=REMEDY)
        for name, schemes in facts.schemes.items():
            for scheme in schemes:
                _check_grid(name, scheme)

    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        """Write ``openvino_model.xml`` and its company. Raises `StepError` for what does not run as it should."""
        from openvino import save_model

        context.progress(0.0, "openvino: logits of Transformers")
        loaded: Any = model.load().float()
        config = loaded.config.to_dict()
        positions = int(config.get("max_position_embeddings") or LENGTH)
        size = int(loaded.get_input_embeddings().weight.shape[0])
        tokens_NT = tokens_for(context.calibration, self.tokens, positions - GENERATED, size, context.seed)
        context.progress(0.2, "openvino: converting")
        target = context.scratch / "openvino"  # in its place only when it is shown to be right
        target.mkdir()
        if self.type == "auto":
            _put_grids(loaded, grids := _grids(model))
        else:
            grids = {}
        reference_NTV = reference_logits(loaded, tokens_NT)
        with _sdpa(loaded):
            converted = stateful_model(loaded)
        counts = store_weights(converted, grids, _DTYPES[self.type])
        _rename(converted)
        save_model(converted, target / "openvino_model.xml", compress_to_fp16=False)
        del converted
        _write_tokenizer(model, target)
        for name in _FILES:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, target / name)
        context.progress(0.6, "openvino: running OpenVINO GenAI")
        measured = _compare(logits_of(target, tokens_NT), reference_NTV)
        if self.type != "f16" and measured["kl_mean"] > ALLOWED_KL:
            raise StepError(
                f"OpenVINO computes another model than Transformers from the same weights: KL divergence "
                f"{measured['kl_mean']:.3g} nats, allowed {ALLOWED_KL:g}",
                remedy="tell this plugin's authors; nothing is released",
            )
        check_texts(target, model.load_tokenizer(), PROBES)
        prompts_NT = tokens_NT[:PROMPTS]
        behind = shortfall(loaded, prompts_NT, generate(target, prompts_NT))
        if self.type != "f16" and behind > ALLOWED_SHORTFALL:
            raise StepError(
                f"OpenVINO GenAI generates tokens that fall {behind:.3g} nats short of those of Transformers",
                remedy="tell this plugin's authors; nothing is released",
            )
        for path in sorted(target.iterdir()):
            shutil.move(path, folder / path.name)
        sizes = sum(path.stat().st_size for path in folder.iterdir())
        return {**measured, "greedy_shortfall": behind, "bytes": sizes} | {
            f"{kind}_matrices": count for kind, count in sorted(counts.items())
        }


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        yield f"the model type {kind!r} (it is tried with {', '.join(sorted(FAMILIES))})"
        return
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    slides = config.get("use_sliding_window", True) if kind.startswith("qwen") else True
    if window and slides and window < positions:
        yield f"the sliding window of {window} tokens, which its paged cache takes for full attention"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (found := rope.get("rope_type", rope.get("type", "default"))) not in ROPES:
        yield f"the rope type {found!r}, which changes with the length of the text"


def _check_grid(layer: str, scheme: QuantScheme) -> None:
    if scheme.input_activations is not None:
        raise SpecError(
            f"the OpenVINO format has no place for quantized inputs, which {layer} has",
            remedy=f"quantize weights only, or {REMEDY}",
        )
    if scheme.type != "int" or scheme.num_bits > 8:
        raise SpecError(
            f"the OpenVINO format holds grids of integers of 2 to 8 bits, not the {scheme.type} grid of {layer}",
            remedy=REMEDY,
        )


def _grids(model: Checkpoint) -> dict[str, QuantizedWeight]:
    """By parameter, the layers that are stored on a grid."""
    found = {}
    with TensorReader(model) as read:
        for layer, scheme in model.schemes().items():
            _check_grid(layer, scheme)
            found[f"{layer}.weight"] = unpack(read, layer, scheme)
    return found


def _put_grids(loaded: Any, grids: Mapping[str, QuantizedWeight]) -> None:
    """Give a model in float32 the products of integers and scales unrounded, as OpenVINO will compute them."""
    import torch

    parameters = dict(loaded.named_parameters())
    for name, weight in grids.items():
        groups = weight.scale_OG.shape[1]
        q_OGW = weight.q_OI.float().reshape(len(weight.q_OI), groups, -1)
        if weight.zero_point_OG is not None:
            q_OGW = q_OGW - weight.zero_point_OG.float()[..., None]
        with torch.no_grad():
            parameters[name].copy_((q_OGW * weight.scale_OG.float()[..., None]).reshape(weight.q_OI.shape))


@contextmanager
def _sdpa(loaded: Any) -> Iterator[None]:
    """Attention as the operator that OpenVINO knows, whatever the model was loaded with."""
    before = loaded.config._attn_implementation
    loaded.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        loaded.set_attn_implementation(before)


def _rename(converted: Any) -> None:
    """Number the nodes: their own names count what this process has made before, and files would differ."""
    converted.set_friendly_name("model")
    for number, node in enumerate(converted.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result") or _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
        for output in node.outputs():
            names = {name for name in output.get_tensor().get_names() if not _COUNTED.fullmatch(name)}
            if len(names) < len(output.get_tensor().get_names()):
                output.get_tensor().set_names(names or {f"tensor_{number}"})


def _write_tokenizer(model: Checkpoint, folder: Path) -> None:
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer

    try:
        converted = convert_tokenizer(model.load_tokenizer(), with_detokenizer=True)
    except Exception as error:  # of many kinds; the package documents none
        raise StepError(f"OpenVINO does not convert the tokenizer of {model.path}: {error}", remedy=REMEDY) from None
    for part, name in zip(converted, ("tokenizer", "detokenizer"), strict=True):
        _rename(part)
        save_model(part, folder / f"openvino_{name}.xml", compress_to_fp16=False)


def _compare(found_NTV: Any, reference_NTV: Any) -> dict[str, float]:
    """KL divergence in nats and agreement over all tokens, sequence by sequence."""
    import torch

    if found_NTV.shape != reference_NTV.shape or not bool(found_NTV.isfinite().all()):
        raise StepError(f"OpenVINO's logits {tuple(found_NTV.shape)} are not finite, or not those of this model")
    kl, agreeing = [], 0
    for found_TV, reference_TV in zip(found_NTV, reference_NTV, strict=True):
        log_p_TV, log_q_TV = reference_TV.log_softmax(-1), found_TV.log_softmax(-1)
        kl.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).clamp(min=0).double())
        agreeing += int((reference_TV.argmax(-1) == found_TV.argmax(-1)).sum())
    kl_P = torch.cat(kl)
    return {
        "kl_mean": float(kl_P.mean()),
        "kl_max": float(kl_P.max()),
        "max_logit_difference": float((found_NTV - reference_NTV).abs().max()),
        "top1_agreement": agreeing / len(kl_P),
        "tokens": len(kl_P),
    }
