"""Checks for a `LayerMethod`: what the walk relies on when it hands over one layer after another.

Shape legend: O = out features, I = in features, G = groups along I, M = neighbouring weights of an N:M pattern.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

from orchestrator.conformance.bits import same_bytes
from orchestrator.conformance.encoding import check_encoding
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.layer_cases import (
    ODD_WIDTH,
    LayerCase,
    accepted_widths,
    cases,
    layer_shape,
    ordinary,
    pruned,
)
from orchestrator.conformance.mixed import check_choice, usable_options
from orchestrator.conformance.scaling import check_input_scale
from orchestrator.conformance.surroundings import left_alone
from orchestrator.errors import SpecError
from orchestrator.layer_method import LayerMethod, LayerResult, MixedMethod, Needs, ScalingMethod
from orchestrator.method import Invariant, Stage
from orchestrator.statistics import InputMoment

if TYPE_CHECKING:
    import torch


_N_OF_M = re.compile(r"(\d+):(\d+)")
MODEL_DTYPES = ("bfloat16", "float16", "float32")


def check_layer_method(method: LayerMethod, findings: Findings) -> None:
    """The checks L1 to L17, C7 and C8, for a model of the first dtype that the method accepts."""
    planned = _planned(method, findings)
    if not findings.expect("L15 for_dtype", bool(planned), "`for_dtype` accepts no dtype that models have; accept one"):
        return
    (dtype, first), *others = planned.items()
    if isinstance(first, MixedMethod):
        options = usable_options(first, findings)
        for option in options:
            _check_planned(option, dtype, findings)
        if options:
            check_choice(first, len(options), findings)
        return
    _check_planned(first, dtype, findings)
    if any(map(findings.failed, ("L1 runs", "L2 needs", "L4 form", "L14 check_layer"))):
        return
    for dtype, other in others:
        _check_case(other, dtype, ordinary(16, accepted_widths(other)[0]), findings)


def _planned(method: LayerMethod, findings: Findings) -> dict[str, LayerMethod]:
    """The method as the planner completes it, by the model's dtype; without the dtypes that it refuses."""
    planned = {}
    for dtype in MODEL_DTYPES:
        with findings.attempt("L15 for_dtype", f"`for_dtype({dtype!r})`"), suppress(SpecError):
            completed = method.for_dtype(dtype)
            if findings.expect(
                "L15 for_dtype",
                isinstance(completed, type(method)),
                f"`for_dtype({dtype!r})` returned {completed!r}; return this method, or a copy of it",
            ):
                planned[dtype] = completed
    return planned


def _check_planned(method: LayerMethod, dtype: str, findings: Findings) -> None:
    with findings.attempt("L14 check_layer", "`check_layer`"):
        widths = accepted_widths(method)
        _check_refusal(method, findings)
    if findings.failed("L14 check_layer"):
        return
    if not widths:
        findings.fail("L14 check_layer", "it refuses every usual number of in features up to 4096; mend it")
        return
    for case in cases(widths):
        _check_case(method, dtype, case, findings)
        if isinstance(method, ScalingMethod):
            check_input_scale(method, case, findings)
    if method.check_layer(layer_shape(16, ODD_WIDTH)) is None:
        _check_case(method, dtype, ordinary(16, ODD_WIDTH), findings)
    if Invariant.ZEROS in method.keeps:
        for case in pruned(widths):
            _check_case(method, dtype, case, findings)
    broken = any(map(findings.failed, ("L1 runs", "L2 needs", "L4 form")))
    if method.stage is Stage.QUANTIZE and not broken:
        _check_useful(method, ordinary(64, widths[-1] if widths[-1] <= 256 else widths[0]), findings)
    if not broken:
        _check_determinism(method, ordinary(16, widths[0]), findings)


def _check_refusal(method: LayerMethod, findings: Findings) -> None:
    refusal = method.check_layer(layer_shape(16, ODD_WIDTH))
    if refusal is None:
        return
    named = isinstance(refusal, tuple) and len(refusal) == 2 and refusal[0] in type(method).model_fields
    findings.expect(
        "L14 check_layer",
        named and isinstance(refusal[1], str) and bool(refusal[1]),
        f"for {ODD_WIDTH} in features it returned {refusal!r}; return None, or (name of a parameter, what is wrong)",
    )


def _check_case(method: LayerMethod, dtype: str, case: LayerCase, findings: Findings) -> None:
    """Compress one case and check all that can be said of a single result."""
    weight_OI, statistic = case.weight_OI.clone(), case.statistic(method.needs)
    result = _compress(method, case, weight_OI, statistic, findings)
    if result is None:
        return
    _check_pure(case, weight_OI, statistic, method.needs, findings)
    if not _has_form(case, result, findings):
        return
    for name, value in result.metrics.items():
        number = isinstance(value, int | float) and math.isfinite(value)
        findings.expect("L5 finite", number, f"the metric {name} of {case.label} is {value!r}; return a finite float")
    finite = bool(result.weight_OI.isfinite().all())
    if not findings.expect(
        "L5 finite", finite, f"the weight of {case.label} is not finite; guard divisions and logarithms"
    ):
        return  # what else could be said would follow from it
    _check_zeros(method, case, result, findings)
    if method.stage is Stage.QUANTIZE:
        check_encoding(method, dtype, case.label, result, findings)
    else:
        none = result.encoding is None and method.scheme() is None
        findings.expect("L9 encoding", none, "a pruning method has no encoding and no scheme(); set stage to quantize")


def _compress(
    method: LayerMethod, case: LayerCase, weight_OI: torch.Tensor, statistic: InputMoment | None, findings: Findings
) -> LayerResult | None:
    """Run `compress` as the walk does; None if it raised. A wish for more than was declared is told apart."""
    import torch

    trial = Findings(case.label)
    result = None
    with (
        left_alone(findings, "`compress`", seed=0),
        trial.attempt("L1 runs", f"`compress` of {case.label}"),
        torch.inference_mode(),
    ):
        result = method.compress(weight_OI, statistic)
    if not trial.failed("L1 runs"):
        return result
    more = {Needs.WEIGHT: Needs.INPUT_NORM, Needs.INPUT_NORM: Needs.INPUT_MOMENT}
    needs = method.needs
    while needs in more:
        needs = more[needs]
        again = Findings(case.label)
        with again.attempt("L1 runs", ""), left_alone(again, "", seed=0), torch.inference_mode():
            method.compress(case.weight_OI.clone(), case.statistic(needs))
        if not again.failed("L1 runs"):
            findings.fail(
                "L2 needs",
                f"`compress` fails with what {method.needs!s} gives it and works with {needs!s}; declare "
                f"`needs = Needs.{needs.name}`",
            )
            return None
    findings.adopt(trial)
    return None


def _check_pure(
    case: LayerCase, weight_OI: torch.Tensor, statistic: InputMoment | None, needs: Needs, findings: Findings
) -> None:
    remedy = "clone what you change: statistics and weights are shared"
    same = same_bytes(weight_OI, case.weight_OI)
    findings.expect("L3 pure", same, f"`compress` changed the weight_OI that it was given; {remedy}")
    fresh = case.statistic(needs)
    if statistic is None or fresh is None:
        return
    for field in fields(InputMoment):
        one, other = getattr(statistic, field.name), getattr(fresh, field.name)
        same = one == other if isinstance(one, int) or one is None else same_bytes(one, other)
        findings.expect("L3 pure", same, f"`compress` changed the statistic's {field.name}; {remedy}")


def _has_form(case: LayerCase, result: LayerResult, findings: Findings) -> bool:
    import torch

    if not findings.expect(
        "L4 form", isinstance(result, LayerResult), f"`compress` returned {type(result).__name__}, not a LayerResult"
    ):
        return False
    weight = result.weight_OI
    expected = f"float32, contiguous, {tuple(case.weight_OI.shape)}"
    if not isinstance(weight, torch.Tensor):
        findings.fail("L4 form", f"weight_OI is {type(weight).__name__}; return a tensor: {expected}")
        return False
    layout = "contiguous" if weight.is_contiguous() else "not contiguous"
    dtype = str(weight.dtype).removeprefix("torch.")
    return findings.expect(
        "L4 form",
        weight.dtype is torch.float32 and weight.is_contiguous() and weight.shape == case.weight_OI.shape,
        f"weight_OI of {case.label} is {dtype}, {layout}, {tuple(weight.shape)}; return {expected}",
    )


def _check_zeros(method: LayerMethod, case: LayerCase, result: LayerResult, findings: Findings) -> None:
    zeros_before_OI, zeros_OI = case.weight_OI == 0, result.weight_OI == 0
    if Invariant.ZEROS in method.keeps:
        lost = int((zeros_before_OI & ~zeros_OI).sum())
        findings.expect(
            "L6 keeps zeros",
            lost == 0,
            f"{lost} of {int(zeros_before_OI.sum())} zeros of {case.label} are lost; keep them, or take "
            "Invariant.ZEROS out of `keeps`",
        )
    if method.stage is not Stage.PRUNE or Invariant.ZEROS not in method.provides:
        return
    findings.expect(
        "L7 prunes",
        bool(zeros_OI.any()),
        f"{case.label} comes out without a single zero; prune it, or set `provides` to frozenset()",
    )
    _check_pattern(method, case, zeros_OI, findings)


def _check_pattern(method: LayerMethod, case: LayerCase, zeros_OI: torch.Tensor, findings: Findings) -> None:
    claimed, named = method.sparsity_pattern(), getattr(method, "pattern", None)
    if isinstance(named, str) and _N_OF_M.fullmatch(named):
        findings.expect(
            "L8 pattern",
            claimed == named,
            f"the parameter pattern is {named}, but sparsity_pattern() claims {claimed}; let it return the pattern",
        )
    if claimed == "row" and not bool((case.weight_OI == 0).any()):
        zeros_O = zeros_OI.sum(1)
        equal = bool((zeros_O == zeros_O[0]).all())
        findings.expect("L8 pattern", equal, f"sparsity_pattern() is 'row', but rows of {case.label} have unlike zeros")
    match = _N_OF_M.fullmatch(claimed or "")
    if match:
        most, width = int(match[1]), int(match[2])
        num_out, num_in = zeros_OI.shape
        follows = num_in % width == 0 and bool((~zeros_OI).view(num_out, num_in // width, width).sum(-1).le(most).all())
        findings.expect(
            "L8 pattern",
            follows,
            f"{case.label} does not keep to {claimed}: more than {most} of {width} neighbouring weights of a row are "
            f"left, or {width} does not divide its in features (then refuse it in `check_layer`)",
        )


def _check_useful(method: LayerMethod, case: LayerCase, findings: Findings) -> None:
    import torch

    with torch.inference_mode():
        result = method.compress(case.weight_OI.clone(), case.statistic(method.needs))
    output_TO = case.inputs_TI @ case.weight_OI.T
    error = (output_TO - case.inputs_TI @ result.weight_OI.T).square().sum() / output_TO.square().sum()
    findings.expect(
        "L13 useful",
        bool(error < 1),
        f"the output error of {case.label} is {float(error):.3g} of the output, more than a layer of zeros would make",
    )


def _check_determinism(method: LayerMethod, case: LayerCase, findings: Findings) -> None:
    """Run three times: twice with the same global seed, once with another; and outside of inference mode."""
    results: list[LayerResult] = []
    for seed in (0, 0, 1):
        with (
            findings.attempt("L1 runs", f"`compress` of {case.label} outside of inference mode"),
            left_alone(findings, "`compress`", seed=seed),
        ):
            results.append(method.compress(case.weight_OI.clone(), case.statistic(method.needs)))
    if len(results) < 3 or not all(isinstance(result, LayerResult) for result in results):
        return
    first, second, third = results
    if not findings.expect(
        "C8 deterministic",
        _same_result(first, second),
        f"`compress` of {case.label} gave two results for one input; remove what depends on time, addresses or "
        "unordered sets, and seed your own generators from a parameter",
    ):
        return
    findings.expect(
        "C8 deterministic",
        _same_result(first, third),
        "the result of `compress` depends on the global random seed; draw from a torch.Generator seeded with a "
        "parameter",
    )


def _same_result(one: LayerResult, other: LayerResult) -> bool:
    if dict(one.metrics) != dict(other.metrics) or (one.encoding is None) != (other.encoding is None):
        return False
    pairs = [(one.weight_OI, other.weight_OI)]
    if one.encoding is not None and other.encoding is not None:
        pairs += [(one.encoding.q_OI, other.encoding.q_OI), (one.encoding.scale_OG, other.encoding.scale_OG)]
    return all(same_bytes(*pair) for pair in pairs)
