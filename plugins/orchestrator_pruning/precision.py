"""Computing in float32 with a model that is held in the dtype of its checkpoint.

A float32 copy of the model would take two to three times the memory of the model itself. Here the matrices stay as they
are: a linear layer's weight is widened while the layer runs, and widened again for the backward pass; of an embedding
only the rows that are looked up are; norms and biases, which are small, are float32 throughout. The numbers are those
of the model in float32, bit for bit: widening is exact.

Shape legend: B = windows, T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let `model` compute in float32, whatever it is held in, for as long as this is open.

    Gradients reach what enters a layer. Those by the weights themselves are to be had of a block that is `widened`.
    """
    from torch import nn

    handles: list[Any] = []
    changed: list[Any] = []
    small: list[tuple[nn.Module, str, torch.dtype]] = []
    try:
        for module in list(model.modules()):
            stood_in_for: Any = module
            if type(module) is nn.Linear:
                stood_in_for.forward = _linear_forward(module)
                changed.append(module)
            elif isinstance(module, nn.Embedding) and len(inspect.signature(module.forward).parameters) == 1:
                stood_in_for.forward = _embedding_forward(module)
                changed.append(module)
            elif any(_is_narrow(parameter) and parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
                handles += _widened_while_it_runs(module)  # experts in one tensor, tables of positions
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    if _is_narrow(parameter):
                        small.append((module, name, parameter.dtype))
                        parameter.data = parameter.data.float()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in changed:
            module.__dict__.pop("forward", None)
        for module, name, dtype in small:
            module.get_parameter(name).data = module.get_parameter(name).data.to(dtype)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, and gradients by the parameters, for as long as this is open."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, False))  # if recovery failed, its updates are still there
        for module, mode in modes:
            module.training = mode


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Hold a module's own parameters in float32 for as long as this is open, for instance to take their gradients.

    They are not to be changed meanwhile: what they get back is what they had.
    """
    narrow = [parameter for parameter in module.parameters() if _is_narrow(parameter)]
    before = [parameter.data for parameter in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in zip(narrow, before, strict=True):
            parameter.data = data


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers in float32, or as they are if they are no narrower."""
    return tensor.float() if _is_narrow(tensor) else tensor


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _widened_while_it_runs(module: nn.Module) -> list[Any]:
    open_now: list[Any] = []

    def before(module: nn.Module, inputs: Any) -> None:
        open_now.append(widened(module))
        open_now[-1].__enter__()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        open_now.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def _linear_forward(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn.functional import linear

    def forward(input_BTI: torch.Tensor) -> torch.Tensor:
        bias_O = None if layer.bias is None else wide(layer.bias)
        if not _is_narrow(layer.weight):
            return linear(input_BTI, layer.weight, bias_O)
        product_BTO: torch.Tensor = _product()(input_BTI, layer.weight, bias_O)
        return product_BTO

    return forward


@cache
def _product() -> Any:
    """The product with a narrow weight as an operation of autograd, which keeps the narrow weight, not the wide one."""
    import torch
    from torch.nn.functional import linear

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(
            context: Any, input_BTI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
        ) -> torch.Tensor:
            context.weight_OI = weight_OI.detach()
            return linear(input_BTI, weight_OI.detach().float(), bias_O)

        @staticmethod
        def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            (gradient_BTO,) = gradients
            return gradient_BTO @ context.weight_OI.float(), None, None

    return Product.apply


def _embedding_forward(table: nn.Embedding) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    stock = type(table).forward

    def forward(ids_BT: torch.Tensor) -> torch.Tensor:
        if not _is_narrow(table.weight):
            found_BTD: torch.Tensor = stock(table, ids_BT)
            return found_BTD
        # Some scale what they look up, in the dtype of the table.
        rows, places_BT = torch.unique(ids_BT, return_inverse=True)
        whole, padding = table.weight.data, table.padding_idx
        table.weight.data, table.padding_idx = whole[rows].float(), None
        try:
            found_BTD = stock(table, places_BT)
        finally:
            table.weight.data, table.padding_idx = whole, padding
        return found_BTD

    return forward
