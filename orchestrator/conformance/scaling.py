"""What the walk relies on when it asks a `ScalingMethod` for the scale of an input.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from orchestrator.conformance.bits import same_bytes
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.layer_cases import LayerCase
from orchestrator.conformance.surroundings import left_alone
from orchestrator.layer_method import ScalingMethod
from orchestrator.statistics import InputMoment

if TYPE_CHECKING:
    import torch

_CHECK = "L16 input_scale"


def check_input_scale(method: ScalingMethod, case: LayerCase, findings: Findings) -> None:
    """Ask for the scale of two layers that read one input, twice."""
    import torch

    scales: list[torch.Tensor] = []
    for seed in (0, 1):
        statistic = case.statistic(method.needs)
        assert statistic is not None
        weights = [case.weight_OI.clone(), 0.5 * case.weight_OI]
        with (
            left_alone(findings, "`input_scale`", seed=seed),
            findings.attempt(_CHECK, f"`input_scale` of {case.label}"),
            torch.inference_mode(),
        ):
            scales.append(method.input_scale(weights, statistic))
        _check_untouched(case, weights, statistic, method, findings)
    if len(scales) < 2 or not _has_form(case, scales[0], findings):
        return
    findings.expect(
        _CHECK, same_bytes(*scales), f"`input_scale` of {case.label} gave two results for one input; let it be pure"
    )


def _has_form(case: LayerCase, scale_I: object, findings: Findings) -> bool:
    import torch

    num_in = case.weight_OI.shape[1]
    right = isinstance(scale_I, torch.Tensor) and scale_I.dtype is torch.float32 and tuple(scale_I.shape) == (num_in,)
    if not findings.expect(_CHECK, right, f"`input_scale` of {case.label} must return a float32 tensor ({num_in},)"):
        return False
    assert isinstance(scale_I, torch.Tensor)
    return findings.expect(
        _CHECK,
        bool((scale_I.isfinite() & (scale_I > 0)).all()),
        f"the scale of {case.label} is not finite and positive everywhere; guard inputs and columns that are zero",
    )


def _check_untouched(
    case: LayerCase, weights: list[torch.Tensor], statistic: InputMoment, method: ScalingMethod, findings: Findings
) -> None:
    same = same_bytes(weights[0], case.weight_OI)
    findings.expect(_CHECK, same, "`input_scale` changed a weight that it was given; clone what you change")
    fresh = case.statistic(method.needs)
    for field in fields(InputMoment):
        one, other = getattr(statistic, field.name), getattr(fresh, field.name)
        same = one == other if isinstance(one, int) or one is None else same_bytes(one, other)
        findings.expect(_CHECK, same, f"`input_scale` changed the statistic's {field.name}; clone what you change")
