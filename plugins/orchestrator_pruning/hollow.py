"""A model that can be traced without its weights: dependencies between layers do not hang on what the layers compute.

Shape legend: B = copies of the input, T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator_pruning.dependency_groups import blocks_of, require_linear

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def hollow(model: Any) -> Iterator[None]:
    """Let a model on the meta device run, for as long as this is open: matrices of nothing, all else ones.

    Linear layers put out zeros; tracing puts other numbers in their place. Raises `StepError` for a block with a matrix
    that is no linear layer's.
    """
    import torch
    from torch import nn

    for name, block in blocks_of(model).items():
        require_linear(block, name)
    linears: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    filled: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays so
    for parameter in model.parameters():
        of_one = torch.zeros(()) if parameter.ndim > 1 else torch.ones(())
        filled[parameter] = nn.Parameter(of_one.expand(parameter.shape), requires_grad=False)  # memory of one number
    try:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = filled[parameter]
        for module in linears:
            module.forward = _zeros(module)
        yield
    finally:
        for module in linears:
            module.__dict__.pop("forward", None)


def _zeros(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input_BTI: torch.Tensor) -> torch.Tensor:
        # Not one expanded number: some models add to it in place.
        return input_BTI.new_zeros((*input_BTI.shape[:-1], layer.out_features))

    return forward
