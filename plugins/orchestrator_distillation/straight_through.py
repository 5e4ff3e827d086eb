"""Training layers that are stored on a quantization grid: the grid stays, and what moves are integers and scales.

The forward pass multiplies with the weights that will be stored, w = (q - z) s in the dtype of the checkpoint. Behind
each lies a master weight v in float32, q = clamp(round(v / s) + z). Rounding passes gradients straight through
(Bengio et al. 2013, arXiv:1308.3432, section 2.3), where the clamp lets them:

    dL/dv = dL/dw                       where q was not clamped, else 0
    dL/ds = dL/dw (q - z - v/s)         where q was not clamped, else dL/dw (q - z)

the latter, summed over what shares s, being that of LSQ (Esser et al. 2020, arXiv:1902.08153, eq. 3). Scales are
trained as s = s0 exp(u), so that one learning rate fits scales of all sizes and none changes its sign. Zero points and
the scales of inputs stay.

Weights and their gradients are those of the model's own parameters, exchanged before and after each update: no layer is
replaced, and nothing of this is in the graph of autograd.

Shape legend: O = out features, I = in features, G = groups along I, W = weights of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.api import Checkpoint, QuantizedWeight, StepError, TensorReader, unpack

if TYPE_CHECKING:
    import torch
    from torch import nn


class GridLayer:
    """One layer: its master weight, the logarithm of its scales' change, and what of its grid stays as it is."""

    def __init__(self, module: nn.Linear, encoding: QuantizedWeight, zero_OI: torch.Tensor | None) -> None:
        import torch

        self._module = module
        self._encoding = encoding
        self._zero_OI = zero_OI
        device = module.weight.device
        self._first_scale_OG = encoding.scale_OG.to(device).float()
        self._zero_point_OG = 0.0 if encoding.zero_point_OG is None else encoding.zero_point_OG.to(device).float()
        self.master_OI = torch.nn.Parameter(encoding.dequantize(torch.float32).to(device))
        self.log_change_OG = torch.nn.Parameter(torch.zeros_like(self._first_scale_OG))

    def encode(self) -> QuantizedWeight:
        """Return what would be stored now."""
        import torch

        scheme = self._encoding.scheme
        stored = (self._first_scale_OG * self.log_change_OG.detach().exp()).to(self._encoding.scale_OG.dtype)
        q_OGW = self._groups(self.master_OI.detach()) / stored.float().unsqueeze(-1)
        if scheme.type == "float":
            q_OGW = q_OGW.clamp_(scheme.quant_min, scheme.quant_max).to(torch.float8_e4m3fn)
        else:
            q_OGW = q_OGW.round_() + self._zero_point_OGW()
            q_OGW = q_OGW.clamp_(scheme.quant_min, scheme.quant_max).to(torch.int8)
        q_OI = q_OGW.view(self.master_OI.shape)
        old = self._encoding
        return QuantizedWeight(q_OI, stored, old.zero_point_OG, scheme, old.input_scale_1)

    def write(self) -> None:
        """Put the weights that would be stored into the model."""
        self._module.weight.data = self.encode().dequantize(self._module.weight.dtype)

    def take_gradient(self) -> None:
        """Turn the gradient of the model's weight into those of master and scales."""
        gradient_OI = self._module.weight.grad
        if gradient_OI is None:
            return
        self._module.weight.grad = None
        scheme = self._encoding.scheme
        code = self.encode()
        scale_OG1 = code.scale_OG.float().unsqueeze(-1)
        level_OGW = self._groups(code.q_OI.float()) - self._zero_point_OGW()
        exact_OGW = self._groups(self.master_OI.detach()) / scale_OG1
        low, high = scheme.quant_min - self._zero_point_OGW(), scheme.quant_max - self._zero_point_OGW()
        # Rounded or not: what rounds to the last level is on the grid still.
        reach = 0.0 if scheme.type == "float" else 0.5
        inside_OGW = (exact_OGW >= low - reach) & (exact_OGW <= high + reach)
        gradient_OGW = self._groups(gradient_OI)
        scale_slope_OGW = level_OGW.sub_(exact_OGW.mul_(inside_OGW))
        self.log_change_OG.grad = (gradient_OGW * scale_slope_OGW).sum(-1).mul_(code.scale_OG.float())
        self.master_OI.grad = gradient_OGW.mul_(inside_OGW).view(gradient_OI.shape)
        if self._zero_OI is not None:
            self.master_OI.grad.masked_fill_(self._zero_OI, 0.0)

    def _groups(self, weight_OI: torch.Tensor) -> torch.Tensor:
        return weight_OI.view(*self._first_scale_OG.shape, -1)

    def _zero_point_OGW(self) -> Any:
        return self._zero_point_OG if isinstance(self._zero_point_OG, float) else self._zero_point_OG.unsqueeze(-1)


class Grids:
    """The layers of a model that are on grids, by the names under which they are stored; none of a dense model."""

    def __init__(self, layers: Mapping[str, GridLayer], learn_scales: bool) -> None:
        self.layers = layers
        self.learn_scales = learn_scales

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained in the place of the weights on grids."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            found[f"{name}.master"] = layer.master_OI
            if self.learn_scales:
                found[f"{name}.log_change"] = layer.log_change_OG
        return found

    def write(self) -> None:
        """Put the weights that would be stored into the model."""
        for layer in self.layers.values():
            layer.write()

    def take_gradients(self) -> None:
        """Turn the gradients of the model's weights into those of masters and scales."""
        for layer in self.layers.values():
            layer.take_gradient()
            if not self.learn_scales:
                layer.log_change_OG.grad = None

    def encodings(self) -> dict[str, QuantizedWeight]:
        """Return what is to be stored."""
        return {name: layer.encode() for name, layer in self.layers.items()}


def weight_names(model: Any, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Return the parameter of each layer that the checkpoint stores on a grid, by the layer's stored name.

    Raises `StepError` for layers that the model holds otherwise than as one `nn.Linear` each (fused experts).
    """
    import torch

    if checkpoint is None or not checkpoint.is_quantized:
        return {}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {}
    for layer in checkpoint.schemes():
        name = next((n for n in (layer, f"{model.base_model_prefix}.{layer}") if n in modules), None)
        if name is None:
            raise StepError(
                f"{layer} is quantized, but Transformers holds it together with others, so it cannot be trained",
                remedy="distill before quantizing",
            )
        found[layer] = f"{name}.weight"
    return found


def grid_layers(
    model: Any, checkpoint: Checkpoint | None, names: Mapping[str, str], zeros: Mapping[str, torch.Tensor | None]
) -> dict[str, GridLayer]:
    """Make the layers of a checkpoint trainable. names: of `weight_names`. zeros: kept ones, by parameter."""
    if checkpoint is None or not names:
        return {}
    schemes = checkpoint.schemes()
    with TensorReader(checkpoint) as read:
        return {
            layer: GridLayer(
                model.get_submodule(name.removesuffix(".weight")), unpack(read, layer, schemes[layer]), zeros[name]
            )
            for layer, name in names.items()
        }
