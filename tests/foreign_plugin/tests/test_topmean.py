"""What the author of a plugin tests: conformance in one line, and what the method is for."""

from __future__ import annotations

import pytest
import torch
from topmean import TopMean

from orchestrator.api import InputMoment
from orchestrator.testing import check_method


@pytest.mark.parametrize("method", [TopMean(), TopMean(sparsity=0.8), TopMean(correct=False)])
def test_it_conforms(method: TopMean) -> None:
    check_method(method)


def test_mean_output_stays_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(8, 32, generator=draw)
    inputs_TI = torch.randn(64, 32, generator=draw) + 0.5
    absolute_TI = inputs_TI.abs()
    statistic = InputMoment(64, inputs_TI.square().sum(0), inputs_TI.sum(0), absolute_TI.sum(0), absolute_TI.amax(0))
    mean_I = inputs_TI.mean(0)

    corrected_OI = TopMean().compress(weight_OI, statistic).weight_OI
    plain_OI = TopMean(correct=False).compress(weight_OI, statistic).weight_OI

    assert torch.equal((corrected_OI == 0).sum(1), torch.full((8,), 16))
    torch.testing.assert_close(corrected_OI @ mean_I, weight_OI @ mean_I, rtol=1e-5, atol=1e-5)
    assert (plain_OI @ mean_I - weight_OI @ mean_I).abs().max() > 0.1
