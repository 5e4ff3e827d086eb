"""Whether a model still knows a passage that it has read: the passage, other text, and the passage again.

The second time, after a few words of it, the model predicts the rest. How often its likeliest token is the right one
says whether it found the passage again, a skill that small models hardly have; what the passage's first reading adds to
ln p of its tokens, against the same text with another passage in its place, is finer, and is zero where the
cache has forgotten it.

Shape legend: K = trials, T = tokens of a trial, A = tokens asked for, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.api import StepError
from orchestrator_evaluation.forward import logits_of
from orchestrator_evaluation.stream import Reader, in_pieces

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MOST_LEAD = 16  # tokens before the passage, so that attention sinks do not hold it
PIECE = 64  # tokens of a forward pass on the way to the question


@dataclass(frozen=True)
class Distances:
    """How the trials are laid out. All in tokens.

    passage: its length. cue: how much of it is given the second time. inside, outside: from the passage to its
    repetition, within what a cache keeps and beyond it. lead: text before the passage.
    """

    passage: int
    cue: int
    inside: int
    outside: int
    lead: int

    @classmethod
    def of(cls, passage: int, reach: int) -> Distances:
        """reach: how far back a token can attend. Raises `StepError` for a cache that keeps next to nothing."""
        passage = min(passage, reach // 4)
        if passage < 2:
            raise StepError(
                f"the cache reaches {reach} tokens back: too few to ask for a passage",
                remedy="keep at least 8 tokens, and set window_tokens to at least 8",
            )
        return cls(
            passage, max(1, passage // 4), max(passage, reach // 4), reach + 2 * passage, min(MOST_LEAD, passage)
        )

    def trial(self, distance: int) -> int:
        """Tokens of a trial, from the text before the passage to the end of its repetition."""
        return self.lead + distance + self.passage

    def read(self) -> int:
        """Tokens that are read through the cache for one passage at both distances, with it and with another."""
        return 2 * (self.trial(self.inside) + self.trial(self.outside))

    def material(self, trials: int) -> int:
        """Tokens of text that the trials need: a passage and another for each, and what lies around them."""
        return 2 * self.passage * trials + self.lead + self.outside


@dataclass(frozen=True)
class Recall:
    """accuracy: share of the tokens asked for that were the likeliest. gain: what reading added to ln p, nats a token.

    unread: the accuracy without having read the passage.
    """

    accuracy: float
    unread: float
    gain: float


def trials_of(
    material_T: torch.Tensor, where: Distances, distance: int, count: int, seed: int, start: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the trials [K, T] with the passage, and the same [K, T] with another in its place.

    start: a token that every trial begins with.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    passages = material_T[: 2 * where.passage * count].view(count, 2, where.passage)
    rest_T = material_T[passages.numel() :]
    between = distance - where.passage
    places = torch.randint(len(rest_T) - where.lead - between + 1, (count,), generator=generator).tolist()
    start_T = torch.tensor([] if start is None else [start], dtype=material_T.dtype)
    read: list[torch.Tensor] = []
    unread: list[torch.Tensor] = []
    for place, (passage_T, other_T) in zip(places, passages, strict=True):
        lead_T = rest_T[place : place + where.lead]
        between_T = rest_T[place + where.lead : place + where.lead + between]
        for trials, first_T in ((read, passage_T), (unread, other_T)):
            trials.append(torch.cat([start_T, lead_T, first_T, between_T, passage_T]))
    return torch.stack(read), torch.stack(unread)


def ask(
    reader: Reader, trials: tuple[torch.Tensor, torch.Tensor], where: Distances, told: Callable[[int], None]
) -> Recall:
    """Ask a model that keeps its past in a cache, one trial after the other."""
    import torch

    asked = where.passage - where.cue
    found: list[torch.Tensor] = []
    for trials_KT in trials:
        for trial_T in trials_KT:
            reading = reader.read(trial_T, in_pieces(len(trial_T), PIECE))
            found.append(torch.stack([reading.losses_L[-asked:], reading.right_L[-asked:].double()]))
            told(len(trial_T))
    return _recall(torch.stack(found))


def ask_without_cache(model: PreTrainedModel, trials: tuple[torch.Tensor, torch.Tensor], where: Distances) -> Recall:
    """Ask a model that sees the whole trial at once."""
    import torch

    asked = where.passage - where.cue
    found: list[torch.Tensor] = []
    for trials_KT in trials:
        for trial_T in trials_KT:
            targets_A = trial_T[-asked:].to(model.device)
            logits_AV = logits_of(model, trial_T[None])[0, -1 - asked : -1]
            losses_A = torch.nn.functional.cross_entropy(logits_AV, targets_A, reduction="none").double()
            found.append(torch.stack([losses_A, (logits_AV.argmax(-1) == targets_A).double()]).cpu())
    return _recall(torch.stack(found))


def _recall(found: torch.Tensor) -> Recall:
    """found: losses and rightness [2K, 2, A], first of the trials with the passage."""
    read, unread = (half.mean((0, 2)).tolist() for half in found.chunk(2))
    return Recall(accuracy=read[1], unread=unread[1], gain=unread[0] - read[0])
