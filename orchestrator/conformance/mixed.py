"""What the core relies on when a `MixedMethod` chooses options; the options themselves are checked as any method."""

from __future__ import annotations

import random

from orchestrator.conformance.findings import Findings
from orchestrator.conformance.surroundings import left_alone
from orchestrator.layer_method import LayerCosts, LayerMethod, MixedMethod, ScalingMethod

_CHECK = "L17 mixed"
_SETS = 12


def usable_options(method: MixedMethod, findings: Findings) -> list[LayerMethod]:
    """Return the options of a method that was planned, if they are of the kinds that the walk can try."""
    with findings.attempt(_CHECK, "`options`"):
        options = list(method.options())
        wrong = [o for o in options if not isinstance(o, LayerMethod) or isinstance(o, MixedMethod | ScalingMethod)]
        unlike = len({o.scheme() for o in options if o not in wrong}) == len(options)
        if findings.expect(
            _CHECK,
            bool(options) and not wrong and unlike and all(o.scheme() for o in options),
            "`options` must return LayerMethods, none of them scaling or mixed, each with a scheme of its own",
        ):
            return options
    return []


def check_choice(method: MixedMethod, num_options: int, findings: Findings) -> None:
    """Let it choose among made-up costs, with a capacity that just fits, one between, and more than enough."""
    draw = random.Random(0)
    costs = []
    for number in range(_SETS):
        sizes = sorted(draw.sample(range(100, 1000), num_options))
        losses = sorted((draw.random() for _ in sizes), reverse=True)
        costs.append(LayerCosts((f"layer.{number}",), 1000, tuple(sizes), tuple(losses)))
    least, most = sum(c.sizes[0] for c in costs), sum(c.sizes[-1] for c in costs)
    for capacity in (least, (least + most) // 2, most + 1):
        choices = []
        for seed in (0, 1):
            with left_alone(findings, "`choose`", seed=seed), findings.attempt(_CHECK, f"`choose` within {capacity}"):
                choices.append(list(method.choose(costs, capacity)))
        if len(choices) < 2:
            return
        chosen = choices[0]
        if not findings.expect(
            _CHECK,
            len(chosen) == _SETS and all(number in range(num_options) for number in chosen),
            f"`choose` returned {chosen}; return the number of an option for each of {_SETS} sets",
        ):
            return
        size = sum(cost.sizes[number] for cost, number in zip(costs, chosen, strict=True))
        findings.expect(_CHECK, size <= capacity, f"`choose` took {size} bytes of {capacity}; keep to the capacity")
        findings.expect(_CHECK, choices[0] == choices[1], "`choose` gave two answers to one question; let it be pure")
