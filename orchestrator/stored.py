"""The linear layers of a model's blocks as they are stored, without a model around them.

Where every record of every block is there already, nothing is run: a further candidate needs weights by name, and
neither Transformers nor the modules of the architecture, whose import takes longer than compressing a small model.
The walk that made the records has checked that the names are those of the modules.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.layers import is_expert
from orchestrator.reader import TensorReader
from orchestrator.skeleton import Block

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint import Checkpoint


class StoredLayers:
    """What of `orchestrator.skeleton.Skeleton` needs no forward pass.

    order: the layers of each block in the order in which the walk takes them, by block name, blocks in theirs.
    """

    def __init__(self, checkpoint: Checkpoint, order: dict[str, Sequence[str]]) -> None:
        from torch import nn

        self.checkpoint = checkpoint
        self.is_known = True
        self._read = TensorReader(checkpoint)
        shapes = {layer.name: layer for layer in checkpoint.block_layers()}
        self.blocks: list[Block] = []
        for name, layers in order.items():
            linears = {
                layer: nn.Linear(shapes[layer].in_features, shapes[layer].out_features, bias=False, device="meta")
                for layer in layers
            }
            experts = frozenset(layer for layer in layers if is_expert(layer))
            self.blocks.append(Block(len(self.blocks), name, nn.Module(), linears, experts=experts))
        self._owner = {layer: linear for block in self.blocks for layer, linear in block.linears.items()}

    def linear_names(self) -> list[str]:
        """Full names of all stored linear layers, the output head included."""
        return [*self._owner, *self.checkpoint.dense_layers()]

    def load(self, name: str, device: str = "cpu") -> None:
        """Fill the weights of a block or of a single layer."""
        for layer in self._layers(name):
            self._put(layer, self._weight(layer).to(device))

    def release(self, name: str) -> None:
        """Forget the weights of a block or of a single layer."""
        for layer in self._layers(name):
            self._put(layer, self._owner[layer].weight.to("meta"))

    def prefetch(self, name: str) -> None:
        """Let the kernel read a block's weights into its cache while something else is computed."""
        self._read.prefetch(f"{layer}.weight" for layer in self._layers(name))

    def as_stored(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return a weight the way round in which its tensor is stored."""
        return weight_OI.T.contiguous() if self.checkpoint.stores_transposed else weight_OI

    def close(self) -> None:
        """Close the weight files."""
        self._read.close()

    def _layers(self, name: str) -> list[str]:
        return [name] if name in self._owner else [n for n in self._owner if n.startswith(f"{name}.")]

    def _put(self, layer: str, weight_OI: torch.Tensor) -> None:
        from torch import nn

        self._owner[layer].weight = nn.Parameter(weight_OI, requires_grad=False)

    def _weight(self, layer: str) -> torch.Tensor:
        weight = self._read(f"{layer}.weight").to(self.checkpoint.torch_dtype).float()
        return weight.T.contiguous() if self.checkpoint.stores_transposed else weight
