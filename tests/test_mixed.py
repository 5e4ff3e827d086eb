"""Mixed precision: the exact solver, and the chain from measured costs to a checkpoint with several schemes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from orchestrator.artifact import ArtifactStore
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import SpecError
from orchestrator.export import schemes_by_layer
from orchestrator.home import Settings
from orchestrator.layers import fused_groups
from orchestrator.plan import make_plan
from orchestrator.plugins import discover
from orchestrator.run import run_locally
from orchestrator.sensitivity import output_sensitivity
from orchestrator_quantization.knapsack import choose_within
from orchestrator_quantization.mixed import Mixed
from orchestrator_quantization.rtn import RTN
from tests.test_export import _stock_logits
from tests.test_run import Watcher
from tests.tiny import make_model, make_tokens


def by_trying_all(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> float:
    choices = itertools.product(*(range(len(size)) for size in sizes))
    fitting = (c for c in choices if sum(size[k] for size, k in zip(sizes, c, strict=True)) <= capacity)
    return min(sum(loss[k] for loss, k in zip(losses, c, strict=True)) for c in fitting)


@pytest.mark.parametrize("seed", range(60))
def test_the_solver_finds_what_trying_all_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 7)), int(rng.integers(1, 5)))
    sizes = rng.integers(1, 40, shape).tolist()
    losses = (np.round(rng.random(shape), 1) if seed % 3 == 0 else rng.lognormal(0, 2, shape)).tolist()
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for capacity in {least, (least + most) // 2, int(rng.integers(least, most + 1)), most}:
        chosen = choose_within(sizes, losses, capacity)
        assert sum(size[k] for size, k in zip(sizes, chosen, strict=True)) <= capacity
        found = sum(loss[k] for loss, k in zip(losses, chosen, strict=True))
        assert found == pytest.approx(by_trying_all(sizes, losses, capacity), rel=1e-12)
    with pytest.raises(ValueError, match="smallest options"):
        choose_within(sizes, losses, least - 1)


@pytest.mark.parametrize("alike", [False, True])
def test_hundreds_of_layers_are_solved_to_the_bound_of_a_solver_of_integer_programs(alike: bool) -> None:
    optimize = pytest.importorskip("scipy.optimize")  # comes with MLflow
    rng = np.random.default_rng(5)
    weights = np.tile([50_331_648, 16_777_216, 90_177_536, 45_088_768], 32) + (
        0 if alike else rng.integers(0, 9999, 128)
    )
    bits = np.array([2, 3, 4, 5, 6, 8])
    sizes = (weights[:, None] * (bits + 0.125) / 8).astype(int)
    spread = np.ones(128) if alike else rng.lognormal(0, 1.5, 128)
    losses = spread[:, None] * 4.0**-bits * rng.lognormal(0, 0 if alike else 0.1, sizes.shape)
    capacity = int(0.45 * sizes.max(1).sum())
    chosen = choose_within(sizes.tolist(), losses.tolist(), capacity)
    found = losses[np.arange(128), chosen].sum()
    assert sizes[np.arange(128), chosen].sum() <= capacity
    once = np.kron(np.eye(128), np.ones(len(bits)))
    constraints = [
        optimize.LinearConstraint(once, 1, 1),
        optimize.LinearConstraint(sizes.ravel()[None, :] / capacity, -np.inf, 1),
    ]
    answer = optimize.milp(
        losses.ravel(),
        constraints=constraints,
        integrality=1,
        bounds=(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 20},
    )
    assert found <= answer.fun * (1 + 1e-9)
    assert found >= answer.mip_dual_bound * (1 - 1e-6)


def test_parameters_that_say_no_one_budget_are_refused() -> None:
    for parameters in (
        {},
        {"budget": "1GiB", "bits_per_weight": 3},
        {"bits_per_weight": 3, "num_bits": [4]},
        {"bits_per_weight": 3, "num_bits": [4, 4]},
        {"bits_per_weight": 3, "num_bits": [1, 4]},
        {"budget": "large"},
    ):
        with pytest.raises(ValidationError):
            Mixed(**parameters)
    assert Mixed(budget="1GiB", num_bits=(8, 4)) == Mixed(budget=2**30, num_bits=(4, 8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    make_model(folder / "model", dtype=torch.float32)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return folder


def write(place: Path, **parameters: object) -> Path:
    path = place / "mixed.yaml"
    path.write_text(
        "version: 1\nname: mixed\nmodel: {id: model}\nsteps:\n"
        "  - calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 32}\n"
        f"  - quantize: mixed\n    with: {json.dumps(parameters)}\n",
        encoding="utf-8",
    )
    return path


def run(place: Path, home: Path, tracking_uri: str, **parameters: object) -> Path:
    settings = Settings(home, tracking_uri)
    document = run_locally(write(place, **parameters), discover(), settings, Watcher()).document()
    return ArtifactStore(settings.home).find(document["steps"][-1]["artifact"]["digest"]).path


def measured_losses(place: Path, tokens_NT: torch.Tensor, method: Mixed) -> dict[str, list[float]]:
    """Of each layer and option, nats per token: the squared error of outputs on real inputs, times what it costs."""
    costs = output_sensitivity(Checkpoint(place / "model"), tokens_NT, place / "sensitivity", seed=0)
    model = Checkpoint(place / "model").load(torch.float64)
    losses: dict[str, list[float]] = {}

    def note(name: str, module: torch.nn.Linear, inputs: torch.Tensor) -> None:
        x_TI = inputs.flatten(0, 1)
        for option in method.options():
            rounded_OI = option.compress(module.weight.float(), None).weight_OI.double()
            error = (x_TI @ (rounded_OI - module.weight).T).square().sum(-1).mean()
            losses.setdefault(name, []).append(costs[name] * float(error))

    for name in costs:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: note(name, m, args[0]))
    with torch.no_grad():
        model(tokens_NT)
    return losses


def test_the_assignment_is_the_best_that_fits_and_loads_in_stock_transformers(place: Path, tracking_uri: str) -> None:
    parameters = {"bits_per_weight": 5.2, "num_bits": [2, 4, 8], "group_size": 32, "rounding": "rtn"}
    result = Checkpoint(run(place, place / "home", tracking_uri, **parameters))
    method = Mixed(**parameters, scale_dtype="float32")
    schemes = result.schemes()
    sets = [*fused_groups(schemes), *((name,) for name in schemes if name.endswith(("o_proj", "down_proj")))]
    assert sorted(name for members in sets for name in members) == sorted(schemes)
    assert all(len({schemes[name] for name in members}) == 1 for members in sets)
    assert len(set(schemes.values())) == 3, "the budget is met with all three"

    tokens = next((place / "home" / "artifacts").glob("*/tokens.safetensors"))
    losses = measured_losses(place, load_file(tokens)["tokens"], method)
    shapes = {layer.name: layer for layer in Checkpoint(place / "model").block_layers()}
    # float32 scales in groups of 32: one bit more per weight; and 16 bytes that tell a layer's shape.
    numel = {name: layer.out_features * layer.in_features for name, layer in shapes.items()}
    sizes = [[sum(numel[n] * (bits + 1) // 8 + 16 for n in members) for bits in (2, 4, 8)] for members in sets]
    costs = [[sum(losses[n][k] for n in members) for k in range(3)] for members in sets]
    capacity = int(5.2 * sum(numel.values()) / 8)
    chosen = [(2, 4, 8).index(schemes[members[0]].num_bits) for members in sets]
    assert sum(size[k] for size, k in zip(sizes, chosen, strict=True)) <= capacity
    found = sum(cost[k] for cost, k in zip(costs, chosen, strict=True))
    assert found == pytest.approx(by_trying_all(sizes, costs, capacity), rel=1e-4)
    uniform = [sum(cost[k] for cost in costs) for k in range(3) if sum(size[k] for size in sizes) <= capacity]
    assert found < min(uniform)

    model = result.load()
    for name, scheme in schemes.items():
        dense_OI = Checkpoint(place / "model").load().get_submodule(name).weight.data
        expected_OI = (
            RTN(num_bits=scheme.num_bits, group_size=32, scale_dtype="float32").compress(dense_OI, None).weight_OI
        )
        assert torch.equal(model.get_submodule(name).weight, expected_OI)
    (stock,) = _stock_logits([result.path], make_tokens(2), place)
    with torch.no_grad():
        assert torch.equal(model(make_tokens(2)).logits, stock)


def test_another_budget_runs_nothing_again_and_files_keep_to_the_byte(
    place: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"num_bits": [2, 3, 8], "group_size": 32}
    first = Checkpoint(run(place, place / "other", tracking_uri, bits_per_weight=5, **shared))
    whole = first.weight_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("costs are measured again")

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.allocation.LayerSurvey.compress", refuse)
        again = Checkpoint(run(place, place / "other", tracking_uri, budget=whole, **shared))
        assert again.schemes() == first.schemes() and again.weight_bytes() == whole
        tight = Checkpoint(run(place, place / "other", tracking_uri, budget=whole - 1, **shared))
    assert tight.weight_bytes() < whole
    fresh = Checkpoint(run(place, place / "fresh", tracking_uri, budget=whole - 1, **shared))
    assert (fresh.path / "model.safetensors").read_bytes() == (tight.path / "model.safetensors").read_bytes()


def test_a_budget_that_nothing_can_meet_is_refused_while_planning(place: Path) -> None:
    methods = discover()
    source = Checkpoint(place / "model")
    path = write(place, budget=1000, group_size=32, num_bits=[3, 4])
    with pytest.raises(SpecError, match=r"mixed\.yaml:8: .*1,000 bytes cannot be met: with 3 bits.* in all") as caught:
        make_plan(path, methods, place / "home")
    least = int(str(caught.value).split(" in all")[0].split()[-1].replace(",", ""))
    make_plan(write(place, budget=least, group_size=32, num_bits=[3, 4]), methods, place / "home")
    with pytest.raises(SpecError, match="cannot be met"):
        make_plan(write(place, budget=least - 1, group_size=32, num_bits=[3, 4]), methods, place / "home")
    with pytest.raises(SpecError, match=r"bits_per_weight: 2 cannot be met; the least is 3\."):
        make_plan(write(place, bits_per_weight=2, group_size=32, num_bits=[2, 4]), methods, place / "home")
    assert schemes_by_layer(source, None, []) == {}
    with pytest.raises(SpecError, match="48 does not divide in_features 64"):
        make_plan(write(place, bits_per_weight=4, group_size=48), methods, place / "home")


def test_a_run_killed_between_the_walks_goes_on(
    place: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs of the blocks that were measured are not measured again, and the bytes are those of an undisturbed run."""
    from orchestrator.allocation import LayerSurvey

    parameters = {"bits_per_weight": 4.5, "num_bits": [2, 6], "group_size": 32}
    expected = run(place, place / "calm", tracking_uri, **parameters)
    measure, seen = LayerSurvey.compress, []

    def die_in_the_second_block(self: LayerSurvey, block: object, names: Sequence[str], record: object) -> object:
        seen.append(names[0])
        if ".layers.1." in names[0] and len([n for n in seen if ".layers.1." in n]) == 1:
            raise KeyboardInterrupt
        return measure(self, block, names, record)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerSurvey, "compress", die_in_the_second_block)
    monkeypatch.setenv("ORCHESTRATOR_STATISTICS_GIB", "0")
    with pytest.raises(KeyboardInterrupt):
        run(place, place / "killed", tracking_uri, **parameters)
    before = len(seen)
    result = run(place, place / "killed", tracking_uri, **parameters)
    assert not [name for name in seen[before:] if ".layers.0." in name]
    assert (result / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
