"""What steps reported of their layers: errors by block and role, and what did not go as it should."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.html_report.facts import LAYERS_FILE, Missing, StepView, read_json

# What a layer's error is called, the one nearest to the model's output first.
ERRORS = ("relative_proxy_loss", "relative_weight_error")
# Metric of a layer -> what it means for people if it is not zero; in the order in which they worry.
TROUBLES: Mapping[str, str] = {
    "unseen_experts": "expert that saw no token; compressed as if all inputs were alike",
    "starved_experts": "expert with fewer tokens than inputs",
    "fallback_rtn": "fell back to rounding to nearest",
    "fallback_diagonal": "fell back to the diagonal of the Hessian",
    "damping_raised": "damping had to be raised",
    "rank_deficient_layers": "fewer calibration tokens than inputs",
    "dead_inputs": "inputs that were always zero",
    "zero_groups": "groups of weights that are all zero",
}
_LAYER = re.compile(r"^(?:(?P<stem>.*?)\.)?(?P<list>layers|h|blocks)\.(?P<block>\d+)\.(?P<role>.+)$")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.|$)")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


@dataclass(frozen=True)
class LayerCell:
    """A layer, or the experts of a block in one role: the worst error, and what happened to them.

    troubles: metric -> sum over the layers; only what is not zero.
    """

    block: int
    role: str
    error: float | None
    worst: str
    count: int
    troubles: Mapping[str, float]


@dataclass(frozen=True)
class LayerMap:
    """The layers that a step compressed. metric: which error; None if the method reports none."""

    step: StepView
    metric: str | None
    blocks: Sequence[int]
    roles: Sequence[str]
    cells: Mapping[tuple[int, str], LayerCell]
    layers: Mapping[str, Mapping[str, float]]

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The layers with the largest errors, the largest first."""
        found = self._errors()
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:count]

    def of_blocks(self) -> dict[int, tuple[float, float, str]]:
        """Block -> mean error of its layers, every layer counted once; the largest error, and the layer that has it."""
        found: dict[int, list[tuple[float, str]]] = {}
        for name, error in self._errors():
            found.setdefault(split_layer(name)[0], []).append((error, name))
        return {
            block: (math.fsum(error for error, _ in errors) / len(errors), *max(errors))
            for block, errors in sorted(found.items())
        }

    def _errors(self) -> list[tuple[str, float]]:
        metric = self.metric
        return [(name, values[metric]) for name, values in self.layers.items() if metric and metric in values]


def split_layer(name: str) -> tuple[int, str]:
    """Number of the block, and the role in it with the number of an expert left out; (-1, name) for others."""
    match = _LAYER.match(name)
    return (int(match["block"]), _EXPERT.sub("*", match["role"])) if match else (-1, name)


def layer_map(step: StepView) -> LayerMap | Missing | None:
    """What a step reported of its layers; None if it is no method of layers."""
    if step.artifact is None:
        return None
    found = read_json(step.artifact, LAYERS_FILE)
    if found is None or isinstance(found, Missing):
        return found
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        return Missing(f"{LAYERS_FILE} does not list layers")
    layers = {name: _numbers(values) for name, values in found.items()}
    metric = next((name for name in ERRORS if any(name in values for values in layers.values())), None)
    grouped: dict[tuple[int, str], list[str]] = {}
    for name in sorted(layers):
        grouped.setdefault(split_layer(name), []).append(name)
    cells = {place: _cell(place, names, layers, metric) for place, names in grouped.items()}
    roles = sorted({role for _, role in cells}, key=_role_order)
    return LayerMap(step, metric, sorted({block for block, _ in cells}), roles, cells, layers)


def _cell(
    place: tuple[int, str], names: Sequence[str], layers: Mapping[str, Mapping[str, float]], metric: str | None
) -> LayerCell:
    errors = [(layers[name][metric], name) for name in names if metric in layers[name]] if metric else []
    error, worst = max(errors, default=(None, names[0]))
    troubles = {name: total for name in TROUBLES if (total := sum(layers[one].get(name, 0) for one in names))}
    return LayerCell(*place, error, worst, len(names), troubles)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def _role_order(role: str) -> tuple[int, int, str]:
    parts = role.split(".")
    leaf = next((_ORDER.index(part) for part in reversed(parts) if part in _ORDER), len(_ORDER))
    return (0 if any("attn" in part or "attention" in part for part in parts) else 1, leaf, role)


@dataclass(frozen=True)
class Trouble:
    """What happened to some layers of a step. total: the sum of the metric; layers: those where it is not zero."""

    step: str
    metric: str
    total: float
    layers: Sequence[str]
    of: int


def troubles_of(maps: Iterable[LayerMap]) -> list[Trouble]:
    """Everything that was damped, dead, fell back or starved, step by step."""
    found = []
    for one in maps:
        for metric in TROUBLES:
            names = [name for name in sorted(one.layers, key=natural) if one.layers[name].get(metric, 0)]
            if names:
                total = sum(one.layers[name][metric] for name in names)
                found.append(Trouble(one.step.label, metric, total, names, len(one.layers)))
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """The order of names in which block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
