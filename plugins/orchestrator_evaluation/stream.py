"""Reading a stream of tokens through a cache, a few at a time; and the same text without one.

Shape legend: T = tokens of a stream, C = tokens of a forward pass, L = predicted tokens (one fewer than read),
V = vocabulary.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from orchestrator.api import Checkpoint, StepError
from orchestrator_evaluation.forward import check_vocabulary, chunks, logits_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


# GPT-2 and GPT-BigCode; OPT and BioGPT.
_POSITION_TABLE = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings?)\.weight$")


def learned_positions(model: Checkpoint) -> int | None:
    """How many positions the model has learned a vector for; None if it computes them, so that they never end."""
    rows = [info.shape[0] for name, info in model.tensors.items() if _POSITION_TABLE.search(name)]
    # Not every row is a position: OPT's first two are for padding.
    return min(*rows, model.positions or rows[0]) if rows else None


class Keeping(Protocol):
    """What of a cache policy a stream needs."""

    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> AbstractContextManager[Cache]:
        """An empty cache for one stream."""

    def held_bytes(self, cache: Cache) -> int:
        """Bytes that it holds now."""


class FullCache:
    """The contiguous cache of Transformers: every token that a layer's attention can reach, for ever."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        """Give what Transformers itself would make for the model."""
        from transformers import DynamicCache

        yield DynamicCache(config=model.config)

    def held_bytes(self, cache: Cache) -> int:
        """Bytes of all keys and values. Raises `StepError` for a cache of another kind of state."""
        return sum(tensor.nbytes for layer in cache.layers for tensor in _keys_and_values(layer))

    def bytes_of(self, model: PreTrainedModel, tokens: int) -> int:
        """Bytes of such a cache after `tokens` tokens: one token is read to see shapes, the others are not."""
        import torch
        from transformers import DynamicCache

        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with torch.inference_mode():
            one = cast("Any", model)(token, use_cache=True).past_key_values
        whole = DynamicCache(config=model.config)
        for index, layer in enumerate(one.layers):
            keys_BKTD, values_BKTD = (
                tensor.new_empty((*tensor.shape[:-2], tokens, tensor.shape[-1]), device="meta")
                for tensor in _keys_and_values(layer)
            )
            whole.update(keys_BKTD, values_BKTD, index)
        return self.held_bytes(whole)


def _keys_and_values(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        raise StepError(
            f"a layer of the model keeps a state of its own ({type(layer).__name__}), not keys and values",
            remedy="`validate: streaming` is for models that attend in every layer",
        )
    return keys, values


class Pass(NamedTuple):
    """One forward pass: tokens of the stream read so far, bytes that the cache then holds, seconds in the model."""

    tokens: int
    held: int
    seconds: float


@dataclass(frozen=True)
class Reading:
    """One stream, read. losses_L: -ln p of every token but the first, nats, float64. right_L: was it the likeliest?"""

    losses_L: torch.Tensor
    right_L: torch.Tensor
    passes: Sequence[Pass]


class Reader:
    """One model that reads streams through caches of one policy."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, policy: Keeping) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.policy = policy

    def read(
        self,
        tokens_T: torch.Tensor,
        pieces: list[int],
        *,
        told: Callable[[int], None] = lambda tokens: None,
    ) -> Reading:
        """Read a stream in forward passes of so many tokens each, `told` of the size of each when it is done.

        Raises `StepError` for tokens or positions that the model does not have.
        """
        import torch

        check_vocabulary(self.model, tokens_T)
        model: Any = self.model
        tokens_T = tokens_T.to(model.device)
        losses: list[torch.Tensor] = []
        right: list[torch.Tensor] = []
        passes: list[Pass] = []
        begin = 0
        with (
            warnings.catch_warnings(),
            self.policy.attached(self.model, self.checkpoint) as cache,
            torch.inference_mode(),
        ):
            # From Transformers 5.24 on the argument has a second name, which those before do not know.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            for size in pieces:
                end = begin + size
                started = time.perf_counter()
                try:
                    logits_BCV = model(tokens_T[None, begin:end], past_key_values=cache, use_cache=True).logits
                except IndexError as error:  # a table of learned positions has ended
                    raise StepError(
                        f"the model has no position for token {end} of the stream ({error})",
                        remedy=f"set stream_tokens to at most {begin}: its positions are learned, and end there",
                    ) from None
                seconds = time.perf_counter() - started
                targets_C = tokens_T[begin + 1 : end + 1]
                logits_CV = logits_BCV[0, : len(targets_C)]
                losses.append(_losses(logits_CV, targets_C))
                right.append((logits_CV.argmax(-1) == targets_C).cpu())
                passes.append(Pass(end, self.policy.held_bytes(cache), seconds))
                told(size)
                begin = end
        return Reading(torch.cat(losses), torch.cat(right), passes)


def in_pieces(tokens: int, size: int) -> list[int]:
    """Sizes that add up to `tokens`, each `size` but the last."""
    return [min(size, tokens - begin) for begin in range(0, tokens, size)]


def recomputed_losses(
    model: PreTrainedModel, tokens_T: torch.Tensor, window: int, *, start_token: bool = False
) -> torch.Tensor:
    """Return -ln p [L], nats, float64, of every token but the first, without a cache: the trained window, moved along.

    The window moves by half of its length, so each token sees between half a window and a whole one of what is before
    it, at positions that the model was trained on. It is what a model can know of a long text within its window.
    start_token: the stream begins with one; then every window does.
    """
    import torch

    stride = max(1, window // 2)
    losses, begin = [], 0
    while begin < len(tokens_T) and len(tokens_T) > 1:
        end = min(len(tokens_T), begin + (stride if begin else window))
        seen_T = tokens_T[max(0, end - window) : end]
        if start_token:
            seen_T = torch.cat([tokens_T[:1], seen_T[1:]])
        scored = end - max(begin, 1)
        logits_CV = logits_of(model, seen_T[None])[0, -1 - scored : -1]
        losses.append(_losses(logits_CV, seen_T[-scored:].to(logits_CV.device)))
        begin = end
    return torch.cat(losses)


def _losses(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    """-ln p of each target, float64."""
    import torch

    parts = [
        torch.nn.functional.cross_entropy(logits_CV[part].float(), targets_C[part], reduction="none")
        for part in chunks(len(targets_C), logits_CV.shape[-1])
    ]
    return torch.cat(parts).double().cpu() if parts else torch.empty(0, dtype=torch.float64)
