"""Depth pruning: remove whole decoder layers; what is left is a smaller model of the same architecture.

Which layers go is decided on the calibration tokens, by one of two criteria, or by their numbers alone.

`block_influence`: Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. 1. How much a layer changes its input's direction,

    BI_l = 1 - E_t[ h_l,t . h_{l+1},t / (|h_l,t| |h_{l+1},t|) ],

h_l,t being the hidden state of token t that enters layer l. The layers with the lowest influence go, all at once. It
takes one pass over the tokens. h_{l+1} of the last layer is what the layer puts out, before the final norm.

`greedy`: Song et al. 2024 (SLEB), arXiv:2402.09025, algorithm 1. The layer goes without which the model has the lowest
perplexity on the calibration windows, argmin_l sum_t -ln p(x_t | x_<t; all layers left but l); then again, from the
model without it. Of each batch the states that enter the layers are kept, so that a candidate computes only the layers
behind it: of L layers, (L - 1) / 2 passes for each removal and batch, where deleting and running anew takes L - 1.

`evenly`: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 3. The layers that are left lie at equal distances,
the first and the last among them: the usual student for distillation. No token is looked at to choose.

Choices: the search is done in float32 (`precision`), influence summed up in float64; of equal layers the first goes.
Weights are not changed, so the zeros of earlier pruning stay, in layers that are now numbered otherwise.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, D = model width, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from orchestrator.api import Context, Invariant, ModelFacts, ModelMethod, ModelResult, Stage, StepError, Work
from orchestrator_pruning.decoder import DecoderLayers
from orchestrator_pruning.precision import in_float32

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BATCH_TOKENS = 2048  # what is passed at a time, but at least one window: bounds kept states and logits
_CHUNK_ELEMENTS = 1 << 24  # float32 numbers of a temporary as wide as the vocabulary: 64 MiB


class Depth(ModelMethod):
    """Remove the decoder layers that matter least, and number the others anew."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "depth"
    paper: ClassVar[str] = (
        "arXiv:2403.03853, eq. 1 (block_influence); arXiv:2402.09025, algorithm 1 (greedy); arXiv:1910.01108 (evenly)"
    )
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS, Invariant.GRID})
    provides: ClassVar[frozenset[Invariant]] = frozenset()  # no weight becomes zero

    layers: int = Field(ge=1, le=10_000, description="Number of decoder layers removed; one at least must be left.")
    criterion: Literal["block_influence", "greedy", "evenly"] = Field(
        "block_influence",
        description="Those that turn hidden states least, in one pass; or one by one the layer without which "
        "perplexity is lowest, in about half as many passes for each as there are layers; or so that those left lie at "
        "equal distances, first and last among them.",
    )

    def needs_calibration(self) -> bool:
        """Two criteria look at tokens, and the loss before and after is measured with all three."""
        return True

    def blocks_removed(self) -> int:
        """What planning reckons with."""
        return self.layers

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse layers that cannot be found, or that are bound to their places."""
        DecoderLayers(model).check_movable(self.layers)

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The model as it is stored, what of it is widened at a time, a batch's states and logits; all passes."""
        sequences, length = calibration
        tokens, batch = sequences * length, length * max(1, min(sequences, _BATCH_TOKENS // length))
        depth = max(1, len(model.blocks))
        passes, heads, kept = 2.0, 2, 3  # before and after
        if self.criterion == "greedy":
            depths = range(depth, max(1, depth - self.layers), -1)
            passes = sum(left + left * (left - 1) / 2 for left in depths) / depth
            heads, kept = sum(left + 1 for left in depths), depth
        passed = model.forward(tokens, length, batch, head=False).times(passes)
        scored = replace(model, blocks=()).forward(tokens, length, batch, head=True).times(heads)
        logits = 4 * batch * model.vocabulary + 8 * min(_CHUNK_ELEMENTS, length * model.vocabulary)
        states = 4 * batch * model.hidden * kept + max(logits, model.activation_bytes(batch, length))
        memory = max(
            model.load_bytes(as_float32=False), model.parameters * model.item_bytes + model.wide_bytes + states
        )
        return Work(memory_bytes=memory).then(passed).then(scored)

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Remove layers in place. Raises `StepError` for a model without as many, or whose layers are bound to places.

        Metrics: losses are nats per token on the calibration windows; layers are numbered from 0, as in the input.
        """
        import torch

        layers = DecoderLayers(model)
        depth = len(layers)
        if self.layers >= depth:
            raise StepError(
                f"{self.layers} layers are to be removed, but the model has {depth}",
                remedy=f"set layers to at most {depth - 1}",
            )
        batches = _batches(context, model)
        layers.check_movable(self.layers)
        count = sum(tokens_BT[:, 1:].numel() for tokens_BT in batches)
        searches = {"block_influence": self._by_influence, "greedy": self._greedily, "evenly": self._evenly}
        search = searches[self.criterion]
        with torch.no_grad(), in_float32(model):
            removed, before, after, facts = search(layers, batches, context.progress)
        if not (math.isfinite(before) and math.isfinite(after)):
            raise StepError(
                f"the loss on the calibration windows is {before / count} before, and {after / count} after",
                remedy="check the checkpoint for overflow or damage",
            )
        kept = tuple(index for index in range(depth) if index not in removed)
        layers.keep(kept)
        metrics = {
            "removed_layers": float(len(removed)),
            "loss_before": before / count,
            "loss_after": after / count,
            "tokens": float(sum(tokens_BT.numel() for tokens_BT in batches)),
            **{f"removed_layer_{turn}": float(index) for turn, index in enumerate(removed, 1)},
            **facts,
        }
        return ModelResult(model, metrics, blocks=kept)

    def _by_influence(
        self, layers: DecoderLayers, batches: Sequence[torch.Tensor], progress: Callable[[float, str], None]
    ) -> tuple[list[int], float, float, Mapping[str, float]]:
        """Return the layers that go, lowest influence first, the summed losses before and after, and all influences."""
        import torch

        similarities = [0.0] * len(layers)

        def compare(index: int, entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> None:
            similarity_BT = torch.cosine_similarity(entering_BTD.double(), leaving_BTD.double(), dim=-1)
            similarities[index] += float(similarity_BT.sum())

        before = after = 0.0
        for done, tokens_BT in enumerate(batches, 1):
            before += summed_loss(layers.run(tokens_BT, (), compare), tokens_BT)
            progress(done / len(batches) / 2, f"influence: batch {done} of {len(batches)}")
        tokens = sum(tokens_BT.numel() for tokens_BT in batches)
        influence = {index: 1.0 - total / tokens for index, total in enumerate(similarities)}
        removed = sorted(influence, key=lambda index: (influence[index], index))[: self.layers]
        for done, tokens_BT in enumerate(batches, 1):
            after += summed_loss(layers.run(tokens_BT, removed), tokens_BT)
            progress(0.5 + done / len(batches) / 2, f"loss: batch {done} of {len(batches)}")
        return removed, before, after, {f"block_influence_{i}": value for i, value in influence.items()}

    def _evenly(
        self, layers: DecoderLayers, batches: Sequence[torch.Tensor], progress: Callable[[float, str], None]
    ) -> tuple[list[int], float, float, Mapping[str, float]]:
        """Return the layers between those that are left, and the summed losses before and after."""
        left = len(layers) - self.layers
        kept = {round(place * (len(layers) - 1) / max(1, left - 1)) for place in range(left)}
        removed = [index for index in range(len(layers)) if index not in kept]
        before = after = 0.0
        for done, tokens_BT in enumerate(batches, 1):
            before += summed_loss(layers.run(tokens_BT, ()), tokens_BT)
            after += summed_loss(layers.run(tokens_BT, removed), tokens_BT)
            progress(done / len(batches), f"loss: batch {done} of {len(batches)}")
        return removed, before, after, {}

    def _greedily(
        self, layers: DecoderLayers, batches: Sequence[torch.Tensor], progress: Callable[[float, str], None]
    ) -> tuple[list[int], float, float, Mapping[str, float]]:
        """Return the same; of each layer the loss per token without it alone, and the loss after each removal."""
        removed: list[int] = []
        before = 0.0
        facts: dict[str, float] = {}
        count = sum(tokens_BT[:, 1:].numel() for tokens_BT in batches)
        losses: dict[int, float] = {}
        for turn in range(self.layers):
            losses = {index: 0.0 for index in range(len(layers)) if index not in removed}
            for done, tokens_BT in enumerate(batches, 1):
                logits_BTV, entering = layers.run_and_keep(tokens_BT, removed)
                if turn == 0:
                    before += summed_loss(logits_BTV, tokens_BT)
                del logits_BTV  # as large as everything else of a batch
                for index in losses:
                    logits_BTV = layers.run_behind(tokens_BT, removed, index, entering.pop(index))
                    losses[index] += summed_loss(logits_BTV, tokens_BT)
                share = (turn + done / len(batches)) / self.layers
                progress(share, f"layer {turn + 1} of {self.layers}: batch {done} of {len(batches)}")
            if turn == 0:
                facts = {f"loss_without_{index}": loss / count for index, loss in losses.items()}
            # A loss that is no number is no candidate, unless there is no other: then the caller refuses it.
            best = min(losses, key=lambda index: (math.isnan(losses[index]), losses[index], index))
            removed.append(best)
            facts[f"loss_after_removal_{turn + 1}"] = losses[best] / count
        return removed, before, losses[removed[-1]], facts


def summed_loss(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> float:
    """Return the sum of -ln p(token | tokens before it), nats, over all but the first token of each window."""
    import torch

    total = 0.0
    for logits_TV, tokens_T in zip(logits_BTV[:, :-1], tokens_BT[:, 1:], strict=True):
        size = max(1, _CHUNK_ELEMENTS // logits_TV.shape[-1])
        for logits_CV, targets_C in zip(torch.split(logits_TV, size), torch.split(tokens_T, size), strict=True):
            loss_C = torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")
            total += float(loss_C.double().sum())
    return total


def _batches(context: Context, model: PreTrainedModel) -> list[torch.Tensor]:
    """The calibration windows [B, T], some at a time. Raises `StepError` if nothing can be measured on them."""
    import torch

    if context.calibration is None or context.calibration.tokens_NT.numel() == 0:
        raise StepError("depth has no calibration tokens", remedy="put a calibrate step before")
    tokens_NT = context.calibration.tokens_NT.to(model.device)
    if tokens_NT.shape[1] < 2:
        raise StepError("windows of one token predict nothing", remedy="calibrate with length_tokens of 2 or more")
    return list(torch.split(tokens_NT, max(1, _BATCH_TOKENS // tokens_NT.shape[1])))
