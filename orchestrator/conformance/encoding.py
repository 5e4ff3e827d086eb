"""Checks for the integers behind a quantized layer, against the scheme and the layout in which they are stored.

Shape legend: O = out features, I = in features, G = groups along I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.conformance.bits import same_bytes
from orchestrator.conformance.findings import Findings
from orchestrator.layer_method import LayerMethod, LayerResult
from orchestrator.packing import check_scheme, pack, unpack
from orchestrator.scheme import QuantizedWeight, QuantScheme

if TYPE_CHECKING:
    import torch


def check_encoding(method: LayerMethod, dtype: str, label: str, result: LayerResult, findings: Findings) -> None:
    """The checks L9 to L12 and L15 for one result of a quantizing method, planned for a model of `dtype`."""
    import torch

    scheme, encoding = method.scheme(), result.encoding
    if not isinstance(scheme, QuantScheme) or not isinstance(encoding, QuantizedWeight):
        findings.fail(
            "L9 encoding",
            f"scheme() returned {type(scheme).__name__} and the encoding of {label} is {type(encoding).__name__}; a "
            "quantizing method returns a QuantScheme and a QuantizedWeight",
        )
        return
    if not findings.expect(
        "L9 encoding",
        encoding.scheme == scheme,
        f"the encoding of {label} has the scheme {encoding.scheme!r}, scheme() says {scheme!r}; make both the same",
    ):
        return
    unsupported = check_scheme(scheme)
    if not findings.expect("L9 encoding", unsupported is None, f"the scheme cannot be stored: {unsupported}"):
        return
    findings.expect(
        "L15 for_dtype",
        encoding.scale_OG.dtype is getattr(torch, dtype),
        f"for a {dtype} model the scales of {label} are {encoding.scale_OG.dtype}; engines multiply in the model's "
        "dtype, so take it in `for_dtype`, or raise SpecError there",
    )
    _check_grid(label, encoding, tuple(result.weight_OI.shape), findings)
    if findings.failed("L10 grid"):
        return  # the rest would fail for the same reason
    with findings.attempt("L11 weight is encoding", f"decoding the encoding of {label}"):
        findings.expect(
            "L11 weight is encoding",
            same_bytes(encoding.dequantize(torch.float32), result.weight_OI),
            f"weight_OI of {label} is not what its encoding stands for; return encoding.dequantize(torch.float32)",
        )
    with findings.attempt("L12 packs", f"packing and unpacking {label}"):
        stored = {f"layer.{part}": tensor for part, tensor in pack(encoding).items()}
        again = unpack(stored.__getitem__, "layer", scheme)
        findings.expect(
            "L12 packs",
            same_bytes(again.q_OI, encoding.q_OI) and _equal(again.zero_point_OG, encoding.zero_point_OG),
            f"the integers of {label} come back changed from the packed layout; keep them in the scheme's range",
        )


def _check_grid(label: str, encoding: QuantizedWeight, shape: tuple[int, ...], findings: Findings) -> None:
    import torch

    scheme = encoding.scheme
    stored = torch.float8_e4m3fn if scheme.type == "float" else torch.int8
    num_out, num_in = shape
    num_groups = num_in // scheme.group_width(num_in)
    integers = [("q_OI", encoding.q_OI, (num_out, num_in))]
    findings.expect(
        "L10 grid",
        (encoding.zero_point_OG is None) == scheme.symmetric,
        f"zero_point_OG of {label} must be None for a symmetric scheme and a tensor for an asymmetric one",
    )
    if encoding.zero_point_OG is not None:
        integers.append(("zero_point_OG", encoding.zero_point_OG, (num_out, num_groups)))
    for name, tensor, expected in integers:
        if not findings.expect(
            "L10 grid",
            tensor.dtype is stored and tuple(tensor.shape) == expected,
            f"{name} of {label} is {tensor.dtype} {tuple(tensor.shape)}; make it {stored} {expected}",
        ):
            continue
        low, high = float(tensor.float().min()), float(tensor.float().max())
        findings.expect(
            "L10 grid",
            scheme.quant_min <= low and high <= scheme.quant_max,
            f"{name} of {label} reaches from {low:g} to {high:g}; clamp it to {scheme.quant_min} .. {scheme.quant_max}",
        )
    scale_OG = encoding.scale_OG
    usable = scale_OG.is_floating_point() and bool((scale_OG.isfinite() & (scale_OG >= 0)).all())
    findings.expect(
        "L10 grid",
        usable and tuple(scale_OG.shape) == (num_out, num_groups),
        f"scale_OG of {label} is {scale_OG.dtype} {tuple(scale_OG.shape)}; make it finite floating-point numbers, none "
        f"negative, {(num_out, num_groups)}",
    )


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    import torch

    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
