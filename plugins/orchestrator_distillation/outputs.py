"""A model's logits, a chunk of positions at a time, and the way back.

For most models the logits are a product of the last hidden states with one matrix. Then only the hidden states of all
positions are held, and the matrix is applied to a chunk of positions at a time, forwards and backwards: memory does not
grow with positions times vocabulary. Models that do more to their logits (soft caps, scales) are found by comparing,
and give all logits at once.

Shape legend: B = windows, T = tokens, P = B x T positions, C = positions of a chunk, D = model width, V = vocabulary.
X = D, or V where the head is not plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

from orchestrator_distillation.objective import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Compute = Literal["float32", "bfloat16"]
# Loss and gradient of the logits [C, V] at some rows: (rows, logits) -> (loss, gradient [C, V]).
Cost = Callable[["torch.Tensor", "torch.Tensor"], "tuple[float, torch.Tensor]"]


class Scorer:
    """A causal language model as something that scores next tokens.

    compute: the type of matrix products; what is held, sums and losses are float32 either way.
    """

    def __init__(self, model: PreTrainedModel, compute: Compute = "float32") -> None:
        self.model: Any = model
        self.compute = compute
        self._head = _plain_head(model)
        self._weight_VD: torch.Tensor | None = None  # of the head, in the type of products, as of the last `states`

    @property
    def vocabulary(self) -> int:
        """Number of tokens that are scored."""
        return int(self.model.config.get_text_config().vocab_size)

    def chunk_size(self) -> int:
        """Positions of a chunk."""
        return max(1, CHUNK_ELEMENTS // self.vocabulary)

    def states(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return what `logits` makes logits of, for all positions: [P, X]."""
        with self._arithmetic():
            if self._head is None:
                found_BTX = self.model(input_ids=tokens_BT, use_cache=False).logits
                return cast("torch.Tensor", found_BTX.flatten(0, 1))
            found_BTX = self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        weight_VD = self._head.weight.detach()
        self._weight_VD = weight_VD if self.compute == "float32" else weight_VD.bfloat16()
        return cast("torch.Tensor", found_BTX.flatten(0, 1))

    def logits(self, states_CX: torch.Tensor) -> torch.Tensor:
        """Return logits [C, V]."""
        from torch.nn.functional import linear

        if self._head is None:
            return states_CX
        assert self._weight_VD is not None
        bias_V = None if self._head.bias is None else self._head.bias.detach().to(self._weight_VD.dtype)
        return linear(states_CX.to(self._weight_VD.dtype), self._weight_VD, bias_V)

    def logits_of(self, tokens_BT: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield chunks of positions with their logits [C, V], float32, without gradients."""
        import torch

        with torch.no_grad():
            states_PX = self.states(tokens_BT)
            for start in range(0, len(states_PX), self.chunk_size()):
                part = slice(start, start + self.chunk_size())
                yield part, self.logits(states_PX[part]).float()

    def backward(self, tokens_BT: torch.Tensor, rows_R: torch.Tensor, cost: Cost) -> float:
        """Add the gradients of a loss to those of the parameters and return the loss.

        rows_R: the positions, of P, that have a part in it. cost: called for chunks of them.
        """
        import torch

        with torch.enable_grad():
            states_PX = self.states(tokens_BT)
            gradient_PX = torch.zeros_like(states_PX)
            loss = 0.0
            with torch.no_grad():
                for rows_C in torch.split(rows_R, self.chunk_size()):
                    states_CX = states_PX.detach()[rows_C]
                    part, gradient_CV = cost(rows_C, self.logits(states_CX).float())
                    loss += part
                    gradient_CX = gradient_CV if self._head is None else self._through_head(states_CX, gradient_CV)
                    gradient_PX[rows_C] = gradient_CX.to(states_PX.dtype)
            states_PX.backward(gradient_PX)  # type: ignore[no-untyped-call]
        return loss

    def _through_head(self, states_CD: torch.Tensor, gradient_CV: torch.Tensor) -> torch.Tensor:
        """Add a chunk's part to the gradients of the head, in place; return the gradient by the states."""
        import torch

        weight_VD = self._weight_VD
        assert self._head is not None and weight_VD is not None
        gradient_CV = gradient_CV.to(weight_VD.dtype)
        states_CD = states_CD.to(weight_VD.dtype)
        if self._head.weight.requires_grad:
            if self._head.weight.grad is None:
                self._head.weight.grad = torch.zeros_like(self._head.weight)
            if weight_VD.dtype == self._head.weight.dtype:
                self._head.weight.grad.addmm_(gradient_CV.T, states_CD)
            else:
                self._head.weight.grad += gradient_CV.T @ states_CD
        if self._head.bias is not None and self._head.bias.requires_grad:
            if self._head.bias.grad is None:
                self._head.bias.grad = torch.zeros_like(self._head.bias)
            self._head.bias.grad += gradient_CV.sum(0)
        return gradient_CV @ weight_VD

    def _arithmetic(self) -> AbstractContextManager[Any]:
        import torch

        if self.compute == "float32":
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)


def _plain_head(model: Any) -> Any:
    """Return the layer that makes logits of the last hidden states, if that is all there is to it."""
    import torch

    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or model.base_model is model:
        return None
    tokens_BT = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        states_BTD = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        expected_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        found_BTV = head(states_BTD.to(head.weight.dtype))
    same = found_BTV.shape == expected_BTV.shape and torch.allclose(found_BTV, expected_BTV, rtol=1e-4, atol=1e-5)
    return head if same else None
