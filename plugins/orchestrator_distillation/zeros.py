"""Keeping pruned weights at zero while a model is trained.

Matrices are taken as parameters, not as layers: Transformers keeps all experts of a block in one 3-D parameter, and
GPT-2's layers are no `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ZeroMask:
    """The zeros of a model's matrices but the embeddings, as they are when the mask is made.

    leave_out: names of parameters whose zeros are no mask: those of a grid that nobody pruned.
    """

    def __init__(self, model: torch.nn.Module, leave_out: Collection[str] = ()) -> None:
        import torch

        self._zeros: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}  # a head may share one
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                continue
            for leaf, weight in module.named_parameters(prefix=name, recurse=False):
                zero = weight.detach() == 0
                if weight.ndim > 1 and id(weight) not in tables and leaf not in leave_out and bool(zero.any()):
                    self._zeros[leaf] = (weight, zero)

    @property
    def count(self) -> int:
        """Number of weights that are kept at zero."""
        return sum(int(zero.sum()) for _, zero in self._zeros.values())

    def of(self, name: str) -> torch.Tensor | None:
        """Return where the parameter `name` is kept at zero, None if nowhere."""
        found = self._zeros.get(name)
        return None if found is None else found[1]

    def clear_gradients(self) -> None:
        """Set the gradients of the zeros to zero, so that neither clipping nor the optimizer's moments see them."""
        for weight, zero in self._zeros.values():
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0.0)

    def clear_weights(self) -> None:
        """Set the weights themselves to zero."""
        for weight, zero in self._zeros.values():
            weight.detach().masked_fill_(zero, 0.0)

    def violations(self) -> list[str]:
        """Names of the weights that have lost a zero."""
        return [name for name, (weight, zero) in self._zeros.items() if bool(weight.detach()[zero].any())]
