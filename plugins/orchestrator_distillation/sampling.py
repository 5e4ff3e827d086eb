"""Text that the student writes itself, with a KV cache; the teacher may have a say in every token.

Gu et al. 2023 (MiniLLM), arXiv:2306.08543, eq. 5: token t is drawn from a p + (1 - a) q, p being the teacher's and q
the student's distribution, so that the student does not learn to please a teacher that is fooled by nonsense.

Only the generator that is handed in decides what is drawn.

Shape legend: B = windows, T = tokens of a window, S = sampled tokens, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from orchestrator_distillation.outputs import Scorer

if TYPE_CHECKING:
    import torch

    from orchestrator_distillation.teachers import Ensemble


@dataclass(frozen=True)
class Samples:
    """Prompts with what was written after them.

    counted_BT: positions whose next token was sampled, up to the first end token, which counts; what follows it is
    filled up with end tokens and does not.
    """

    tokens_BT: torch.Tensor
    counted_BT: torch.Tensor


class Writer:
    """Continues prompts, token by token."""

    def __init__(self, scorer: Scorer) -> None:
        self._model = scorer.model
        known = signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # Transformers 5.24 gave it another name
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._cache: Any = None

    def start(self) -> None:
        """Forget what was read."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def read(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Read on; return the logits [B, V] of the next token, float32."""
        state = {self._cache_name: self._cache}
        output = self._model(input_ids=tokens_BT, use_cache=True, **state, **self._last_only)
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV


def sample(
    student: Scorer,
    prompts_BT: torch.Tensor,
    count: int,
    generator: torch.Generator,
    *,
    end_token: int | None = None,
    teacher: Ensemble | None = None,
    teacher_share: float = 0.0,
) -> Samples:
    """Let the student write `count` tokens after each prompt; no gradients.

    teacher_share: a, above.
    """
    import torch

    writers = [(1.0 - teacher_share, Writer(student))]
    if teacher is not None and teacher_share > 0:
        writers += [(teacher_share * weight, Writer(scorer)) for weight, scorer in teacher.members]
    tokens_BT = prompts_BT
    open_B = torch.ones(len(prompts_BT), dtype=torch.bool, device=prompts_BT.device)
    counted_BT = torch.zeros_like(prompts_BT, dtype=torch.bool)
    with torch.no_grad():
        for _, writer in writers:
            writer.start()
        latest_BT = prompts_BT
        for _ in range(count):
            probability_BV = sum(weight * writer.read(latest_BT).softmax(-1) for weight, writer in writers)
            assert isinstance(probability_BV, torch.Tensor)
            latest_BT = torch.multinomial(probability_BV, 1, generator=generator)
            counted_BT[:, -1] = open_B
            if end_token is not None:
                latest_BT = torch.where(open_B.unsqueeze(-1), latest_BT, end_token)
                open_B = open_B & (latest_BT.squeeze(-1) != end_token)
            tokens_BT = torch.cat([tokens_BT, latest_BT], dim=1)
            counted_BT = torch.cat([counted_BT, torch.zeros_like(latest_BT, dtype=torch.bool)], dim=1)
    return Samples(tokens_BT, counted_BT)
