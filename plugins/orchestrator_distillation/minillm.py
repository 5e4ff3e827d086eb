"""MiniLLM: reverse KL on what the student writes, by its policy gradient.

Gu et al. 2023, arXiv:2306.08543. The student q minimizes KL(q || p) over whole sequences y that it writes itself. Let
r_t = ln p(y_t | ...) / q(y_t | ...) be the reward of token t. The gradient is taken apart (eq. 3) into the exact
gradient of the expected reward of the next token, and the reward of all tokens after it:

    grad L = - E_{y ~ m} sum_t w_t [ grad E_{y' ~ q(.|y_<t)} r_t(y')  +  A_t grad ln q(y_t | y_<t) ]          (eq. 7)

- m = a p + (1 - a) q: the teacher has a share in sampling (eq. 5); w_t = q(y_t) / m(y_t) corrects it (eq. 6, with the
  weight of one token in the place of the product, as there).
- A_t = (1 / (T - t - 1)) sum_{t' > t} r_t': the reward of all later tokens, divided by their number, so that long
  answers are not preferred.
- A text is read in several updates. The second term is then the clipped one of PPO (Schulman et al. 2017, eq. 7):
  min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = q_now(y_t) / q(y_t).
- A share of cross-entropy on the data keeps what the student knew (L_PT of algorithm 1).

Sums over t are means over the tokens that were written, so that the learning rate means the same as elsewhere.

Shape legend: B = windows, T = tokens of a window, P = B x T positions, R = positions that count, C = positions of a
chunk, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from orchestrator_distillation.divergence import Divergence
from orchestrator_distillation.lesson import Desk, Lesson, next_tokens
from orchestrator_distillation.objective import NO_TARGET, Objective
from orchestrator_distillation.sampling import sample

if TYPE_CHECKING:
    import torch

_REVERSE = Divergence("reverse_kl")
_ENTROPY = Objective(Divergence(), alpha=0.0)


@dataclass(frozen=True)
class Rollout:
    """What the student wrote, with what does not change while it is learned from.

    tokens_BT, counted_BT: as in `Samples`. log_q_BT: ln q(y) of the next token when it was written. weight_BT: w of the
    next token. advantage_BT: A of the next token. All are 0 where nothing counts.
    """

    tokens_BT: torch.Tensor
    counted_BT: torch.Tensor
    log_q_BT: torch.Tensor
    weight_BT: torch.Tensor
    advantage_BT: torch.Tensor

    def part(self, chosen: slice) -> Rollout:
        """Return some of the windows."""
        return Rollout(*(getattr(self, each.name)[chosen] for each in fields(self)))


def advantages(reward_BT: torch.Tensor, counted_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean reward of the counted tokens after each counted one; 0 for the last, and where none counts."""
    import torch

    reward_BT = torch.where(counted_BT, reward_BT, 0.0)
    later_BT = reward_BT.flip(1).cumsum(1).flip(1) - reward_BT
    number_BT = counted_BT.flip(1).cumsum(1).flip(1) - counted_BT.long()
    return torch.where(counted_BT, later_BT / number_BT.clamp_min(1), 0.0)


def policy_loss_and_gradient(
    student_CV: torch.Tensor,
    log_p_CV: torch.Tensor,
    rollout: Mapping[str, torch.Tensor],
    clip: float,
    positions: int,
) -> tuple[float, torch.Tensor]:
    """Return the loss of some positions, and its gradient [C, V] by the student's logits (float32).

    rollout: of each position `target` (the token that was written), `log_q`, `weight` and `advantage`, all [C].
    """
    import torch

    log_q_CV = student_CV.log_softmax(-1)
    value_C, gradient_CV = _REVERSE.value_and_gradient(log_p_CV, log_q_CV)
    gradient_CV *= rollout["weight"].unsqueeze(-1)
    target_C1 = rollout["target"].unsqueeze(-1)
    ratio_C = (log_q_CV.gather(-1, target_C1).squeeze(-1) - rollout["log_q"]).exp()
    advantage_C = rollout["weight"] * rollout["advantage"]
    gain_C, clipped_C = ratio_C * advantage_C, ratio_C.clamp(1 - clip, 1 + clip) * advantage_C
    # Where the clipped gain is the lower one, nothing is to be gained by a change.
    slope_C = torch.where(gain_C <= clipped_C, gain_C, 0.0)
    gradient_CV += log_q_CV.exp() * slope_C.unsqueeze(-1)
    gradient_CV.scatter_add_(-1, target_C1, -slope_C.unsqueeze(-1))
    loss_C = rollout["weight"] * value_C - torch.minimum(gain_C, clipped_C)
    return float(loss_C.sum(dtype=torch.float64)) / positions, gradient_CV.div_(positions)


class MiniLLMLesson(Lesson):
    """Writes for some updates at once, then reads what was written, `reuse` times.

    teacher_share: a of the mixture. clip: eps. entropy_weight: of cross-entropy on the data.
    """

    def __init__(
        self,
        desk: Desk,
        seed: int,
        *,
        prompt: int,
        answer: int,
        teacher_share: float,
        clip: float,
        reuse: int,
        entropy_weight: float,
    ) -> None:
        super().__init__(desk, seed)
        self._prompt, self._answer = prompt, answer
        self._teacher_share, self._clip = teacher_share, clip
        self._reuse, self._entropy_weight = reuse, entropy_weight
        self._rollout: Rollout | None = None
        self._reward = 0.0

    def teach(self, update: int) -> float:
        """Write if it is time to, then add up the gradients of what was written and of the data."""
        device = self.desk.student.model.device
        tokens_BT = self.desk.windows_NT[self.order.next()].to(device)
        if update % self._reuse == 0 or self._rollout is None:
            self._rollout = self._write(tokens_BT[:, : self._prompt])
        loss = self._read(self._rollout)
        return loss + self._entropy(tokens_BT) if self._entropy_weight > 0 else loss

    def curve(self) -> Mapping[str, float]:
        """The mean reward of a token that the student wrote, nats: minus its reverse KL."""
        return {"reward": self._reward}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the generator and what was written."""
        tensors, facts = super().state()
        if self._rollout is not None:
            tensors |= {f"rollout.{each.name}": getattr(self._rollout, each.name) for each in fields(Rollout)}
        return tensors, {**facts, "reward": self._reward}

    def restore(self, update: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Go on after `update` updates."""
        super().restore(update, tensors, facts)
        if "rollout.tokens_BT" in tensors:
            self._rollout = Rollout(*(tensors[f"rollout.{each.name}"] for each in fields(Rollout)))
        self._reward = float(facts["reward"])

    def _write(self, prompts_BT: torch.Tensor) -> Rollout:
        import torch

        teacher = self.desk.teacher
        assert teacher is not None
        samples = sample(
            self.desk.student,
            prompts_BT,
            self._answer,
            self.generator,
            end_token=self.desk.end_token,
            teacher=teacher,
            teacher_share=self._teacher_share,
        )
        tokens_BT, counted_BT = samples.tokens_BT, samples.counted_BT
        targets_BT = next_tokens(tokens_BT, counted_BT)
        log_q_BT, log_p_BT = (torch.zeros(tokens_BT.shape, device=tokens_BT.device) for _ in range(2))
        for start in range(0, len(tokens_BT), self.desk.at_once):
            part = slice(start, start + self.desk.at_once)
            columns_P1 = targets_BT[part].clamp_min(0).reshape(-1, 1)
            said = teacher.listen(tokens_BT[part])
            for rows, logits_CV in self.desk.student.logits_of(tokens_BT[part]):
                rows_C = torch.arange(len(columns_P1), device=tokens_BT.device)[rows]
                log_q_BT[part].view(-1)[rows] = logits_CV.log_softmax(-1).gather(-1, columns_P1[rows]).squeeze(-1)
                log_p_BT[part].view(-1)[rows] = said.at(rows_C).log_p.gather(-1, columns_P1[rows]).squeeze(-1)
        mixed_BT = self._teacher_share * log_p_BT.exp() + (1 - self._teacher_share) * log_q_BT.exp()
        reward_BT = log_p_BT - log_q_BT
        self._reward = float(reward_BT[counted_BT].double().mean())
        return Rollout(
            tokens_BT,
            counted_BT,
            torch.where(counted_BT, log_q_BT, 0.0),
            torch.where(counted_BT, log_q_BT.exp() / mixed_BT, 0.0),
            advantages(reward_BT, counted_BT),
        )

    def _read(self, rollout: Rollout) -> float:
        teacher, positions = self.desk.teacher, int(rollout.counted_BT.sum())
        assert teacher is not None
        loss = 0.0
        for start in range(0, len(rollout.tokens_BT), self.desk.at_once):
            part = rollout.part(slice(start, start + self.desk.at_once))
            said = teacher.listen(part.tokens_BT)
            known = {
                "target": next_tokens(part.tokens_BT, part.counted_BT).flatten(),
                "log_q": part.log_q_BT.flatten(),
                "weight": part.weight_BT.flatten(),
                "advantage": part.advantage_BT.flatten(),
            }

            def cost(
                rows_C: torch.Tensor, logits_CV: torch.Tensor, said: Any = said, known: Any = known
            ) -> tuple[float, torch.Tensor]:
                here = {name: value_P[rows_C] for name, value_P in known.items()}
                return policy_loss_and_gradient(logits_CV, said.at(rows_C).log_p, here, self._clip, positions)

            rows_R = part.counted_BT.flatten().nonzero().squeeze(-1)
            loss += self.desk.student.backward(part.tokens_BT, rows_R, cost)
        return loss

    def _entropy(self, tokens_BT: torch.Tensor) -> float:
        import torch

        targets_BT = next_tokens(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        targets = int((targets_BT != NO_TARGET).sum())
        loss = 0.0
        for start in range(0, len(tokens_BT), self.desk.at_once):
            part = slice(start, start + self.desk.at_once)
            targets_P = targets_BT[part].flatten()

            def cost(
                rows_C: torch.Tensor, logits_CV: torch.Tensor, targets_P: Any = targets_P
            ) -> tuple[float, torch.Tensor]:
                value, gradient_CV = _ENTROPY.loss_and_gradient(logits_CV, None, targets_P[rows_C], targets, targets)
                return self._entropy_weight * value, gradient_CV.mul_(self._entropy_weight)

            rows_R = (targets_P != NO_TARGET).nonzero().squeeze(-1)
            loss += self.desk.student.backward(tokens_BT[part], rows_R, cost)
        return loss
