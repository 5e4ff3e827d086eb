"""Pruning methods against plain loops written from the papers, and the properties that later steps rely on.

Shape legend: O = out features, I = in features, T = tokens.
"""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from orchestrator.api import InputMoment, LayerMethod, LayerResult, LayerShape, StepError, lowest
from orchestrator.statistics import InputMomentBuilder
from orchestrator_pruning.magnitude import Magnitude
from orchestrator_pruning.patterns import num_pruned
from orchestrator_pruning.sparsegpt import SparseGPT
from orchestrator_pruning.wanda import Wanda
from orchestrator_quantization.gptq import GPTQ
from orchestrator_quantization.sparse_gptq import SparseGPTQ


def make_weight(num_out: int = 12, num_in: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))


def make_moment(num_in: int = 40, num_tokens: int = 200, seed: int = 1) -> InputMoment:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(num_tokens, num_in, generator=generator) * torch.rand(num_in, generator=generator) * 3
    builder = InputMomentBuilder(num_in, with_hessian=False)
    builder.add(x_TI)
    return builder.finish()


def loop_prune(
    score: list[list[float]], weight: list[list[float]], run: int | None, share: Fraction
) -> list[list[int]]:
    """Which columns go, row by row: lowest score first, zeros before anything, of equals the lower index."""
    removed = []
    for scores, weights in zip(score, weight, strict=True):
        width = run or len(scores)
        gone: list[int] = []
        for start in range(0, len(scores), width):
            columns = sorted(range(start, start + width), key=lambda j: (weights[j] != 0, scores[j], j))
            gone += columns[: int(share * width)]
        removed.append(sorted(gone))
    return removed


def zero_columns(weight_OI: torch.Tensor) -> list[list[int]]:
    return [[j for j, w in enumerate(row) if w == 0] for row in weight_OI.tolist()]


@pytest.mark.parametrize(("pattern", "run", "sparsity"), [("row", None, "3/10"), ("2:4", 4, "1/2"), ("4:8", 8, "1/2")])
def test_wanda_removes_what_plain_loops_over_eq_1_remove(pattern: str, run: int | None, sparsity: str) -> None:
    weight_OI, moment = make_weight(), make_moment()
    norms = [float(value) ** 0.5 for value in moment.sum_squares_I.double().tolist()]
    score = [[abs(w) * n for w, n in zip(row, norms, strict=True)] for row in weight_OI.tolist()]
    expected = loop_prune(score, weight_OI.tolist(), run, Fraction(sparsity))
    result = Wanda(sparsity=float(Fraction(sparsity)), pattern=pattern).compress(weight_OI, moment)
    assert zero_columns(result.weight_OI) == expected
    kept_OI = result.weight_OI != 0
    assert torch.equal(result.weight_OI[kept_OI], weight_OI[kept_OI]), "wanda updates no weight"


@pytest.mark.parametrize(("pattern", "run", "sparsity"), [("row", None, "1/4"), ("2:4", 4, "1/2"), ("4:8", 8, "1/2")])
def test_magnitude_removes_what_plain_loops_remove(pattern: str, run: int | None, sparsity: str) -> None:
    weight_OI = make_weight(seed=3)
    expected = loop_prune(weight_OI.abs().tolist(), weight_OI.tolist(), run, Fraction(sparsity))
    result = Magnitude(sparsity=float(Fraction(sparsity)), pattern=pattern).compress(weight_OI, None)
    assert zero_columns(result.weight_OI) == expected


def test_magnitude_over_the_layer_removes_the_smallest_of_all_rows() -> None:
    weight_OI = make_weight() * torch.arange(1, 13).unsqueeze(1)
    result = Magnitude(sparsity=0.25, scope="layer").compress(weight_OI, None)
    removed = sorted(abs(w) for w in weight_OI[result.weight_OI == 0].tolist())
    assert removed == sorted(abs(w) for w in weight_OI.flatten().tolist())[: 12 * 40 // 4]
    assert len(set((result.weight_OI == 0).sum(1).tolist())) > 1, "rows of different size lose different shares"


def reference_sparsegpt(weight_OI: torch.Tensor, moment: InputMoment, method: SparseGPT) -> torch.Tensor:
    """Algorithm 1 as the authors run it, in float64: the inverse of H, its Cholesky factor, weights updated eagerly."""
    hessian_II = moment.require_hessian().double() / moment.num_tokens
    dead_I = hessian_II.diagonal() == 0
    damping = method.damping * hessian_II.diagonal()[~dead_I].mean()
    hessian_II[dead_I, dead_I] = hessian_II.diagonal()[~dead_I].mean()
    hessian_II += damping * torch.eye(len(hessian_II))
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    w_OI = weight_OI.double()
    w_OI[:, dead_I] = 0.0
    zero_OI = w_OI == 0
    num_out, num_in = w_OI.shape
    for first in range(0, num_in, method.block_size):
        stop = min(first + method.block_size, num_in)
        width = stop - first if method.pattern == "block" else int(method.pattern[-1])
        for start in range(first, stop, width):
            score = w_OI[:, start : start + width] ** 2 / upper_II.diagonal()[start : start + width] ** 2
            score[zero_OI[:, start : start + width]] = -1.0
            removed = zero_OI[:, start : start + width].clone()
            if method.pattern == "block":
                count = int(method.sparsity * score.numel() + 1e-9)
                order = score.T.flatten().argsort(stable=True)[:count]
                flat = torch.zeros(score.numel(), dtype=torch.bool)
                flat[order] = True
                removed |= flat.view(width, num_out).T
            else:
                removed.scatter_(1, score.argsort(dim=1, stable=True)[:, : width - int(method.pattern[0])], True)
            for j in range(start, start + width):
                kept_O = w_OI[:, j].masked_fill(removed[:, j - start], 0.0)
                w_OI[:, j:] -= ((w_OI[:, j] - kept_O) / upper_II[j, j])[:, None] * upper_II[j, j:]
                w_OI[:, j] = kept_O
    return w_OI


SPARSEGPT_CASES = [
    SparseGPT(),
    SparseGPT(block_size=16, sparsity=0.7),
    SparseGPT(block_size=13, sparsity=0.3, damping=0.1),
    SparseGPT(pattern="2:4", block_size=16),
    SparseGPT(pattern="4:8", block_size=40),
]


def make_hessian(num_in: int = 40, dead: tuple[int, ...] = ()) -> InputMoment:
    generator = torch.Generator().manual_seed(5)
    mixing_II = torch.eye(num_in) + 0.5 * torch.randn(num_in, num_in, generator=generator) / num_in**0.5
    x_TI = torch.randn(300, num_in, generator=generator) @ mixing_II * (torch.rand(num_in, generator=generator) + 0.1)
    x_TI[:, list(dead)] = 0.0
    builder = InputMomentBuilder(num_in, with_hessian=True)
    builder.add(x_TI)
    return builder.finish()


@pytest.mark.parametrize("method", SPARSEGPT_CASES, ids=repr)
@pytest.mark.parametrize("pruned", [False, True])
def test_sparsegpt_gives_what_the_authors_algorithm_gives(method: SparseGPT, pruned: bool) -> None:
    weight_OI, moment = make_weight(), make_hessian(dead=(3, 17))
    if pruned:
        weight_OI = Magnitude(sparsity=0.25).compress(weight_OI, None).weight_OI
    expected_OI = reference_sparsegpt(weight_OI, moment, method)
    result = method.compress(weight_OI, moment)
    torch.testing.assert_close(result.weight_OI.double(), expected_OI, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.weight_OI == 0, expected_OI == 0)
    delta_OI = weight_OI.double().masked_fill(moment.sum_squares_I == 0, 0.0) - expected_OI
    loss = float((delta_OI @ moment.require_hessian().double() * delta_OI).sum()) / moment.num_tokens
    assert result.metrics["proxy_loss"] == pytest.approx(loss, rel=1e-3)
    assert result.metrics["dead_inputs"] == 2 and result.metrics["fallback_diagonal"] == 0


@pytest.mark.parametrize("pattern", ["block", "2:4"])
def test_sparsegpt_beats_wanda_with_the_same_pattern(pattern: str) -> None:
    weight_OI, moment = make_weight(64, 128), make_hessian(128)
    wanda = Wanda(pattern="row" if pattern == "block" else pattern).compress(weight_OI, moment)
    sparsegpt = SparseGPT(pattern=pattern).compress(weight_OI, moment)

    def loss(result: LayerResult) -> float:
        delta_OI = weight_OI - result.weight_OI
        return float((delta_OI @ moment.require_hessian() * delta_OI).sum())

    assert (sparsegpt.weight_OI == 0).sum() == (wanda.weight_OI == 0).sum()
    assert loss(sparsegpt) < 0.9 * loss(wanda)


def test_an_h_that_cannot_be_factored_is_recorded() -> None:
    moment = make_hessian()
    indefinite_II = moment.require_hessian().clone()
    indefinite_II[0, 1] = indefinite_II[1, 0] = 1e9
    moment = InputMoment(
        moment.num_tokens, moment.sum_squares_I, moment.sum_I, moment.sum_abs_I, moment.max_abs_I, indefinite_II
    )
    result = SparseGPT(pattern="2:4", block_size=8).compress(make_weight(), moment)
    assert result.metrics["fallback_diagonal"] == 1 and result.metrics["zero_fraction"] == 0.5


@pytest.mark.parametrize("pattern", ["block", "2:4"])
@pytest.mark.parametrize("seed", range(4))
def test_the_joint_solve_is_never_worse_than_one_after_the_other(pattern: str, seed: int) -> None:
    weight_OI, moment = make_weight(32, 64, seed), make_hessian(64)
    grid: dict[str, Any] = {"num_bits": 3, "group_size": 32}
    pruned_OI = SparseGPT(pattern=pattern, sparsity=0.5).compress(weight_OI, moment).weight_OI
    after_OI = GPTQ(**grid).compress(pruned_OI, moment).weight_OI
    joint = SparseGPTQ(pattern=pattern, sparsity=0.5, **grid).compress(weight_OI, moment)

    def loss(result_OI: torch.Tensor) -> float:
        delta_OI = (weight_OI - result_OI).double()
        return float((delta_OI @ moment.require_hessian().double() * delta_OI).sum()) / moment.num_tokens

    assert loss(joint.weight_OI) <= loss(after_OI) * (1 + 1e-5)
    assert joint.metrics["proxy_loss"] == pytest.approx(loss(joint.weight_OI), rel=1e-3)
    zeros_OI = joint.weight_OI == 0
    assert float(zeros_OI.float().mean()) >= 0.5
    if pattern == "2:4":
        assert bool((zeros_OI.view(32, -1, 4).sum(-1) >= 2).all())


def test_sparsegpt_refuses_what_it_cannot_fill() -> None:
    with pytest.raises(ValidationError, match="block_size 30 is no multiple of the 4 of pattern 2:4"):
        SparseGPT(pattern="2:4", block_size=30)
    with pytest.raises(StepError, match="no calibration tokens"):
        SparseGPT().compress(make_weight(), None)
    parameter, what = SparseGPT(sparsity=0.001, block_size=8).check_layer(LayerShape("x", 10, 40)) or ("", "")
    assert parameter == "sparsity" and what == "0.001 of a block of 80 weights is less than one weight"


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("num_in", [10, 100, 257])
def test_every_row_loses_exactly_the_floor_of_its_share(sparsity: float, num_in: int) -> None:
    expected = int(Fraction(str(sparsity)) * num_in)
    assert num_pruned(sparsity, num_in) == expected
    weight_OI, moment = make_weight(7, num_in), make_moment(num_in)
    for method in (Magnitude(sparsity=sparsity), Wanda(sparsity=sparsity)):
        zeros_O = (method.compress(weight_OI, moment).weight_OI == 0).sum(1)
        assert zeros_O.tolist() == [expected] * 7


@pytest.mark.parametrize("count", [0, 1, 5, 9, 10])
def test_of_equal_scores_the_lower_index_goes_first(count: int) -> None:
    score_XS = torch.tensor([[1.0] * 10, [2, 1, 1, 2, 1, 1, 2, 2, 1, 0]])
    mask_XS = lowest(score_XS, count)
    for scores, mask in zip(score_XS.tolist(), mask_XS.tolist(), strict=True):
        expected = sorted(range(10), key=lambda j: (scores[j], j))[:count]
        assert [j for j, gone in enumerate(mask) if gone] == sorted(expected)


@pytest.mark.parametrize("pattern", ["row", "2:4", "4:8"])
def test_pruning_again_keeps_zeros_and_removes_nothing_else(pattern: str) -> None:
    """Zeros count as removed first, even when other scores are zero too because an input never occurred."""
    weight_OI, moment = make_weight(), make_moment()
    dead = {name: getattr(moment, name).clone() for name in ("sum_squares_I", "sum_I", "sum_abs_I", "max_abs_I")}
    for values_I in dead.values():
        values_I[:3] = 0.0
    moment = InputMoment(moment.num_tokens, **dead)
    method: LayerMethod
    for method in (Magnitude(pattern=pattern), Wanda(pattern=pattern)):
        once_OI = Magnitude(pattern=pattern).compress(weight_OI, None).weight_OI
        twice_OI = method.compress(once_OI, moment).weight_OI
        assert torch.equal(once_OI, twice_OI)


def test_more_pruning_extends_the_zeros() -> None:
    weight_OI, moment = make_weight(), make_moment()
    half_OI = Wanda(pattern="2:4").compress(weight_OI, moment).weight_OI
    more_OI = Wanda(sparsity=0.7).compress(half_OI, moment).weight_OI
    assert bool((more_OI[half_OI == 0] == 0).all())
    assert (more_OI == 0).sum(1).tolist() == [28] * 12


def test_inputs_that_never_occurred_are_pruned_first_and_counted() -> None:
    weight_OI, moment = make_weight(), make_moment()
    sum_squares_I = moment.sum_squares_I.clone()
    sum_squares_I[[4, 30]] = 0.0
    moment = InputMoment(moment.num_tokens, sum_squares_I, moment.sum_I, moment.sum_abs_I, moment.max_abs_I)
    result = Wanda(sparsity=0.05).compress(weight_OI, moment)
    assert zero_columns(result.weight_OI) == [[4, 30]] * 12
    assert result.metrics["dead_inputs"] == 2
    assert result.metrics["diagonal_proxy_loss"] == 0


def test_all_zero_rows_and_constant_rows_are_pruned_by_index() -> None:
    weight_OI = torch.stack([torch.zeros(8), torch.full((8,), 0.5)])
    result = Magnitude(pattern="2:4").compress(weight_OI, None)
    assert zero_columns(result.weight_OI) == [list(range(8)), [0, 1, 4, 5]]
    assert result.metrics["zero_fraction"] == 0.75
    assert result.metrics["zero_fraction_before"] == 0.5
    assert result.metrics["relative_weight_error"] == pytest.approx(0.5)


def test_an_all_zero_layer_has_finite_metrics() -> None:
    result = Magnitude().compress(torch.zeros(4, 8), None)
    assert result.metrics == {"zero_fraction": 1.0, "zero_fraction_before": 1.0, "relative_weight_error": 0.0}


@pytest.mark.parametrize("method", [Magnitude(), Magnitude(scope="layer"), Magnitude(pattern="4:8"), Wanda()])
def test_arguments_are_unchanged_and_runs_agree(method: LayerMethod) -> None:
    weight_OI, moment = make_weight(), make_moment()
    weight_before_OI, squares_before_I = weight_OI.clone(), moment.sum_squares_I.clone()
    first, second = method.compress(weight_OI, moment), method.compress(weight_OI, moment)
    assert torch.equal(first.weight_OI, second.weight_OI)
    assert first.metrics == second.metrics
    assert torch.equal(weight_OI, weight_before_OI)
    assert torch.equal(moment.sum_squares_I, squares_before_I)
    assert first.weight_OI.data_ptr() != weight_OI.data_ptr()
    assert (first.weight_OI.dtype, first.encoding) == (torch.float32, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight_OI, moment = make_weight(), make_moment()
    damaged_OI = weight_OI.clone()
    damaged_OI[2, 3] = bad
    with pytest.raises(StepError, match="1 of 480 pruning scores are not finite"):
        Magnitude().compress(damaged_OI, None)
    sum_squares_I = moment.sum_squares_I.clone()
    sum_squares_I[0] = bad
    moment = InputMoment(moment.num_tokens, sum_squares_I, moment.sum_I, moment.sum_abs_I, moment.max_abs_I)
    with pytest.raises(StepError, match="1 of 40 input norms are not finite"):
        Wanda().compress(weight_OI, moment)


def test_wanda_without_tokens_is_refused() -> None:
    with pytest.raises(StepError, match="no calibration tokens"):
        Wanda().compress(make_weight(), InputMomentBuilder(40, with_hessian=False).finish())


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"pattern 2:4 fixes sparsity at 0\.5, not 0\.6"):
        Wanda(pattern="2:4", sparsity=0.6)
    with pytest.raises(ValidationError, match="scope 'layer' does not go with pattern 2:4"):
        Magnitude(pattern="2:4", scope="layer")
    for sparsity in (0.0, 1.0, float("nan")):
        with pytest.raises(ValidationError):
            Magnitude(sparsity=sparsity)


def test_a_layer_that_does_not_fit_is_named_while_planning() -> None:
    odd = LayerShape("model.layers.0.mlp.up_proj", 64, 30)
    assert Wanda(pattern="4:8").check_layer(odd) == ("pattern", "8 does not divide in_features 30")
    parameter, what = Magnitude(sparsity=0.01).check_layer(odd) or ("", "")
    assert parameter == "sparsity"
    assert what == "0.01 of a row is less than one weight of the in_features 30"
    assert Wanda(sparsity=0.5).check_layer(odd) is None
    assert Wanda(pattern="2:4").check_layer(LayerShape("x", 3, 12)) is None


def test_the_claimed_pattern_is_the_one_that_was_asked_for() -> None:
    claims = [method.sparsity_pattern() for method in (Wanda(), Wanda(pattern="4:8"), Magnitude(scope="layer"))]
    assert claims == ["row", "4:8", None]


def test_methods_can_be_listed_without_torch() -> None:
    code = (
        "import sys, orchestrator_pruning, orchestrator_quantization as q; "
        "q.GPTQ().scheme(); orchestrator_pruning.Wanda(pattern='2:4'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
