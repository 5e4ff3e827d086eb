"""LLM-Pruner: remove whole attention heads and MLP channels by what the loss would miss; then recover with LoRA.

Ma et al. 2023, arXiv:2305.11627. Groups (section 3.1) are found by tracing (`dependency_groups`); a group is a KV head
with the query heads that share it, or an MLP channel. The groups with the least importance (`importance`) in their
block go. Gradients are taken block by block (`block_gradients`). Recovery (`low_rank`) trains W + BA, A and B of rank
`lora_rank` (eq. 6), for every linear layer in the blocks, and adds BA to the weights.

Choices. The authors leave the first and the last blocks whole; here all blocks lose the same number of groups, because
then config.json says all there is to say with one number for all blocks, which is what every engine reads. The model is
held in the dtype of its checkpoint and computes in float32 (`precision`). Recovery follows the dense model's
predictions where the authors train on the next token of 50 thousand texts: of a few hundred windows the next tokens are
learnt by heart, and other text is predicted worse than without recovery; predictions of the dense model say more in as
many windows. One window in eight is used neither for choosing nor for training; the recorded losses are those of these
windows, and flatter training on next tokens where the calibrator drew windows that overlap.

Shape legend: N = windows, G = groups, T = tokens.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from orchestrator.api import (
    TRAINED_TOKENS,
    Context,
    Invariant,
    ModelFacts,
    ModelMethod,
    ModelResult,
    PreflightError,
    Stage,
    StepError,
    TextSource,
    Work,
    token_windows,
)
from orchestrator_pruning.block_gradients import CHUNK_ELEMENTS, Gradient, block_gradients
from orchestrator_pruning.dependency_groups import REMEDY, GroupSet, blocks_of, make_probe, trace_all
from orchestrator_pruning.hollow import hollow
from orchestrator_pruning.importance import Granularity, Importance, Kind, Order
from orchestrator_pruning.low_rank import Objective, divergence, recover
from orchestrator_pruning.patterns import require_finite
from orchestrator_pruning.precision import frozen, in_float32
from orchestrator_pruning.removal import (
    Removal,
    as_configured,
    channels_after,
    check_channels,
    check_heads,
    head_entries,
    heads_after,
    remove,
    said_of_channels,
    said_of_heads,
    without,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_HELD_OUT_SHARE = 8  # one window in eight, at most _HELD_OUT_MOST
_HELD_OUT_MOST = 16
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # entries of config.json


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
    importance: Kind = Field(
        "taylor", description="What a group is judged by: the change of the loss, the size of its weights, or nothing."
    )
    order: Order = Field(
        "first", description="Terms of the Taylor expansion: the gradient, its squares, or both; only for 'taylor'."
    )
    granularity: Granularity = Field(
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
    source: TextSource | None = Field(
        None,
        description="Text that recovery trains on: a file, or hub:OWNER/NAME:SPLIT@REVISION. Default: the calibration "
        "set. The more it has seen, the better it does on other text.",
    )
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    sequences: int = Field(2048, ge=2, le=10_000_000, description="Windows drawn from `source`; no use without it.")
    lora_objective: Objective = Field(
        "dense",
        description="What recovery trains on: the dense model's predictions (forward KL), or the next tokens of the "
        "calibration text, as the authors do on far more text.",
    )
    lora_updates: int = Field(200, ge=1, le=10_000_000, description="Optimizer steps of the recovery.")
    lora_learning_rate: float = Field(
        1e-3,
        gt=0,
        le=1,
        description="Peak learning rate of the recovery. The default suits some million parameters; for billions the "
        "authors take 1e-4.",
    )
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

    def config_after(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The new numbers of heads and channels. Raises `StepError` for those that leave none, and for mixtures."""
        if any(config.get(name) for name in _EXPERTS):
            raise StepError(f"{config['model_type']!r} is a mixture of experts, which go into no group", remedy=REMEDY)
        entries: dict[str, int] = {}
        if self.attention:
            heads, kv_heads, head_dim = said_of_heads(config)
            kept = self._kept(kv_heads, 1, "KV groups", "attention")
            entries |= head_entries(config, kept, kv_heads, heads // kv_heads, head_dim)
        if self.mlp:
            name, channels = said_of_channels(config)
            entries[name] = self._kept(channels, self.round_to, "MLP channels", "mlp")
        return {**config, **entries}

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a layer that tracing cannot place, and counts that config.json cannot say."""
        with hollow(model):
            blocks = blocks_of(model)
            probe = make_probe(model, list(blocks.values()))
            traced = trace_all(blocks, probe)
            as_configured(model, traced, self._removal(model.config, next(iter(traced.values()))))

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """The model as it is stored, for recovery the dense one too; a block's gradients, what a window leaves."""
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
            recovering = model.saved_bytes(length) + 24 * length * model.vocabulary
            if self.lora_objective == "dense":
                work = work.then(dense.forward(self.lora_updates * batch, length, length, head=True))
                recovering += dense.load_bytes(as_float32=False)
            memory = max(memory, recovering)
        held = model.parameters * model.item_bytes + model.wide_bytes + memory
        kept = 0 if self.source is None else 4 * min(self.sequences * self.length_tokens, TRAINED_TOKENS)
        memory = max(held, model.load_bytes(as_float32=False))
        return replace(work, memory_bytes=memory, disk_bytes=kept, scratch_bytes=scratch)

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Prune and recover `model` in place.

        Raises `StepError`, before any gradient, for a ratio that leaves no head or no channel, for counts that
        config.json cannot say, and for a layer that tracing cannot place; later for numbers that are not finite.
        """
        held_out_NT, used_NT = self._windows(context)
        own_NT: torch.Tensor | None = None
        with frozen(model), in_float32(model):
            blocks = blocks_of(model)
            probe = make_probe(model, list(blocks.values()))
            traced = trace_all(blocks, probe)
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
            if self.lora_rank and used_NT is not None and held_out_NT is not None:
                own_NT = None if self.source is None else self._drawn(self.source, context)
                trained_on_NT = used_NT if own_NT is None else own_NT
                model, followed = self._recover(model, blocks, trained_on_NT, held_out_NT, context)
                numbers |= followed
                numbers |= _loss("loss_recovered", model, held_out_NT)
        return ModelResult(model, numbers, trained_on=own_NT)

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

    def _drawn(self, source: str, context: Context) -> torch.Tensor:
        """Windows [N, T] of the text for recovery."""
        return token_windows(
            source,
            context.dense.load_tokenizer(),
            num_sequences=self.sequences,
            length=self.length_tokens,
            seed=context.seed,
            field=self.field,
            random=True,
        ).tokens_NT

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
                entries |= heads_after(config, groups, kept[position])
            elif groups.width == 1 and self.mlp:
                check_channels(config, groups)
                kept[position] = self._kept(groups.count, self.round_to, "MLP channels", "mlp")
                entries |= channels_after(config, kept[position])
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
        importance = Importance(self.importance, self.order, self.granularity)
        kept: dict[str, list[tuple[GroupSet, torch.Tensor]]] = {}
        for index, (name, gradients) in enumerate(judged):
            kept[name] = []
            for position, count in removal.kept.items():
                groups = traced[name][position]
                score_G = importance.score(blocks[name], groups, gradients, generator)
                require_finite(f"importances of groups of {name}", score_G)
                kept[name].append((groups, score_G.argsort(descending=True, stable=True)[:count].sort().values))
            context.progress(0.5 * (index + 1) / len(blocks), f"{name} judged")
        return kept

    def _recover(
        self,
        model: PreTrainedModel,
        blocks: Mapping[str, nn.Module],
        tokens_NT: torch.Tensor,
        held_out_NT: torch.Tensor,
        context: Context,
    ) -> tuple[PreTrainedModel, dict[str, float]]:
        """Return the recovered model, and how far its predictions were and are from the dense model's."""
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

        def train(teacher: PreTrainedModel | None) -> PreTrainedModel:
            result: PreTrainedModel = recover(
                model,
                layers,
                tokens_NT,
                teacher=teacher,
                rank=self.lora_rank,
                alpha=self.lora_alpha,
                updates=self.lora_updates,
                learning_rate=self.lora_learning_rate,
                batch_sequences=self.batch_sequences,
                seed=context.seed,
                progress=progress,
            )
            return result

        if self.lora_objective == "text":
            return train(None), {}
        teacher = context.dense.load()
        with frozen(teacher), in_float32(teacher):
            before = divergence(model, teacher, held_out_NT)
            recovered = train(teacher)
            return recovered, {"kl_pruned": before, "kl_recovered": divergence(recovered, teacher, held_out_NT)}


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
