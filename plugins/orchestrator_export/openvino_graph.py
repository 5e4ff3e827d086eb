"""A decoder of Transformers as an OpenVINO model with its KV cache as state, the form that OpenVINO GenAI takes apart.

Inputs: input_ids, attention_mask, position_ids, beam_idx; output: logits. Every layer's keys and values are variables
that start empty and grow by concatenation; ``beam_idx`` picks their rows. OpenVINO GenAI finds that pattern and puts a
paged cache in its place (SDPAToPagedAttention); the attention mask goes with it, so that only causal attention over
all tokens is the same afterwards. The conversion calls the PyTorch frontend itself: `openvino.convert_model` would
report its use to Intel.

Shape legend: N = sequences, T = new tokens, P = tokens in the cache, S = P + T, H = KV heads, D = head_dim,
O = out features, I = in features, G = groups along I, W = weights of a group.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.api import QuantizedWeight, StepError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_SHIFT = {4: 8, 8: 128}  # what makes signed integers of so many bits unsigned


def stateful_model(model: Any) -> Any:
    """Return the `openvino.Model` of a Transformers model in float32 that attends with PyTorch's SDPA.

    Constants share their memory with the model's parameters. Raises `StepError` for what the frontend cannot convert.
    """
    import torch
    from openvino import PartialShape
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager, OpConversionFailure
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    shapes = _cache_shapes(model)
    past = [tuple(torch.zeros(2, heads, 2, width) for heads, width in layer) for layer in shapes]
    example = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(2, 5).repeat(2, 1),
        "past": past,
    }
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of libraries to each other; what counts is the comparison
        try:
            decoder = TorchScriptPythonDecoder(
                _with_cache(model), example_input=example, trace_kwargs={"check_trace": False}
            )
            converted = frontend.convert(frontend.load(decoder))
        except (OpConversionFailure, RuntimeError) as error:
            said = str(error).strip().splitlines()
            raise StepError(
                f"OpenVINO does not convert {type(model).__name__}: {' '.join(said[-3:])[:300]}",
                remedy="leave openvino out of `formats`",
            ) from None
    states = [
        (f"{kind}.{index}", size) for index, layer in enumerate(shapes) for kind, size in zip("kv", layer, strict=True)
    ]
    tokens = ("input_ids", "attention_mask", "position_ids")
    for given, name in zip(converted.inputs, (*tokens, *(f"past.{state}" for state, _ in states)), strict=True):
        given.get_node().set_friendly_name(name)
        given.tensor.set_names({name})
    for name in tokens:
        converted.input(name).get_node().set_partial_shape(PartialShape([-1, -1]))
    for state, (heads, width) in states:
        converted.input(f"past.{state}").get_node().set_partial_shape(PartialShape([-1, heads, -1, width]))
    for made, name in zip(converted.outputs, ("logits", *(f"present.{state}" for state, _ in states)), strict=True):
        made.tensor.set_names({name})
    converted.validate_nodes_and_infer_types()
    apply_moc_transformations(converted, cf=False, smart_reshape=True)
    _make_stateful(converted, dict(states))
    return converted


def _cache_shapes(model: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """By layer, (H, D) of its keys and of its values, as a forward pass caches them."""
    import torch

    with torch.inference_mode():
        layers = model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers
    return [((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])) for keys, values in
            ((layer.keys, layer.values) for layer in layers)]  # fmt: skip


def _with_cache(model: Any) -> torch.nn.Module:
    """The model as a function of token ids, masks, positions and the cache's tensors, for tracing."""
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    known = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in known else "past_key_values"  # Transformers 5.24 gave it another name

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[tuple[torch.Tensor, torch.Tensor]],
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache()
            for keys, values in past:
                layer = DynamicLayer()
                layer.dtype, layer.device, layer.keys, layer.values = keys.dtype, keys.device, keys, values
                layer.is_initialized = True  # else the first tokens are concatenated to a tensor without a shape
                cache.layers.append(layer)
            num_new, num_all = input_ids.shape[1], attention_mask.shape[1]
            place_T1 = torch.arange(num_new)[:, None] + (num_all - num_new)
            allowed_TS = torch.arange(num_all)[None] <= place_T1
            mask_N1TS = allowed_TS[None, None] & attention_mask[:, None, None, :].bool()
            made = self.model(
                input_ids=input_ids,
                attention_mask=mask_N1TS,
                position_ids=position_ids,
                use_cache=True,
                **{argument: cache},
            )
            return made.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))

    return WithCache().eval()


def _make_stateful(converted: Any, states: Mapping[str, tuple[int, int]]) -> None:
    """Turn the cache's inputs and outputs into variables that begin with no tokens, reordered by ``beam_idx``."""
    from openvino import Type, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = opset13.parameter([-1], Type.i32, name="beam_idx")
    beam.output(0).tensor.add_names({"beam_idx"})
    converted.add_parameters([beam])
    for state in states:
        given = converted.input(f"past.{state}")
        readers = given.get_target_inputs()
        picked = opset13.gather(given, beam, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(picked.output(0))
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, {f"past.{state}": f"present.{state}" for state in states})
    shape = opset13.shape_of(converted.input("input_ids"), output_type="i64")
    batch = opset13.gather(shape, opset13.constant([0]), opset13.constant(0))
    for node in converted.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        _, heads, _, width = node.get_output_partial_shape(0)
        rest = opset13.constant([heads.get_length(), 0, width.get_length()], Type.i64)
        empty = opset13.broadcast(opset13.constant(0.0, Type.f32), opset13.concat([batch, rest], 0))
        node.set_arguments([empty])
    converted.validate_nodes_and_infer_types()


def store_weights(converted: Any, grids: Mapping[str, QuantizedWeight], dtypes: tuple[str, ...]) -> dict[str, int]:
    """Replace the matrices of a model by what is stored of them; return how many matrices got which type.

    grids: by parameter, layers whose integers and scales are kept as they are. dtypes: for all other matrices, the
    first of "f16" and "bf16" that holds every number exactly is taken, else float32 stays; ("f16!",) takes float16
    whatever it rounds. Raises `StepError` for a layer on a grid that is not in the model.
    """
    counts: dict[str, int] = {}
    left = set(grids)
    for node in converted.get_ops():
        shape = list(node.get_output_shape(0)) if node.get_type_name() == "Constant" else []
        name = node.get_friendly_name().removeprefix("self.model.")
        if name in left:
            kind, stored = _grid(grids[name])
            left.discard(name)
        elif len(shape) == 2 and name.endswith("weight"):
            kind, stored = _plain(node, dtypes)
        else:
            continue
        counts[kind] = counts.get(kind, 0) + 1
        if stored is None:
            continue
        stored.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(stored.output(0))
    if left:
        raise StepError(f"the converted model has no weight {min(left)!r}", remedy="use type f16")
    converted.validate_nodes_and_infer_types()
    return counts


def _plain(node: Any, dtypes: tuple[str, ...]) -> tuple[str, Any]:
    import torch
    from openvino import Type, opset13

    weight = torch.from_numpy(node.data.copy())
    for name in dtypes:
        dtype = torch.bfloat16 if name == "bf16" else torch.float16
        rounded = weight.to(dtype)
        if name.endswith("!") and not bool(rounded.isfinite().all()):
            raise StepError(f"float16 does not hold the weights of {node.get_friendly_name()}", remedy="use type auto")
        if name.endswith("!") or torch.equal(rounded.float(), weight):
            kind = Type.bf16 if name == "bf16" else Type.f16
            stored = _constant(rounded.view(torch.int16).numpy(), list(weight.shape), kind)
            return name.rstrip("!"), opset13.convert(stored, Type.f32)
    return "f32", None


def _constant(raw: NDArray[Any], shape: list[int], kind: Any) -> Any:
    """A constant with memory of its own, from its bytes."""
    from openvino import Tensor, opset13

    held = Tensor(kind, shape)
    held.data.view(raw.dtype).reshape(-1)[...] = raw.reshape(-1)
    return opset13.constant(held, shared_memory=True)


def _grid(weight: QuantizedWeight) -> tuple[str, Any]:
    """``(q - zero_point) * scale`` as OpenVINO multiplies it without unpacking; integers of 4 or 8 bits."""
    import numpy as np
    from openvino import Type, opset13

    num_out, num_in = weight.q_OI.shape
    width = weight.scheme.group_width(num_in)
    bits = 4 if weight.scheme.num_bits <= 4 else 8
    signed = weight.zero_point_OG is None
    shift = 0 if signed else _SHIFT[bits]
    kind = getattr(Type, f"{'i' if signed else 'u'}{bits}")

    def integers(values: NDArray[np.int8], shape: list[int]) -> Any:
        codes: NDArray[Any] = (values.astype(np.int16) + shift).astype(np.uint8).reshape(-1)
        if bits == 4:  # two in a byte, the first one low
            codes = np.pad(codes & 0x0F, (0, codes.size % 2))
            codes = codes[0::2] | (codes[1::2] << 4)
        return opset13.convert(_constant(codes, shape, kind), Type.f32)

    groups = num_in // width
    found = integers(weight.q_OI.numpy(), [num_out, groups, width])
    if weight.zero_point_OG is not None:
        found = opset13.subtract(found, integers(weight.zero_point_OG.numpy(), [num_out, groups, 1]))
    scale = opset13.constant(weight.scale_OG.float().reshape(num_out, groups, 1).numpy())
    found = opset13.multiply(found, scale)
    return f"{kind.get_type_name()}", opset13.reshape(found, opset13.constant([num_out, num_in]), special_zero=False)
