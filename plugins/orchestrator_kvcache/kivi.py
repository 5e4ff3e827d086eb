"""KIVI: keys rounded for each channel over a group of tokens, values for each token over a group of channels.

Liu et al. 2024, arXiv:2402.02750, section 3 and algorithm 1. Keys have a few channels that are large for all tokens, so
a group that runs along tokens keeps them from spoiling the others. Rounding of a group is asymmetric:

    zero = min, scale = (max - min) / (2^bits - 1), x' = round((x - zero) / scale) * scale + zero          (eq. 1)

The newest tokens stay in full precision: of the keys those that do not yet fill a block of `residual` tokens, of the
values always the last `residual`. Rounding follows the step, as in the paper's code: a token sees the state that the
tokens before it have left, and itself as it is.

Legend: B = 1 stream, H = query heads, K = key/value heads, G = query heads of one key/value head, T = new tokens,
N = tokens kept, D = width of a head, P = packed bytes of a head, S = tokens or groups of them that share a scale,
C = channels or groups of them that share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.api import ModelShape, SpecError, Stage, StepError
from orchestrator_kvcache.attention import Attention, softmax, weigh
from orchestrator_kvcache.policy import AttendingStore, LayerPolicy, Store
from orchestrator_kvcache.storage import compact, element_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from orchestrator.api import Checkpoint


class KIVI(LayerPolicy):
    """Packs all but the newest keys and values into 4 or 2 bits."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "kivi"
    paper: ClassVar = "Liu et al. 2024, arXiv:2402.02750, section 3, algorithm 1."

    num_bits: Literal[4, 2] = Field(2, description="Bits of a stored key or value.")
    group_size: int = Field(
        32,
        ge=4,
        le=1024,
        description="Tokens (keys) or channels (values) of one scale; divides the head's width.",
    )
    residual: int = Field(128, ge=4, le=1 << 16, description="Newest tokens, unrounded; a multiple of group_size.")
    keys: Literal["channel", "token"] = Field(
        "channel",
        description="What a scale of the keys is for; 'token' rounds them as the values, to compare.",
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.residual % self.group_size:
            raise ValueError(f"residual {self.residual} is not a multiple of group_size {self.group_size}")
        if self.group_size % 4:
            raise ValueError(f"group_size {self.group_size} is not a multiple of 4, so bytes would be left half empty")
        return self

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        reason = self._uneven(_head_width(model.config.to_dict()))
        if reason:
            raise StepError(reason[0], remedy=reason[1])
        return [KIVIStore(self) for _ in range(model.config.num_hidden_layers)]

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        width, element, rest = shape.head_dim, element_bytes(shape), min(tokens, self.residual)
        packed = width * self.num_bits // 8
        keys_rounded = tokens // self.residual * self.residual if self.keys == "channel" else tokens - rest
        of_token = packed + 2 * element * (width // self.group_size)
        of_group = self.group_size * packed + 2 * element * width
        rounded = of_token * (tokens - rest)
        rounded += of_group * (keys_rounded // self.group_size) if self.keys == "channel" else of_token * keys_rounded
        whole = element * width * (rest + tokens - keys_rounded)
        return shape.num_layers * shape.num_kv_heads * (rounded + whole)

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse, beside what all policies refuse, heads whose width the groups do not divide."""
        super().check_model(config)
        reason = self._uneven(_head_width(config))
        if reason:
            raise SpecError(reason[0], remedy=reason[1])

    def _uneven(self, width: int | None) -> tuple[str, str] | None:
        if width is None or width % self.group_size == 0:
            return None
        fitting = [size for size in range(4, width + 1, 4) if width % size == 0]
        return (
            f"group_size {self.group_size} does not divide the {width} channels of a head",
            f"use one of {', '.join(map(str, fitting))}" if fitting else "use int8 or fp8",
        )


def _head_width(config: Mapping[str, Any]) -> int | None:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    by_division = width // heads if isinstance(heads, int) and isinstance(width, int) and heads else None
    given = config.get("head_dim")
    return given if isinstance(given, int) else by_division


@dataclass(frozen=True)
class Rounded:
    """Packed tokens with their scales.

    packed_BKNP: integers, 8 / bits of neighbouring channels in a byte, the first in the lowest bits. scale_BKSC,
    zero_BKSC: in the model's dtype; S x C groups over tokens and channels.
    """

    packed_BKNP: Tensor
    scale_BKSC: Tensor
    zero_BKSC: Tensor
    bits: int

    @classmethod
    def of(cls, tokens_BKND: Tensor, bits: int, tokens: int, channels: int) -> Rounded:
        """Round with one scale for each group of `tokens` x `channels`. Their sizes divide N and D."""
        import torch

        levels = 2**bits - 1
        batch, heads, length, width = tokens_BKND.shape
        grouped = tokens_BKND.float().reshape(batch, heads, length // tokens, tokens, width // channels, channels)
        # What is stored is what rounding goes by: the dtype's own rounding of scale and zero then costs little.
        zero = grouped.amin((3, 5), keepdim=True).to(tokens_BKND.dtype)
        scale = ((grouped.amax((3, 5), keepdim=True) - zero.float()) / levels).to(tokens_BKND.dtype)
        divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
        integers = ((grouped - zero.float()) / divisor).round().clamp(0, levels).to(torch.uint8)
        integers_BKND = integers.reshape(tokens_BKND.shape)
        shifts = torch.arange(0, 8, bits, device=integers.device, dtype=torch.uint8)
        packed_BKNP = (integers_BKND.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)
        return cls(packed_BKNP, scale[:, :, :, 0, :, 0].clone(), zero[:, :, :, 0, :, 0].clone(), bits)

    def read(self) -> Tensor:
        """Return the rounded tokens [B, K, N, D] in the model's dtype."""
        import torch

        shifts = torch.arange(0, 8, self.bits, device=self.packed_BKNP.device, dtype=torch.uint8)
        integers_BKND = ((self.packed_BKNP.unsqueeze(-1) >> shifts) & (2**self.bits - 1)).flatten(-2)
        groups, parts = self.scale_BKSC.shape[2:]
        grouped = integers_BKND.float().unflatten(-1, (parts, -1)).unflatten(2, (groups, -1))
        scale, zero = (part.float()[:, :, :, None, :, None] for part in (self.scale_BKSC, self.zero_BKSC))
        tokens_BKND: Tensor = (grouped * scale + zero).reshape(integers_BKND.shape)
        return tokens_BKND.to(self.scale_BKSC.dtype)

    def joined(self, more: Rounded) -> Rounded:
        """These tokens and then more."""
        import torch

        packed, scale, zero = (torch.cat(pair, 2) for pair in zip(self.tensors(), more.tensors(), strict=True))
        return Rounded(packed, scale, zero, self.bits)

    def tensors(self) -> list[Tensor]:
        return [self.packed_BKNP, self.scale_BKSC, self.zero_BKSC]


class _Half:
    """The keys or the values of one layer: the older ones rounded, the newer ones as they came."""

    def __init__(self, policy: KIVI, *, channelwise: bool) -> None:
        self.policy = policy
        self.channelwise = channelwise
        self.rounded: Rounded | None = None
        self.whole_BKND: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return (self.rounded.tensors() if self.rounded else []) + ([] if self.whole_BKND is None else [self.whole_BKND])

    def num_rounded(self, tokens: int) -> int:
        """How many of the first tokens are rounded after `tokens` have come."""
        residual = self.policy.residual
        return tokens // residual * residual if self.channelwise else max(0, tokens - residual)

    def extend(self, new_BKTD: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
        """Keep new tokens after `tokens` earlier ones.

        Returns all tokens that are rounded after this, rounded [B, K, N', D]; those that were not rounded before, and
        the new ones, whole [B, K, N'', D]; and the place in the stream of the first of the latter.
        """
        import torch

        first = self.num_rounded(tokens)
        whole_BKND = new_BKTD if self.whole_BKND is None else torch.cat((self.whole_BKND, new_BKTD), 2)
        leaving = self.num_rounded(tokens + new_BKTD.shape[2]) - first
        if leaving:
            size = self.policy.group_size
            tokens_and_channels = (size, 1) if self.channelwise else (1, size)
            more = Rounded.of(whole_BKND[:, :, :leaving], self.policy.num_bits, *tokens_and_channels)
            self.rounded = more if self.rounded is None else self.rounded.joined(more)
        self.whole_BKND = compact(whole_BKND[:, :, leaving:])
        none_BKND = new_BKTD[:, :, :0]
        return (self.rounded.read() if self.rounded else none_BKND), whole_BKND, first


class KIVIStore(AttendingStore):
    """Keys and values of one layer."""

    def __init__(self, policy: KIVI) -> None:
        self.keys = _Half(policy, channelwise=policy.keys == "channel")
        self.values = _Half(policy, channelwise=False)
        self.tokens = 0  # that have come so far

    def length(self) -> int:
        return self.tokens

    def tensors(self) -> list[Tensor]:
        return self.keys.tensors() + self.values.tensors()

    def attend(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        """Attend to all tokens: each new one to those rounded that were when it came, and to the others whole.

        Tokens that are rounded during this step are there in both forms, and each new token takes one of them.
        """
        import torch

        device, before, new = keys_BKTD.device, self.tokens, keys_BKTD.shape[2]
        rounded_keys_BKND, whole_keys_BKND, first_key = self.keys.extend(keys_BKTD, before)
        rounded_values_BKND, whole_values_BKND, first_value = self.values.extend(values_BKTD, before)
        self.tokens += new
        arrival_T = torch.arange(before, before + new, device=device)
        place_N = torch.arange(before + new, device=device)
        # Every token once: up to `first_key` only rounded, after the rounded ones only whole, between them by arrival.
        scores_KGTN = how.scores(query_BHTD, torch.cat((rounded_keys_BKND[:, :, :first_key], whole_keys_BKND), 2))
        both = rounded_keys_BKND.shape[2]
        if both > first_key:
            was_TN = place_N[first_key:both] < self._rounded_at(self.keys, arrival_T)[:, None]
            rounded_KGTN = how.scores(query_BHTD, rounded_keys_BKND[:, :, first_key:])
            scores_KGTN[..., first_key:both] = torch.where(was_TN, rounded_KGTN, scores_KGTN[..., first_key:both])
        probabilities_KGTN = softmax(scores_KGTN, how.seen(arrival_T[:, None] - place_N))
        was_TN = place_N < self._rounded_at(self.values, arrival_T)[:, None]
        both = rounded_values_BKND.shape[2]
        out_BHTD = weigh((probabilities_KGTN * ~was_TN)[..., first_value:], whole_values_BKND)
        return out_BHTD + weigh((probabilities_KGTN * was_TN)[..., :both], rounded_values_BKND)

    @staticmethod
    def _rounded_at(half: _Half, arrival_T: Tensor) -> Tensor:
        """How many tokens were rounded when each new one came."""
        return arrival_T.new_tensor([half.num_rounded(arrival) for arrival in arrival_T.tolist()])
