"""Recovery after structured pruning: low-rank updates trained with `peft` and merged into the weights.

Ma et al. 2023, arXiv:2305.11627, section 3.3, eq. 6: f(x) = (W + P Q) x + b, with only P and Q trained. Their settings:
rank 8, alpha 16, learning rate 1e-4; here AdamW without weight decay, no dropout, so that the same input gives the same
bytes, and a learning rate that rises for a twentieth of the updates and then falls linearly to zero.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.api import StepError

if TYPE_CHECKING:
    import torch

Objective = Literal["dense", "text"]
_WARM_UP_SHARE = 0.05
_CLIP_NORM = 1.0


def recover(
    model: Any,
    layers: Sequence[str],
    tokens_NT: torch.Tensor,
    *,
    teacher: Any,
    rank: int,
    alpha: float,
    updates: int,
    learning_rate: float,
    batch_sequences: int,
    seed: int,
    progress: Callable[[int, float], None],
) -> Any:
    """Train updates of the linear layers called `layers`; return the model with them merged.

    teacher: the model whose predictions are followed, mean KL(teacher || model) over positions; None: the loss is that
    of the next tokens. Windows pass one by one, so that what the backward pass needs is that of one window. progress:
    called with the number of updates done and the loss of the last. Raises `StepError` for a loss that is not finite.
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
            total = 0.0
            for tokens_1T in torch.split(tokens_BT, 1):
                loss = _loss(adapted, teacher, tokens_1T) / len(tokens_BT)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(trained, _CLIP_NORM))
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise StepError(
                    f"recovery diverged at update {update + 1}: loss {total}, gradient norm {norm}",
                    remedy=f"lower `lora_learning_rate` (now {learning_rate:g})",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(update + 1, total)
    return adapted.merge_and_unload()


def divergence(model: Any, teacher: Any, tokens_NT: torch.Tensor) -> float:
    """Return the mean KL(teacher || model) over the positions of windows, nats."""
    import torch

    with torch.no_grad():
        windows = torch.split(tokens_NT.to(model.device), 1)
        return sum(float(_loss(model, teacher, tokens_1T)) for tokens_1T in windows) / len(windows)


def _loss(model: Any, teacher: Any, tokens_1T: torch.Tensor) -> torch.Tensor:
    """The loss of a window, nats per position: of its next tokens, or by the teacher's predictions."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    if teacher is None:
        next_token: torch.Tensor = model(input_ids=tokens_1T, labels=tokens_1T, use_cache=False).loss
        return next_token
    with torch.no_grad():
        log_p_TV = log_softmax(teacher(input_ids=tokens_1T, use_cache=False).logits[0], -1)
    log_q_TV = log_softmax(model(input_ids=tokens_1T, use_cache=False).logits[0], -1)
    return kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True)


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
