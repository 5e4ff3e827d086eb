"""Losses of distillation and their gradients against float64 autograd, each written plainly from its paper.

Shape legend: P = positions, V = vocabulary, K = tokens that the teacher names, B = windows, T = tokens of a window.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator_distillation.divergence import MIXING, Divergence
from orchestrator_distillation.lesson import next_tokens
from orchestrator_distillation.minillm import advantages, policy_loss_and_gradient
from orchestrator_distillation.objective import NO_TARGET, Objective, TeacherChunk, top_and_tail

NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
POSITIONS, VOCABULARY = 10, 11


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def plain(name: str, mixing: float, p: Tensor, q: Tensor) -> Tensor:
    """The divergence [P] from probabilities, as the papers write it."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = mixing * p + (1 - mixing) * q
        return mixing * kl(p, m) + (1 - mixing) * kl(q, m)
    if name == "skew_kl":
        return kl(p, mixing * p + (1 - mixing) * q)
    return kl(q, (1 - mixing) * p + mixing * q)


def logits(seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_PV, teacher_PV = (spread * torch.randn(POSITIONS, VOCABULARY, generator=generator) for _ in range(2))
    return student_PV, teacher_PV


def mixings(name: str) -> tuple[float, ...]:
    return (0.1, 0.5, 0.9) if name in MIXING else (0.5,)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "mixing"), [(name, mixing) for name in NAMES for mixing in mixings(name)])
def test_loss_and_gradient_agree_with_float64_autograd(
    name: Any, mixing: float, temperature: float, alpha: float
) -> None:
    student_PV, teacher_PV = logits(0)
    targets_P = torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    targets_P[[4, 9]] = NO_TARGET
    objective = Objective(Divergence(name, mixing), temperature, alpha)
    loss, parts = 0.0, []
    for rows in torch.arange(POSITIONS).split(3):  # chunks add up
        teacher = TeacherChunk((teacher_PV[rows] / temperature).log_softmax(-1))
        part, gradient = objective.loss_and_gradient(student_PV[rows], teacher, targets_P[rows], POSITIONS, 8)
        loss += part
        parts.append(gradient)

    exact_PV = student_PV.double().requires_grad_()
    p, q = ((z / temperature).softmax(-1) for z in (teacher_PV.double(), exact_PV))
    entropy = torch.nn.functional.cross_entropy(exact_PV, targets_P, ignore_index=NO_TARGET)
    expected = alpha * temperature**2 * plain(name, mixing, p, q).mean() + (1 - alpha) * entropy
    expected.backward()
    assert exact_PV.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(torch.cat(parts).double(), exact_PV.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "mixing"), [(name, mixing) for name in NAMES for mixing in mixings(name)])
@pytest.mark.parametrize("count", [1, 4, VOCABULARY - 1])
def test_a_tail_is_one_more_outcome(name: Any, mixing: float, count: int) -> None:
    student_PV, teacher_PV = logits(2)
    chunk = top_and_tail(teacher_PV.log_softmax(-1), count)
    assert chunk.ids_CK is not None
    assert chunk.log_p.shape == (POSITIONS, count + 1)
    torch.testing.assert_close(chunk.log_p.exp().sum(-1), torch.ones(POSITIONS))
    value_P, gradient_PV = Objective(Divergence(name, mixing)).divergence_and_gradient(student_PV, chunk)

    exact_PV = student_PV.double().requires_grad_()
    p, q = teacher_PV.double().softmax(-1), exact_PV.softmax(-1)
    coarse = [
        torch.cat([d.gather(-1, i := chunk.ids_CK), 1 - d.gather(-1, i).sum(-1, keepdim=True)], -1) for d in (p, q)
    ]
    expected_P = plain(name, mixing, *coarse)
    expected_P.sum().backward()
    assert exact_PV.grad is not None
    torch.testing.assert_close(value_P.double(), expected_P.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_PV.double(), exact_PV.grad, rtol=1e-3, atol=1e-5)
    whole_P = plain(name, mixing, p, exact_PV.detach().softmax(-1))
    assert bool((value_P <= whole_P + 1e-5).all())  # a lower bound; all there is if one token alone is in the tail
    if count == VOCABULARY - 1:
        torch.testing.assert_close(value_P.double(), whole_P, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_that_underflow_give_finite_numbers(name: Any) -> None:
    student_PV, teacher_PV = logits(3, spread=200.0)
    for teacher in (TeacherChunk(teacher_PV.log_softmax(-1)), top_and_tail(teacher_PV.log_softmax(-1), 3)):
        value_P, gradient_PV = Objective(Divergence(name)).divergence_and_gradient(student_PV, teacher)
        assert bool(value_P.isfinite().all())
        assert bool(gradient_PV.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_no_divergence(name: Any) -> None:
    student_PV, _ = logits(4)
    value_P, gradient_PV = Objective(Divergence(name)).divergence_and_gradient(
        student_PV, TeacherChunk(student_PV.log_softmax(-1))
    )
    assert float(value_P.abs().max()) < 1e-6
    assert float(gradient_PV.abs().max()) < 1e-6


def test_the_generalised_jsd_nears_both_kl_divergences() -> None:
    """Agarwal et al. 2023, section 3: divided by beta or 1 - beta, at either end."""
    student_PV, teacher_PV = (z.double() for z in logits(5, spread=1.0))
    log_p, log_q = teacher_PV.log_softmax(-1), student_PV.log_softmax(-1)
    for mixing, scale, name in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
        near, _ = Divergence("jsd", mixing).value_and_gradient(log_p, log_q)
        exact, _ = Divergence(name).value_and_gradient(log_p, log_q)  # type: ignore[arg-type]
        torch.testing.assert_close(near / scale, exact, rtol=1e-3, atol=1e-6)


def test_next_tokens_are_those_that_count() -> None:
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    counted_BT = torch.tensor([[False, True, True, True]])
    assert next_tokens(tokens_BT, counted_BT).tolist() == [[NO_TARGET, 7, 8, NO_TARGET]]


def test_advantages_are_the_mean_reward_of_later_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    reward_BT = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    counted_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]).bool()
    found_BT = advantages(reward_BT, counted_BT)
    for row in range(3):
        counted = [t for t in range(7) if counted_BT[row, t]]
        for t in range(7):
            later = [float(reward_BT[row, u]) for u in counted if u > t]
            expected = sum(later) / len(later) if later and t in counted else 0.0
            assert float(found_BT[row, t]) == pytest.approx(expected, abs=1e-12)


def plain_policy_loss(student_PV: Tensor, p: Tensor, rollout: dict[str, Tensor], clip: float) -> Tensor:
    """Gu et al. 2023, eq. 7 with the clipped form of algorithm 1, by autograd."""
    q = student_PV.softmax(-1)
    single = kl(q, p)
    chosen = q.gather(-1, rollout["target"].unsqueeze(-1)).squeeze(-1)
    ratio = chosen / rollout["log_q"].exp()
    gain = torch.minimum(
        ratio * rollout["weight"] * rollout["advantage"],
        ratio.clamp(1 - clip, 1 + clip) * rollout["weight"] * rollout["advantage"],
    )
    return (rollout["weight"] * single - gain).sum() / len(student_PV)


@pytest.mark.parametrize("change", [0.0, 0.1, 2.0], ids=["as written", "a little later", "clipped"])
def test_the_policy_gradient_agrees_with_float64_autograd(change: float) -> None:
    student_PV, teacher_PV = logits(6, spread=1.0)
    generator = torch.Generator().manual_seed(7)
    target_P = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    written_PV = student_PV + change * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    rollout = {
        "target": target_P,
        "log_q": written_PV.log_softmax(-1).gather(-1, target_P.unsqueeze(-1)).squeeze(-1),
        "weight": torch.rand(POSITIONS, generator=generator) + 0.5,
        "advantage": torch.randn(POSITIONS, generator=generator),
    }
    loss, gradient_PV = policy_loss_and_gradient(student_PV, teacher_PV.log_softmax(-1), rollout, 0.2, POSITIONS)
    exact = student_PV.double().requires_grad_()
    doubled = {name: value if name == "target" else value.double() for name, value in rollout.items()}
    expected = plain_policy_loss(exact, teacher_PV.double().softmax(-1), doubled, 0.2)
    expected.backward()
    assert exact.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient_PV.double(), exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["student alone", "teacher writes along"])
def test_the_policy_gradient_is_that_of_the_reverse_kl_of_whole_texts(share: float) -> None:
    """Texts of two tokens, all of them: the expectation of the estimate is the exact gradient of KL(q || p).

    Two tokens, because the length normalization then divides by one. With a teacher that writes along, eq. 6 corrects
    each token's probability but not that of its prefix; so there the prefix is given, and only one token is written.
    """
    size = 4
    generator = torch.Generator().manual_seed(8)
    tables = [torch.randn(size, generator=generator), torch.randn(size, size, generator=generator)]
    teacher = [torch.randn(size, generator=generator), torch.randn(size, size, generator=generator)]
    length = 2 if share == 0 else 1
    exact = [table.double().requires_grad_() for table in tables]
    log_q, log_p = ([t[0].double().log_softmax(-1), t[1].double().log_softmax(-1)] for t in (exact, teacher))
    divergence: Any = 0.0
    for text in itertools.product(range(size), repeat=length):
        both = [d[0][text[0]] + (d[1][text[0], text[1]] if length == 2 else 0.0) for d in (log_q, log_p)]
        divergence = divergence + both[0].exp() * (both[0] - both[1])
    divergence.backward()

    found = [torch.zeros_like(table) for table in tables]
    for text in itertools.product(range(size), repeat=length):
        states = [(0, tables[0], teacher[0]), (1, tables[1][text[0]], teacher[1][text[0]])][:length]
        q = torch.stack([table.log_softmax(-1)[text[t]] for t, table, _ in states])
        p = torch.stack([table.log_softmax(-1)[text[t]] for t, _, table in states])
        mixed = share * p.exp() + (1 - share) * q.exp()
        rollout = {
            "target": torch.tensor(text),
            "log_q": q,
            "weight": q.exp() / mixed,
            "advantage": advantages((p - q).unsqueeze(0), torch.ones(1, length, dtype=torch.bool)).squeeze(0),
        }
        log_p_CV = torch.stack([table.log_softmax(-1) for _, _, table in states])
        student_CV = torch.stack([table for _, table, _ in states])
        _, gradient_CV = policy_loss_and_gradient(student_CV, log_p_CV, rollout, 0.2, 1)
        probability = float(mixed.prod())
        found[0] += probability * gradient_CV[0]
        if length == 2:
            found[1][text[0]] += probability * gradient_CV[1]
    for table, expected in zip(found[:length], exact[:length], strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(table.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_a_long_answer_is_not_preferred() -> None:
    """Twice as many later tokens of the same reward give the same advantage (eq. 7)."""
    short, long = torch.full((1, 3), -0.5), torch.full((1, 6), -0.5)
    found = [float(advantages(reward, torch.ones_like(reward, dtype=torch.bool))[0, 0]) for reward in (short, long)]
    assert found == [-0.5, -0.5]
    assert math.isfinite(found[0])
