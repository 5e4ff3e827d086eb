"""GGUF: the model as one file that llama.cpp runs, with the proof that it runs it as Transformers does.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. A result on a quantization grid keeps its very integers and
scales where a GGUF type can hold them (`grids`), and is never quantized a second time; everything else is quantized by
llama.cpp itself. The file is loaded by llama.cpp before it is released, and its logits compared.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.api import (
    Checkpoint,
    Context,
    ExportFacts,
    ExportFormat,
    Invariant,
    LayerShape,
    ModelFacts,
    QuantScheme,
    SpecError,
    Stage,
    StepError,
    Work,
)
from orchestrator_export.architectures import Carried
from orchestrator_export.comparison import ALLOWED_KL, ALLOWED_KL_BLOCKS, LENGTH, compare, reference_logits, tokens_for
from orchestrator_export.grids import carriers, misfit
from orchestrator_export.llama_cpp import check_installed
from orchestrator_export.tensor_types import NO_ZERO, PLAIN, FileType
from orchestrator_export.vocabulary import check_tokens, find_vocabulary, unreadable
from orchestrator_export.weights import Weights
from orchestrator_export.writing import exact_plain_type, tensor_type, write_file

# What a quantized file is proved with first: the same weights in a type whose rounding is small beside any mistake.
TWIN = "f16"
# Bits of a weight in a file, roughly, for estimates alone.
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "auto": 16, "q8_0": 8.5, "q6_k": 6.6}


class GGUF(ExportFormat):
    """Writes one GGUF file, loads it with llama.cpp and compares its logits with those of Transformers."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "gguf"
    paper: ClassVar = "No paper: the file format of ggml and llama.cpp (ggml/docs/gguf.md)."
    libraries: ClassVar = ("gguf", "xllamacpp")

    type: FileType = Field(
        "auto",
        description="Type of the matrices, as llama.cpp names it. auto: the smallest that changes no weight: Q4_0, "
        "Q5_0 or Q8_0 for a symmetric grid of integers, else the dtype of the checkpoint.",
    )
    tokens: int = Field(
        256, ge=16, le=65_536, description="Tokens on which logits are compared: of the calibration set, else random."
    )

    def preflight(self) -> None:
        """Raise `PreflightError` if gguf or xllamacpp is missing."""
        check_installed()

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The model in float32 for the comparison; the file on disk and in llama.cpp's memory."""
        file = int(dense.float32_bytes * _BITS.get(self.type, 5.5) / 32)
        scored = model.forward(self.tokens, LENGTH, LENGTH, head=True).times(2)
        logits = 4 * self.tokens * model.vocabulary
        held = max(model.load_bytes(as_float32=True), dense.float32_bytes) + 3 * logits
        twin = dense.float32_bytes // 2
        work = Work(
            held,
            max(file, twin) + logits,
            file,
            max(file, twin) + logits,
            moved_bytes=30.0 * dense.float32_bytes,
            calls=10_000,
        )
        return work.then(scored)

    def check(self, facts: ExportFacts) -> None:
        """Raise `SpecError` or `PreflightError` for what is known to be beyond the format before anything runs."""
        carried = Carried(facts.model.config)
        fault = unreadable(facts.model.path)
        if fault:
            raise SpecError(f"GGUF cannot carry the tokenizer: {fault}", remedy="leave gguf out of `formats`")
        if Invariant.GRID in facts.held and not facts.schemes and self.type not in PLAIN:
            raise SpecError(f"type {self.type} cannot carry a grid that is not known while planning", remedy="use f16")
        for layer in facts.model.block_layers():
            for scheme in facts.schemes.get(layer.name, ()):
                self._check_grid(layer, scheme, facts.model.dtype_name)
        if Invariant.ZEROS in facts.held and self.type not in (*PLAIN, "auto"):
            shapes = {name: info.shape for name, info in facts.model.tensors.items()}
            layers = {f"{layer.name}.weight" for layer in facts.model.block_layers() if layer.name not in facts.schemes}
            for target in carried.targets(shapes):
                kind = tensor_type(target, self.type, None, "", carried)
                if kind in NO_ZERO and layers & set(target.sources):
                    raise SpecError(
                        f"a GGUF file of type {self.type} has {target.name} in {kind.upper()}, which does not keep the"
                        " zeros that pruning made",
                        remedy="use type q8_0, q4_0 or f16, which keep them",
                    )

    def _check_grid(self, layer: LayerShape, scheme: QuantScheme, dtype: str) -> None:
        if scheme.input_activations is not None:
            raise SpecError(
                f"GGUF has no place for quantized inputs, which {layer.name} has: llama.cpp would multiply what the"
                " method did not calibrate",
                remedy="quantize weights only, or leave gguf out of `formats`",
            )
        if self.type in PLAIN:
            return
        words = f"{'' if scheme.symmetric else 'a'}symmetric {scheme.num_bits}-bit {scheme.type}"
        exact = carriers(scheme)
        if self.type != "auto" and self.type not in exact:
            better = f"type auto ({exact[0]}), which keeps the very integers, or " if exact and scheme.symmetric else ""
            raise SpecError(
                f"type {self.type} would quantize the {words} grid of {layer.name} a second time and lose what the"
                " method chose",
                remedy=f"use {better}f16, or export before quantizing",
            )
        if self.type == "auto" and not (exact and scheme.symmetric):
            trying = ": q4_1 holds it only where float16 happens to hold every group's minimum" if exact else ""
            raise SpecError(
                f"no GGUF type is sure to hold the {words} grid of {layer.name}{trying}",
                remedy=f"use type f16{', or q4_1 to try' if exact else ''}, or quantize to symmetric integers",
            )
        if dtype not in ("float16", "bfloat16"):
            raise SpecError(
                f"GGUF holds scales in float16, and a {dtype} model has them in its own dtype",
                remedy="set the model's dtype to bfloat16 or float16, or use type f16",
            )
        fault = misfit(scheme, layer.in_features)
        if fault:
            raise SpecError(
                f"{exact[0]} cannot carry {layer.name}: {fault}", remedy="use type f16, or groups of 32, 64 or 128"
            )

    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        """Write ``model-TYPE.gguf``. Raises `StepError` for what cannot be carried, or does not run as it should."""
        context.progress(0.0, "gguf: logits of Transformers")
        loaded: Any = model.load().float()
        carried = Carried(loaded.config.to_dict())
        size = int(loaded.get_input_embeddings().weight.shape[0])
        tokens_NT = tokens_for(context.calibration, self.tokens, carried.positions, size, context.seed)
        reference_NTV = reference_logits(loaded, tokens_NT)
        del loaded
        gc.collect()
        context.progress(0.2, "gguf: vocabulary")
        vocabulary = find_vocabulary(model, size, context.scratch)
        zeros = "zeros" in invariants
        with Weights(model) as weights:
            file_type, exact = self._resolved(model, weights)
            if file_type not in PLAIN:
                context.progress(0.3, "gguf: the same without quantization")
                twin = context.scratch / "unquantized.gguf"
                write_file(twin, carried, vocabulary, weights, TWIN, zeros=zeros)
                _judge(TWIN, carried, compare(twin, tokens_NT, reference_NTV, context.scratch))
                twin.unlink()
            path = context.scratch / f"model-{file_type}.gguf"  # in its place only when it is shown to be right
            context.progress(0.6, f"gguf: writing {path.name}")
            account = write_file(path, carried, vocabulary, weights, file_type, exact=exact, zeros=zeros)
        if exact and account.changed:
            raise StepError(f"{account.changed} of {account.weights} weights are not in {path.name} as they are")
        context.progress(0.8, "gguf: running llama.cpp")
        measured = compare(path, tokens_NT, reference_NTV, context.scratch)
        if file_type in PLAIN or not account.changed:
            _judge(file_type, carried, measured)
        check_tokens(path, model, context.scratch)
        path = Path(shutil.move(path, folder / path.name))
        return {
            **measured,
            "bytes": path.stat().st_size,
            "changed_weights": account.changed / max(1, account.weights),
            "fallback_matrices": len(account.fallback),
        }

    def _resolved(self, model: Checkpoint, weights: Weights) -> tuple[str, str]:
        """The type of the file; for a file that is to change nothing, also that of tensors on no grid, else "".

        A file whose layers need several types is called after the one of most weights, as llama.cpp does.
        """
        if self.type != "auto":
            return self.type, ""
        plain = exact_plain_type(
            [
                info.dtype
                for name, info in model.tensors.items()
                if len(info.shape) > 1 and name in weights.shapes and name not in weights.schemes
            ]
        )
        kinds: Counter[str] = Counter()
        for name, scheme in weights.schemes.items():
            if not carriers(scheme):
                raise StepError(f"no GGUF type stands for the grid of {name}", remedy="use type f16")
            kinds[carriers(scheme)[0]] += math.prod(weights.shapes[name])
        return (max(sorted(kinds), key=kinds.__getitem__) if kinds else plain), plain


def _judge(file_type: str, carried: Carried, measured: Mapping[str, float]) -> None:
    """Raise `StepError` if the checkpoint's weights give other logits than rounding explains.

    In a mixture a rounding can send a token to another expert, and few tokens then differ by much: the median counts.
    """
    kl = measured["kl_median" if carried.experts else "kl_mean"]
    allowed = ALLOWED_KL.get(file_type, ALLOWED_KL_BLOCKS)
    if kl > allowed:
        raise StepError(
            f"llama.cpp computes another model than Transformers from the same weights: KL divergence {kl:.3g} nats as"
            f" {file_type}, allowed {allowed:g}",
            remedy="tell this plugin's authors; no file is released",
        )
