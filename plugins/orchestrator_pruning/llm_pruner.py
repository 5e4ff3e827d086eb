"""LLM-Pruner: remove whole attention heads and MLP channels by what the loss would miss; then recover with LoRA.

Ma et al. 2023, arXiv:2305.11627. Groups (section 3.1) are found by tracing (`dependency_groups`); a group is a KV head
with the query heads that share it, or an MLP channel. The importance of a vector W_i (a row of a layer, or a column)
that belongs to a group, with g the gradient of the loss, a mean over windows, and F the mean of its squares, the Fisher
information that stands for the diagonal of the Hessian (eq. 5, with a mean where the paper has a sum, as the authors'
code has it):

    s_k = w_k g_k  (first) | w_k^2 F_k  (second) | w_k g_k - w_k^2 F_k / 2  (mixed)
    I(W_i) = | sum_k s_k |  (vector, eq. 3) | sum_k | s_k |  (element, eq. 4)
           = sum_k |w_k|  (l1) | sum_k w_k^2  (l2)

and I(group) is the sum over its vectors (section 3.2). "random" draws I(group) instead. The groups with the least
importance in their block go. Gradients are taken block by block (`block_gradients`). Recovery trains W + BA, A and B of
rank `lora_rank` (eq. 6), for every linear layer in the blocks, on the next-token loss, and adds BA to the weights.

Choices. The authors leave the first and the last blocks whole; here all blocks lose the same number of groups, because
then config.json says all there is to say with one number for all blocks, which is what every engine reads. Weights and
gradients are float32. One window in eight is used neither for choosing nor for training; the recorded losses are those
of these windows, and flatter the recovery where the calibrator drew windows that overlap.

Shape legend: N = windows, O = out features, I = in features, G = groups, K = rows or columns of one layer in a group,
X = rows, or columns, of one layer, B = copies of the input of a probe, T = tokens, D = model width.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from orchestrator.api import (
    Context,
    Invariant,
    ModelFacts,
    ModelMethod,
    ModelResult,
    PreflightError,
    Stage,
    StepError,
    Work,
)
from orchestrator_pruning.block_gradients import CHUNK_ELEMENTS, Gradient, block_gradients
from orchestrator_pruning.dependency_groups import GroupSet, Probe, blocks_of, make_probe, trace
from orchestrator_pruning.low_rank import recover
from orchestrator_pruning.patterns import require_finite
from orchestrator_pruning.removal import (
    Removal,
    as_configured,
    channel_entries,
    check_channels,
    check_heads,
    head_entries,
    remove,
    without,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_HELD_OUT_SHARE = 8  # one window in eight, at most _HELD_OUT_MOST
_HELD_OUT_MOST = 16


class LLMPruner(ModelMethod):
    """Remove KV groups and MLP channels, as many in every block, and recover by low-rank updates that are merged."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "llm_pruner"
    paper: ClassVar[str] = "arXiv:2305.11627, eq. 3-6"
    keeps: ClassVar[frozenset[Invariant]] = frozenset()
    provides: ClassVar[frozenset[Invariant]] = frozenset()  # what is removed leaves no zeros

    ratio: float = Field(
        0.2, gt=0, lt=1, description="Share of the KV groups and of the MLP channels that goes; to the nearest count."
    )
    attention: bool = Field(True, description="Whether KV groups, each with its query heads, are removed.")
    mlp: bool = Field(True, description="Whether MLP channels are removed.")
    round_to: int = Field(
        8,
        ge=1,
        le=65536,
        description="Kept MLP channels are a multiple of this: 8 suits tensor cores, 128 most kernels and group sizes.",
    )
    importance: Literal["taylor", "l1", "l2", "random"] = Field(
        "taylor", description="What a group is judged by: the change of the loss, the size of its weights, or nothing."
    )
    order: Literal["first", "second", "mixed"] = Field(
        "first", description="Terms of the Taylor expansion: the gradient, its squares, or both; only for 'taylor'."
    )
    granularity: Literal["element", "vector"] = Field(
        "element", description="Whether absolute values are taken of each weight or of each row's and column's sum."
    )
    gradient_windows: int = Field(
        32, ge=1, le=100_000, description="Most windows of the calibration set that gradients are taken on."
    )
    length_tokens: int = Field(
        256, ge=2, le=1_048_576, description="Window length, tokens; longer calibration windows are cut to it."
    )
    lora_rank: int = Field(8, ge=0, le=4096, description="Rank of the low-rank updates; 0: no recovery.")
    lora_alpha: float = Field(16.0, gt=0, le=65536, description="The updates are scaled by lora_alpha / lora_rank.")
    lora_updates: int = Field(200, ge=1, le=10_000_000, description="Optimizer steps of the recovery.")
    lora_learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of the recovery.")
    batch_sequences: int = Field(4, ge=1, le=65536, description="Windows per optimizer step.")

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        if not (self.attention or self.mlp):
            raise ValueError("with attention and mlp both false there is nothing to remove")
        return self

    def preflight(self) -> None:
        """Refuse recovery where `peft` is not installed."""
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise PreflightError(
                "recovery with LoRA needs peft, which is not installed",
                remedy="pip install 'compression-orchestrator[lora]', or set lora_rank: 0",
            )

    def needs_calibration(self) -> bool:
        """Whether gradients are taken or updates trained."""
        return self.importance == "taylor" or self.lora_rank > 0

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The model in float32; one block's gradients and what one window or batch leaves for the backward pass.

        Raises `PreflightError` for a ratio that leaves a block without heads or channels.
        """
        try:
            if self.attention:
                self._kept(model.kv_heads, 1, "KV groups", "attention")
            if self.mlp and self._nearest(model.intermediate, self.round_to) == 0:
                self._kept(model.intermediate, self.round_to, "MLP channels", "mlp")
        except StepError as error:
            raise PreflightError(error.problems) from None
        length = min(calibration[1], self.length_tokens)
        windows = calibration[0] * max(1, calibration[1] // length)
        work = model.forward(2 * min(windows, _HELD_OUT_MOST) * length, length, length, head=True)
        memory = model.activation_bytes(length, length) + 12 * length * model.vocabulary
        scratch = 0
        if self.importance == "taylor":
            windows = min(windows, self.gradient_windows)
            largest = max((block.parameters for block in model.blocks), default=0)
            work = work.then(model.forward(windows * length, length, length, head=True).times(4))
            saved = model.saved_bytes(length) // max(1, len(model.blocks))
            chunk = 12 * min(CHUNK_ELEMENTS, length * model.vocabulary)
            memory = max(memory, 16 * largest + saved + chunk)
            scratch = 4 * windows * length * model.hidden * (len(model.blocks) + 1)
        if self.lora_rank:
            batch = self.batch_sequences * length
            work = work.then(model.forward(self.lora_updates * batch, length, batch, head=True).times(3))
            memory = max(memory, model.saved_bytes(batch) + 16 * batch * model.vocabulary)
        held = model.load_bytes(as_float32=True)
        return replace(work, memory_bytes=held + memory, scratch_bytes=scratch)

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Prune and recover `model` in place.

        Raises `StepError`, before any gradient, for a ratio that leaves no head or no channel, for counts that
        config.json cannot say, and for a layer that tracing cannot place; later for numbers that are not finite.
        """
        held_out_NT, used_NT = self._windows(context)
        with _widened(model) as dtypes:
            blocks = blocks_of(model)
            probe = make_probe(model, list(blocks.values()))
            traced = _trace_all(blocks, probe)
            removal = self._removal(model.config, next(iter(traced.values())))
            small = as_configured(model, traced, removal)
            counts = [name for name in removal.entries if name != "head_dim"]
            before = {f"{name}_before": float(getattr(model.config, name)) for name in counts}
            numbers = {"parameters_before": _num_parameters(model), **before}
            numbers |= _loss("loss_before", model, held_out_NT)
            kept = self._choose(model, blocks, traced, removal, used_NT, context)
            calls, hidden_BTD = dict(zip(blocks, probe.calls, strict=True)), probe.hidden_BTD
            expected = {name: without(block, kept[name], calls[name], hidden_BTD) for name, block in blocks.items()}
            for name, value in removal.entries.items():
                setattr(model.config, name, value)
            for name, block in blocks.items():
                like = small.get_submodule(name)
                remove(block, name, kept[name], like, calls[name], hidden_BTD, expected[name])
            after = {f"{name}_after": float(removal.entries[name]) for name in counts}
            numbers |= {"parameters_after": _num_parameters(model), **after}
            numbers |= _loss("loss_pruned", model, held_out_NT)
            if self.lora_rank and used_NT is not None:
                model = self._recover(model, blocks, used_NT, context)
                for name, parameter in model.named_parameters():  # what the result can hold is what is measured
                    parameter.data = parameter.data.to(dtypes[name]).to(parameter.dtype)
                numbers |= _loss("loss_recovered", model, held_out_NT)
        return ModelResult(model, numbers)

    def _windows(self, context: Context) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The windows that are only measured, and those that are used, [N, T] each; None without a calibration set."""
        if context.calibration is None:
            if self.needs_calibration():
                raise StepError("there is no calibration set", remedy="put a calibrate step before")
            return None, None
        tokens_NT = context.calibration.tokens_NT
        length = min(self.length_tokens, tokens_NT.shape[1])
        tokens_NT = tokens_NT[:, : tokens_NT.shape[1] // length * length].reshape(-1, length)
        if length < 2 or len(tokens_NT) < 2:
            raise StepError(
                f"{len(tokens_NT)} windows of {length} tokens are too few: one is held out, and one token of each is"
                " not predicted",
                remedy="calibrate on more `sequences`",
            )
        held_out = min(_HELD_OUT_MOST, max(1, len(tokens_NT) // _HELD_OUT_SHARE))
        return tokens_NT[:held_out], tokens_NT[held_out:]

    def _nearest(self, count: int, multiple: int) -> int:
        """The multiple that is nearest to the share of `count` that stays."""
        wanted = (1 - Fraction(str(self.ratio))) * count / multiple
        return min(count, math.floor(wanted + Fraction(1, 2)) * multiple)

    def _kept(self, count: int, multiple: int, what: str, switch: str) -> int:
        """How many of `count` groups stay. Raises `StepError` if none do, or all."""
        kept = self._nearest(count, multiple)
        if 0 < kept < count:
            return kept
        rounded = f", rounded to a multiple of {multiple}," if multiple > 1 else ""
        change = ("lower" if kept == 0 else "raise") + " `ratio`" + (", change `round_to`" if multiple > 1 else "")
        raise StepError(
            f"ratio {self.ratio:g} of {count} {what} of a block{rounded} {'leaves' if kept == 0 else 'removes'} none",
            remedy=f"{change}, or set {switch}: false",
        )

    def _removal(self, config: Any, sets: Sequence[GroupSet]) -> Removal:
        """Decide how many groups of which of a block's sets stay. A head has several columns, a channel one."""
        kept: dict[int, int] = {}
        entries: dict[str, int] = {}
        for position, groups in enumerate(sets):
            if groups.width > 1 and self.attention:
                check_heads(config, groups)
                kept[position] = self._kept(groups.count, 1, "KV groups", "attention")
                entries |= head_entries(config, groups, kept[position])
            elif groups.width == 1 and self.mlp:
                check_channels(config, groups)
                kept[position] = self._kept(groups.count, self.round_to, "MLP channels", "mlp")
                entries |= channel_entries(config, kept[position])
        if not kept:
            raise StepError("its blocks have nothing of what is to be removed", remedy="set attention and mlp to true")
        return Removal(kept, entries)

    def _choose(
        self,
        model: Any,
        blocks: Mapping[str, nn.Module],
        traced: Mapping[str, Sequence[GroupSet]],
        removal: Removal,
        tokens_NT: torch.Tensor | None,
        context: Context,
    ) -> dict[str, list[tuple[GroupSet, torch.Tensor]]]:
        """Return, for each block, its sets of groups and of each the numbers of the groups that stay, rising."""
        import torch

        judged: Iterator[tuple[str, Mapping[str, Gradient]]] = ((name, {}) for name in blocks)
        if self.importance == "taylor" and tokens_NT is not None:
            sets = next(iter(traced.values()))
            layers = [member.layer for position in removal.kept for member in sets[position].members]
            windows_NT, squares = tokens_NT[: self.gradient_windows], self.order != "first"
            judged = block_gradients(model, blocks, layers, windows_NT, context.scratch, squares=squares)
        generator = torch.Generator().manual_seed(context.seed)
        kept: dict[str, list[tuple[GroupSet, torch.Tensor]]] = {}
        for index, (name, gradients) in enumerate(judged):
            kept[name] = []
            for position, count in removal.kept.items():
                groups = traced[name][position]
                score_G = self.score(blocks[name], groups, gradients, generator)
                require_finite(f"importances of groups of {name}", score_G)
                kept[name].append((groups, score_G.argsort(descending=True, stable=True)[:count].sort().values))
            context.progress(0.5 * (index + 1) / len(blocks), f"{name} judged")
        return kept

    def score(
        self, block: nn.Module, groups: GroupSet, gradients: Mapping[str, Gradient], generator: torch.Generator
    ) -> torch.Tensor:
        """Return the importance of each group [G]: the sum over its rows and columns in all layers.

        gradients: by layer, for importance 'taylor'. generator: for 'random'.
        """
        import torch

        if self.importance == "random":
            return torch.rand(groups.count, generator=generator)
        parts = []
        for member in groups.members:
            weight_OI = cast("torch.Tensor", block.get_submodule(member.layer).weight).detach()
            salience_OI = self._salience(weight_OI, gradients.get(member.layer))
            inside = 1 - member.axis  # the dimension along which a row, or a column, extends
            vector_X = salience_OI.sum(inside).abs() if self.granularity == "vector" else salience_OI.abs().sum(inside)
            parts.append(vector_X[member.index_GK].sum(1))
        return torch.stack(parts).sum(0)

    def _salience(self, weight_OI: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
        if gradient is None:
            return weight_OI.abs() if self.importance == "l1" else weight_OI.square()
        first_OI = weight_OI * gradient.mean_OI
        if gradient.square_OI is None:
            return first_OI
        second_OI = weight_OI.square() * gradient.square_OI
        return second_OI if self.order == "second" else first_OI - 0.5 * second_OI

    def _recover(
        self, model: PreTrainedModel, blocks: Mapping[str, nn.Module], tokens_NT: torch.Tensor, context: Context
    ) -> PreTrainedModel:
        from torch import nn

        layers = [
            f"{name}.{inner}"
            for name, block in blocks.items()
            for inner, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]

        def progress(done: int, loss: float) -> None:
            context.progress(
                0.5 + 0.5 * done / self.lora_updates, f"update {done} of {self.lora_updates}, loss {loss:.4f}"
            )

        recovered: PreTrainedModel = recover(
            model,
            layers,
            tokens_NT,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            updates=self.lora_updates,
            learning_rate=self.lora_learning_rate,
            batch_sequences=self.batch_sequences,
            seed=context.seed,
            progress=progress,
        )
        return recovered


def _trace_all(blocks: Mapping[str, nn.Module], probe: Probe) -> dict[str, tuple[GroupSet, ...]]:
    """Trace every block. Raises `StepError` if they are not alike: one number in config.json is for all of them."""
    traced = {
        name: trace(block, name, call, probe.hidden_BTD)
        for (name, block), call in zip(blocks.items(), probe.calls, strict=True)
    }
    forms = {
        name: [(member.layer, member.axis, member.index_GK.shape) for groups in sets for member in groups.members]
        for name, sets in traced.items()
    }
    first = next(iter(forms))
    for name, form in forms.items():
        if form != forms[first]:
            raise StepError(
                f"the layers of {name} go together in another way than those of {first}, but config.json has one number"
                " for both",
                remedy="use a method that prunes single weights",
            )
    return traced


@contextmanager
def _widened(model: PreTrainedModel) -> Iterator[dict[str, torch.dtype]]:
    """Give the parameters float32 or what is wider, and let them have gradients, for as long as this is open.

    Yields the parameters' own dtypes, to which they return at the end. Dropout is off meanwhile.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            if parameter.element_size() < 4:
                parameter.data = parameter.data.float()
        yield dtypes
    finally:
        for name, parameter in model.named_parameters():
            if name in dtypes:  # if recovery failed, its updates are still there
                parameter.data = parameter.data.to(dtypes[name])
                parameter.requires_grad_(trained[name])
        for module, mode in modes:
            module.training = mode


def _num_parameters(model: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


def _loss(name: str, model: Any, tokens_NT: torch.Tensor | None) -> dict[str, float]:
    """The mean next-token loss, nats, under its name; nothing without windows."""
    import torch

    if tokens_NT is None:
        return {}
    with torch.no_grad():
        windows = torch.split(tokens_NT.to(model.device), 1)
        losses = [float(model(input_ids=tokens_1T, labels=tokens_1T, use_cache=False).loss) for tokens_1T in windows]
    return {name: sum(losses) / len(losses)}
