"""Keeping pruned weights at zero while a model is trained.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ZeroMask:
    """The zeros of a model's linear weights, as they are when the mask is made."""

    def __init__(self, model: torch.nn.Module) -> None:
        import torch

        self._zeros: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                zero_OI = module.weight.detach() == 0
                if bool(zero_OI.any()):
                    self._zeros[f"{name}.weight"] = (module.weight, zero_OI)

    @property
    def count(self) -> int:
        """Number of weights that are kept at zero."""
        return sum(int(zero_OI.sum()) for _, zero_OI in self._zeros.values())

    def clear_gradients(self) -> None:
        """Set the gradients of the zeros to zero, so that neither clipping nor the optimizer's moments see them."""
        for weight, zero_OI in self._zeros.values():
            if weight.grad is not None:
                weight.grad.masked_fill_(zero_OI, 0.0)

    def clear_weights(self) -> None:
        """Set the weights themselves to zero."""
        for weight, zero_OI in self._zeros.values():
            weight.detach().masked_fill_(zero_OI, 0.0)

    def violations(self) -> list[str]:
        """Names of the weights that have lost a zero."""
        return [name for name, (weight, zero_OI) in self._zeros.items() if bool(weight.detach()[zero_OI].any())]
