"""Taking a model's rotary position embedding out, so that a cache can put it in with positions of its own.

Keys that are kept un-rotated can be given another position at each step (StreamingLLM, arXiv:2309.17453, section 3.2).
They are never rotated back, which would cost precision in bfloat16: while the model is held here its rotary module
says "no rotation", and the rotation is done later with the model's own module and function.

Legend: B = 1 stream, H = heads, T = tokens, R = rotated width, D = width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# These change their frequencies with the length that they have seen, so positions cannot be moved by a constant.
_BY_LENGTH = ("dynamic", "longrope")
_REMEDY = "use `window`, `paged` or a quantized cache"


def unrotatable(config: Mapping[str, Any]) -> str | None:
    """Return why positions of such a model cannot be moved, as far as config.json shows; None if they seem to."""
    family = config.get("model_type")
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for entry in nested or [parameters]:
        kind = entry.get("rope_type", entry.get("type"))
        if kind in _BY_LENGTH:
            return f"the rotary embedding of this {family} ({kind}) changes with the length of the stream"
    if config.get("alibi") or family in ("bloom", "mpt"):
        return f"{family} has no rotary positions (it biases attention by distance, ALiBi)"
    if family in ("gpt2", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "xglm"):
        return f"{family} has no rotary positions (it adds learned ones to its input)"
    return None


class Rotation:
    """The rotary embedding of one model, held out of it by `held_out`."""

    def __init__(self, model: PreTrainedModel) -> None:
        reason = unrotatable(model.config.to_dict())
        modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        if reason is None and len(modules) != 1:
            reason = f"{type(model).__name__} has {len(modules)} rotary modules, not one for all layers"
        if reason:
            raise StepError(f"positions inside the cache need a rotary embedding: {reason}", remedy=_REMEDY)
        self._rotary = modules[0]
        self._layer_types = getattr(model.config, "layer_types", None)
        self._by_layer_type = hasattr(self._rotary, "layer_types")
        self._tables: dict[tuple[str | None, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def held_out(self) -> Iterator[None]:
        """Let queries and keys reach the cache as they were before rotation."""

        def neither(module: nn.Module, args: Any, output: Any) -> Any:
            import torch

            self._tables.clear()  # those of the step before
            if not (isinstance(output, tuple) and len(output) == 2):
                raise StepError(f"{type(module).__name__} does not give a cosine and a sine", remedy=_REMEDY)
            cos_BTR, sin_BTR = output
            return torch.ones_like(cos_BTR), torch.zeros_like(sin_BTR)

        handle = self._rotary.register_forward_hook(neither)
        try:
            yield
        finally:
            handle.remove()
            self._tables.clear()

    def apply(self, heads_BHTD: Tensor, positions: tuple[int, ...], module: nn.Module) -> Tensor:
        """Rotate keys or queries of an attention module to `positions`, one for each token."""
        rotate: Callable[..., tuple[Tensor, Tensor]] | None
        rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if rotate is None:
            raise StepError(f"{type(module).__name__} rotates in a way that is not understood", remedy=_REMEDY)
        if not positions:
            return heads_BHTD
        cos_BTR, sin_BTR = self._table(heads_BHTD, positions, module)
        # Partial rotation leaves the rest of the head as it is; some models' functions know that, some do not.
        width = cos_BTR.shape[-1]
        turned_BHTR: Tensor
        turned_BHTR, _ = rotate(heads_BHTD[..., :width], heads_BHTD[:, :0, :, :width], cos_BTR, sin_BTR)
        if width == heads_BHTD.shape[-1]:
            return turned_BHTR
        import torch

        return torch.cat((turned_BHTR, heads_BHTD[..., width:]), -1)

    def _table(self, like: Tensor, positions: tuple[int, ...], module: nn.Module) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions, as the model's own module gives them; layers of one step share them."""
        import torch

        layer_type = self._layer_types[module.layer_idx] if self._by_layer_type and self._layer_types else None
        key = (layer_type, positions)
        if key not in self._tables:
            position_BT = torch.tensor([positions], device=like.device)
            kind = (layer_type,) if layer_type is not None else ()
            self._tables[key] = self._rotary.forward(like, position_BT, *kind)  # past the hook
        return self._tables[key]
