"""Taking the same number of groups out of every block, so that config.json alone says what the model has become.

Shape legend: B = copies of the input, T = tokens, D = model width, G = groups, G' = groups that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError
from orchestrator_pruning.dependency_groups import REMEDY, Call, GroupSet

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOLERANCE = 1e-4  # of the largest output, between a block without some groups and the same block with them at zero
_WIDTHS = ("ffn_dim", "intermediate_size")  # what configurations call the number of MLP channels


@dataclass(frozen=True)
class Removal:
    """kept: how many groups stay of a block's set, by its position. entries: those of config.json that say it."""

    kept: Mapping[int, int]
    entries: Mapping[str, int]


def check_heads(config: Any, groups: GroupSet) -> None:
    """Refuse KV groups whose number config.json does not give: heads that depend on each other, for one."""
    _require_said(config, _heads_name(config), groups, "attention")


def heads_after(config: Any, groups: GroupSet, kept: int) -> dict[str, int]:
    """The entries of config.json for `kept` KV groups, from an object of Transformers and what tracing found."""
    sharing = config.num_attention_heads // groups.count
    said = {name: True for name in ("num_key_value_heads",) if hasattr(config, name)}
    return head_entries(said, kept, groups.count, sharing, groups.width // sharing)


def head_entries(config: Mapping[str, Any], kept: int, groups: int, sharing: int, head_dim: int) -> dict[str, int]:
    """The entries of config.json for `kept` of some KV groups, each with `sharing` query heads.

    head_dim no longer follows from the width of the model.
    """
    entries = {"num_attention_heads": sharing * kept, "head_dim": head_dim}
    return entries | ({"num_key_value_heads": kept} if config.get("num_key_value_heads") else {})


def said_of_heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what the content of a config.json gives as attention heads, KV heads and size of a head."""
    heads, width = _said(config, "num_attention_heads", "attention"), config.get("hidden_size")
    kv_heads = _said(config, "num_key_value_heads", "attention") if config.get("num_key_value_heads") else heads
    head_dim = config.get("head_dim") or (width // heads if isinstance(width, int) else 0)
    if heads % kv_heads or not head_dim:
        raise StepError(f"config.json gives {heads} heads that share {kv_heads} KV heads", remedy="correct config.json")
    return heads, kv_heads, head_dim


def said_of_channels(config: Mapping[str, Any]) -> tuple[str, int]:
    """Return the entry in which a config.json gives the number of MLP channels, and what it gives."""
    name = next((name for name in _WIDTHS if name in config), _WIDTHS[-1])
    return name, _said(config, name, "mlp")


def _said(config: Mapping[str, Any], name: str, switch: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise StepError(
            f"config.json of a {config.get('model_type')!r} model gives no {name}, which would say what is left",
            remedy=f"set {switch}: false, or {REMEDY}",
        )
    return value


def check_channels(config: Any, groups: GroupSet) -> None:
    """Refuse MLP channels whose number config.json does not give."""
    _require_said(config, _width_name(config), groups, "mlp")


def channels_after(config: Any, kept: int) -> dict[str, int]:
    """The entries of config.json for `kept` MLP channels."""
    return {_width_name(config): kept}


def _heads_name(config: Any) -> str:
    return "num_key_value_heads" if hasattr(config, "num_key_value_heads") else "num_attention_heads"


def _width_name(config: Any) -> str:
    return next((name for name in _WIDTHS if hasattr(config, name)), _WIDTHS[-1])


def _require_said(config: Any, name: str, groups: GroupSet, switch: str) -> None:
    said = getattr(config, name, None)
    if said != groups.count:
        raise StepError(
            f"tracing found {groups.count} groups around {groups.reader}, but config.json gives {name} as {said}",
            remedy=f"set {switch}: false",
        )


def as_configured(model: Any, traced: Mapping[str, Sequence[GroupSet]], removal: Removal) -> nn.Module:
    """Return the pruned model as config.json alone will make it, without weights.

    Raises `StepError` if Transformers refuses the configuration, or makes layers of other shapes from it.
    """
    import torch

    config = _configured(model.config, next(iter(traced.values())), removal)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made: nn.Module = type(model)(config)
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for block, sets in traced.items():
        for position, count in removal.kept.items():
            for member in sets[position].members:
                for name in (f"{block}.{member.layer}.weight", f"{block}.{member.layer}.bias"):
                    if name in wanted and member.axis < len(wanted[name]):
                        wanted[name][member.axis] = count * member.index_GK.shape[1]
    shapes = {name: list(parameter.shape) for name, parameter in made.named_parameters()}
    for name in wanted:
        if shapes.get(name) != wanted[name]:
            raise StepError(
                f"{name} would become {wanted[name]}, but with {_listed(removal.entries)} in config.json it would be"
                f" {shapes.get(name)}",
                remedy="set attention: false, or use an architecture whose config.json has head_dim",
            )
    return made


def _configured(config: Any, sets: Sequence[GroupSet], removal: Removal) -> Any:
    """Return the configuration with its new entries, checked as Transformers does when it reads config.json."""

    def read_again(entries: Mapping[str, int]) -> Any:
        return type(config).from_dict({**config.to_dict(), **entries})

    def can_say(entries: Mapping[str, int]) -> bool:
        try:
            read_again(entries)
        except Exception:
            return False
        return True

    try:
        return read_again(removal.entries)
    except Exception as error:  # strict configuration classes raise validation errors of their own
        remedies = ["choose another `ratio`"]
        for groups in (sets[position] for position in removal.kept if sets[position].width > 1):
            counts = [str(n) for n in range(1, groups.count) if can_say(heads_after(config, groups, n))]
            could = [f"choose a ratio that leaves {' or '.join(counts)} of {groups.count} KV groups"] if counts else []
            remedies = [*could, "set attention: false"]
        reason = str(error).strip().splitlines()[-1].strip()
        raise StepError(
            f"config.json of a {config.model_type!r} model cannot say {_listed(removal.entries)}: {reason}",
            remedy=", or ".join(remedies),
        ) from None


def _listed(entries: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def without(
    block: nn.Module, kept: Sequence[tuple[GroupSet, torch.Tensor]], call: Call, hidden_BTD: torch.Tensor
) -> torch.Tensor:
    """Set the readers' columns of all groups but the kept ones [G'] to zero; return what the block then puts out."""
    import torch

    with torch.no_grad():
        for groups, kept_G in kept:
            reader: Any = block.get_submodule(groups.reader)
            gone_G = torch.ones(groups.count, dtype=torch.bool).index_fill(0, kept_G, False)
            reader.weight[:, groups.members[-1].index_GK[gone_G].flatten()] = 0.0
        return call(block, hidden_BTD)


def remove(
    block: nn.Module,
    name: str,
    kept: Sequence[tuple[GroupSet, torch.Tensor]],
    like: nn.Module,
    call: Call,
    hidden_BTD: torch.Tensor,
    expected_BTD: torch.Tensor,
) -> None:
    """Take all groups but the kept ones [G'] out of the layers of a block, in place; config is the new one already.

    like: the same block as its new config.json makes it, from which the numbers of heads and features are taken.
    expected_BTD: what `without` returned. Raises `StepError` unless the block puts out the same.
    """
    import torch
    from torch import nn

    with torch.no_grad():
        for groups, kept_G in kept:
            for member in groups.members:
                layer: Any = block.get_submodule(member.layer)
                index = member.index_GK[kept_G].flatten().sort().values
                for leaf in ("weight", "bias"):
                    old = getattr(layer, leaf)
                    if old is not None and member.axis < old.ndim:
                        new = nn.Parameter(old.index_select(member.axis, index), requires_grad=old.requires_grad)
                        setattr(layer, leaf, new)
        for inner, module in block.named_modules():
            for key, value in vars(like.get_submodule(inner)).items():
                if type(value) is int and type(vars(module).get(key)) is int:
                    setattr(module, key, value)
        actual_BTD = call(block, hidden_BTD)
        error, largest = float((actual_BTD - expected_BTD).abs().max()), float(expected_BTD.abs().max())
    if not error <= _TOLERANCE * largest:
        raise StepError(
            f"{name} without the removed groups puts out something else than with them at zero: {error:.3g} of"
            f" {largest:.3g}",
            remedy=REMEDY,
        )
