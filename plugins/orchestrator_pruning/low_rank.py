"""Recovery after structured pruning: low-rank updates trained with `peft` and merged into the weights.

Ma et al. 2023, arXiv:2305.11627, section 3.3, eq. 6: f(x) = (W + P Q) x + b, with only P and Q trained. Their settings:
rank 8, alpha 16, learning rate 1e-4; here AdamW without weight decay, no dropout, so that the same input gives the same
bytes, and a learning rate that rises for a twentieth of the updates and then falls linearly to zero.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError

if TYPE_CHECKING:
    import torch

_WARM_UP_SHARE = 0.05
_CLIP_NORM = 1.0


def recover(
    model: Any,
    layers: Sequence[str],
    tokens_NT: torch.Tensor,
    *,
    rank: int,
    alpha: float,
    updates: int,
    learning_rate: float,
    batch_sequences: int,
    seed: int,
    progress: Callable[[int, float], None],
) -> Any:
    """Train updates of the linear layers called `layers` on the next-token loss; return the model with them merged.

    progress: called with the number of updates done and the loss of the last. Raises `StepError` for a loss that is not
    finite.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):  # the updates start from random numbers
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(layers))
        adapted: Any = get_peft_model(model, settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    batches = _batches(tokens_NT, batch_sequences, seed)
    with torch.enable_grad():
        for update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(update, updates)
            tokens_BT = next(batches).to(model.device)
            loss = adapted(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(trained, _CLIP_NORM))
            if not (math.isfinite(float(loss.detach())) and math.isfinite(norm)):
                raise StepError(
                    f"recovery diverged at update {update + 1}: loss {float(loss.detach())}, gradient norm {norm}",
                    remedy=f"lower `lora_learning_rate` (now {learning_rate:g})",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(update + 1, float(loss.detach()))
    return adapted.merge_and_unload()


def _schedule(update: int, updates: int) -> float:
    """The learning rate of an update (counted from 0) as a share of its peak."""
    rising = math.ceil(_WARM_UP_SHARE * updates)
    return (update + 1) / rising if update < rising else (updates - update) / (updates - rising)


def _batches(tokens_NT: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [B, T] for ever, each window once per pass, in an order that depends on the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(tokens_NT))
    while True:
        order = torch.randperm(len(tokens_NT), generator=generator)
        for chosen in torch.split(order[: len(tokens_NT) // size * size], size):
            yield tokens_NT[chosen]
