"""What a group of rows and columns is worth: equations 3 to 5 of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627).

The importance of a vector W_i (a row of a layer, or a column) that belongs to a group, with g the gradient of the loss,
a mean over windows, and F the mean of its squares, the Fisher information that stands for the diagonal of the Hessian
(eq. 5, with a mean where the paper has a sum, as the authors' code has it):

    s_k = w_k g_k  (first) | w_k^2 F_k  (second) | w_k g_k - w_k^2 F_k / 2  (mixed)
    I(W_i) = | sum_k s_k |  (vector, eq. 3) | sum_k | s_k |  (element, eq. 4)
           = sum_k |w_k|  (l1) | sum_k w_k^2  (l2)

and I(group) is the sum over its vectors (section 3.2). "random" draws I(group) instead.

Shape legend: O = out features, I = in features, G = groups, K = rows or columns of one layer in a group, X = rows, or
columns, of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from orchestrator_pruning.block_gradients import Gradient
from orchestrator_pruning.dependency_groups import GroupSet
from orchestrator_pruning.precision import wide

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["taylor", "l1", "l2", "random"]
Order = Literal["first", "second", "mixed"]
Granularity = Literal["element", "vector"]


@dataclass(frozen=True)
class Importance:
    """By what groups are judged."""

    kind: Kind
    order: Order = "first"
    granularity: Granularity = "element"

    def score(
        self, block: nn.Module, groups: GroupSet, gradients: Mapping[str, Gradient], generator: torch.Generator
    ) -> torch.Tensor:
        """Return the importance of each group [G]: the sum over its rows and columns in all layers.

        gradients: by layer, for kind 'taylor'. generator: for 'random'.
        """
        import torch

        if self.kind == "random":
            return torch.rand(groups.count, generator=generator)
        parts = []
        for member in groups.members:
            weight_OI = wide(cast("torch.Tensor", block.get_submodule(member.layer).weight).detach())
            salience_OI = self._salience(weight_OI, gradients.get(member.layer))
            inside = 1 - member.axis  # the dimension along which a row, or a column, extends
            vector_X = salience_OI.sum(inside).abs() if self.granularity == "vector" else salience_OI.abs().sum(inside)
            parts.append(vector_X[member.index_GK].sum(1))
        return torch.stack(parts).sum(0)

    def _salience(self, weight_OI: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
        if gradient is None:
            return weight_OI.abs() if self.kind == "l1" else weight_OI.square()
        first_OI = weight_OI * gradient.mean_OI
        if gradient.square_OI is None:
            return first_OI
        second_OI = weight_OI.square() * gradient.square_OI
        return second_OI if self.order == "second" else first_OI - 0.5 * second_OI
