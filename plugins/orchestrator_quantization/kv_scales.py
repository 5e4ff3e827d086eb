"""Scales of an fp8 KV cache, measured on the calibration tokens.

Micikevicius et al. 2022, arXiv:2209.05433: the format E4M3 (largest number 448). An engine stores k / s_k and v / s_v
in float8 and multiplies again when it reads them; of each attention

    s_k = max|k| / 448,   s_v = max|v| / 448

over all calibration tokens, heads and channels, k with its positions (after norms and rotary embedding), as it enters
the cache. Without scales (s = 1) larger numbers are cut off at 448 and small ones fall to where float8 has few numbers.

The model runs in its own dtype, as it will when it is served, layers on a grid as they are stored, quantized inputs
included. No weight is changed. Batches run beside each other, each operation on one thread, and a maximum does not
depend on the order of what it is taken over: so neither do the scales depend on the number of cores.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, H = KV heads, D = channels of a head.
"""

from __future__ import annotations

import inspect
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.api import (
    FLOAT8_MAX,
    Context,
    Invariant,
    ModelFacts,
    ModelMethod,
    ModelResult,
    Stage,
    StepError,
    Work,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BATCH_TOKENS = 2048  # what is passed at a time, but at least one window
_MOST_WORKERS = 8  # each holds the activations of a batch
_WITH_KEYS = {"full_attention", "sliding_attention", "chunked_attention"}
# Where engines look for scales: those that they find elsewhere they refuse, or leave without a word.
_ATTENTION = "self_attn"


class KVScales(ModelMethod):
    """Measure the scales of an fp8 KV cache and store them beside the weights, which stay as they are."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "kv_scales"
    paper: ClassVar[str] = "arXiv:2209.05433 (E4M3); scales as compressed-tensors and vLLM store them"
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS, Invariant.GRID})
    provides: ClassVar[frozenset[Invariant]] = frozenset({Invariant.KV_SCALES})

    def needs_calibration(self) -> bool:
        """Keys and values are those of the calibration tokens."""
        return True

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that keeps something else than keys and values, or whose scales no engine would find."""
        attentions_of(model)

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The model as it is stored, a batch's activations for each worker, one pass."""
        sequences, length = calibration
        batch = length * max(1, min(sequences, _BATCH_TOKENS // max(1, length)))
        workers = min(_workers(), -(-sequences * length // max(1, batch)))
        passed = model.forward(sequences * length, length, batch, head=False).times(1 / max(1, workers))
        held = model.parameters * model.item_bytes + workers * model.activation_bytes(batch, length)
        return Work(memory_bytes=max(model.load_bytes(as_float32=False), held)).then(passed)

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Measure. Raises `StepError` as `check_model` does, and for keys or values that are all zero or not finite.

        Metrics: `k_absmax_N` and `v_absmax_N` are max|k| and max|v| of layer N.
        """
        attentions = attentions_of(model)
        largest = _largest(model, _batches(context, model), context)
        without = sorted(attentions.keys() - largest.keys())
        if without:
            raise StepError(
                f"{attentions[without[0]]} puts no keys and values of its own into the cache",
                remedy="leave kv_scales out: layers that share a cache have no scales of their own",
            )
        scales: dict[str, tuple[float, float]] = {}
        metrics: dict[str, float] = {}
        for layer, name in attentions.items():
            for kind, value in zip(("keys", "values"), largest[layer], strict=True):
                _require_scale(name, kind, value)
            k_absmax, v_absmax = largest[layer]
            scales[name] = (k_absmax / FLOAT8_MAX, v_absmax / FLOAT8_MAX)
            metrics |= {f"k_absmax_{layer}": k_absmax, f"v_absmax_{layer}": v_absmax}
        return ModelResult(model, metrics, kv_scales=scales)


def attentions_of(model: PreTrainedModel) -> dict[int, str]:
    """Return the names of the attention modules by layer. Raises `StepError` for a model that has no such scales."""
    config = model.config
    kind = config.model_type
    if getattr(config, "kv_lora_rank", None):
        raise StepError(
            f"a {kind!r} model has latent attention (MLA): engines cache one latent vector, not keys and values",
            remedy="leave kv_scales out",
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _WITH_KEYS)
    if others:
        raise StepError(
            f"a {kind!r} model has layers of type {', '.join(map(str, others))}, which keep no keys and values",
            remedy="leave kv_scales out",
        )
    found = {
        module.layer_idx: name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == _ATTENTION and isinstance(getattr(module, "layer_idx", None), int)
    }
    if sorted(found) != list(range(config.num_hidden_layers)):
        raise StepError(
            f"not every block of a {kind!r} model has its attention under the name {_ATTENTION}, where engines look"
            " for scales",
            remedy="leave kv_scales out; an engine can still keep such a model's cache in fp8, without scales",
        )
    return dict(sorted(found.items()))


def _largest(model: PreTrainedModel, batches: list[torch.Tensor], context: Context) -> dict[int, tuple[float, float]]:
    """Return max|k| and max|v| by layer over all batches; NaN where there is one."""
    import torch

    decoder: Any = model.base_model  # the output head has no part in it
    argument = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"

    def measure(tokens_BT: torch.Tensor) -> dict[int, tuple[float, float]]:
        recorder = _recorder()
        with torch.inference_mode():
            decoder(input_ids=tokens_BT, use_cache=True, **{argument: recorder})
        seen: dict[int, tuple[float, float]] = recorder.largest
        return seen

    largest: dict[int, tuple[float, float]] = {}
    with ThreadPoolExecutor(min(_workers(), len(batches)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done, seen in enumerate(pool.map(measure, batches), 1):
                for layer, pair in seen.items():
                    before = largest.get(layer, (0.0, 0.0))
                    largest[layer] = (_larger(before[0], pair[0]), _larger(before[1], pair[1]))
                context.progress(done / len(batches), f"keys and values: batch {done} of {len(batches)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return largest


def _recorder() -> Any:
    """A cache that keeps nothing but the largest |k| and |v| of each layer; every pass finds it empty."""
    from transformers import DynamicCache

    class Recorder(DynamicCache):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.largest: dict[int, tuple[float, float]] = {}

        def update(
            self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.largest[layer_idx] = (float(keys_BHTD.abs().amax()), float(values_BHTD.abs().amax()))
            return keys_BHTD, values_BHTD

    return Recorder()


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _require_scale(attention: str, kind: str, absmax: float) -> None:
    if not math.isfinite(absmax):
        raise StepError(
            f"the {kind} of {attention} are not finite on the calibration tokens",
            remedy="check the checkpoint for overflow or damage",
        )
    if absmax == 0:
        raise StepError(
            f"all {kind} of {attention} are zero on the calibration tokens, so they have no scale",
            remedy="prune less, or remove such layers with prune depth",
        )


def _batches(context: Context, model: PreTrainedModel) -> list[torch.Tensor]:
    """The calibration windows [B, T], some at a time. Raises `StepError` if there are none."""
    import torch

    if context.calibration is None or context.calibration.tokens_NT.numel() == 0:
        raise StepError("kv_scales has no calibration tokens", remedy="put a calibrate step before")
    tokens_NT = context.calibration.tokens_NT.to(model.device)
    return list(torch.split(tokens_NT, max(1, _BATCH_TOKENS // tokens_NT.shape[1])))


def _workers() -> int:
    """Batches beside each other: one for each core that this process may use."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
