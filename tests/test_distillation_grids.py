"""Students on a quantization grid: the gradient that passes straight through, and a grid that stays one.

Shape legend: O = out features, I = in features, G = groups along I, W = weights of a group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.api import Checkpoint, Context, InputScheme, Invariant, QuantizedWeight, QuantScheme, StepError
from orchestrator.artifact import ArtifactStore
from orchestrator.errors import SpecError
from orchestrator.home import Settings
from orchestrator.plan import make_plan
from orchestrator.plugins import Methods, discover
from orchestrator.run import run_locally
from orchestrator_distillation.presets import QAD
from orchestrator_distillation.straight_through import GridLayer
from tests.test_run import Watcher
from tests.tiny import make_model

INPUTS = InputScheme()
SCHEMES = {
    "W3 symmetric": QuantScheme(num_bits=3, group_size=8),
    "W2 asymmetric": QuantScheme(num_bits=2, group_size=8, symmetric=False),
    "W4 channel": QuantScheme(num_bits=4, strategy="channel", group_size=None),
    "W8A8": QuantScheme(num_bits=8, strategy="channel", group_size=None, input_activations=INPUTS),
    "fp8": QuantScheme(
        num_bits=8, type="float", strategy="channel", group_size=None, input_activations=InputScheme(type="float")
    ),
}


def encoding(scheme: QuantScheme, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    groups = 16 // scheme.group_width(16)
    scale_OG = (torch.rand(6, groups, generator=generator) * 0.1 + 0.05).to(dtype)
    if scheme.type == "float":
        q_OI = (torch.randn(6, 16, generator=generator) * 200).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        low, high = int(scheme.quant_min), int(scheme.quant_max)
        q_OI = torch.randint(low, high + 1, (6, 16), generator=generator, dtype=torch.int8)
    zero_point_OG = None if scheme.symmetric else torch.randint(-2, 2, (6, groups), generator=generator).to(torch.int8)
    return QuantizedWeight(q_OI, scale_OG, zero_point_OG, scheme)


def layer_of(
    scheme: QuantScheme, moved: float, dtype: torch.dtype = torch.float32
) -> tuple[GridLayer, torch.nn.Linear]:
    module = torch.nn.Linear(16, 6, bias=False)
    layer = GridLayer(module, encoding(scheme, dtype), None)
    generator = torch.Generator().manual_seed(1)
    layer.master_OI.data += moved * torch.randn(6, 16, generator=generator) * 0.1
    layer.log_change_OG.data += moved * torch.randn(layer.log_change_OG.shape, generator=generator) * 0.1
    layer.write()
    return layer, module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_an_untouched_layer_is_stored_as_it_was(name: str, dtype: torch.dtype) -> None:
    layer, module = layer_of(SCHEMES[name], 0.0, dtype)
    before, after = encoding(SCHEMES[name], dtype), layer.encode()
    assert torch.equal(after.scale_OG, before.scale_OG)
    assert torch.equal(after.q_OI.float(), before.q_OI.float())
    assert torch.equal(module.weight, before.dequantize(torch.float32))


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "fp8"])
def test_gradients_agree_with_float64_autograd(name: str) -> None:
    """Straight-through rounding written with `detach`, as LSQ has it, and differentiated by torch."""
    scheme = SCHEMES[name]
    layer, module = layer_of(scheme, 1.0)
    weight_gradient_OI = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    module.weight.grad = weight_gradient_OI.clone()
    layer.take_gradient()

    master_OI = layer.master_OI.detach().double().requires_grad_()
    change_OG = layer.log_change_OG.detach().double().requires_grad_()
    first = encoding(scheme)
    scale_OG1 = (first.scale_OG.double() * change_OG.exp()).unsqueeze(-1)
    zero = 0.0 if first.zero_point_OG is None else first.zero_point_OG.double().unsqueeze(-1)
    value_OGW = master_OI.view(6, first.scale_OG.shape[1], -1) / scale_OG1 + zero
    rounded = value_OGW + (value_OGW.round() - value_OGW).detach()
    # The clamp acts on what was rounded: its gradient is 1 for all that rounds to a level of the grid.
    q = rounded.clamp(scheme.quant_min, scheme.quant_max)
    weight_OI = ((q - zero) * scale_OG1).view(6, 16)
    torch.testing.assert_close(module.weight.detach().double(), weight_OI.detach(), rtol=1e-5, atol=1e-6)
    (weight_OI * weight_gradient_OI.double()).sum().backward()
    assert master_OI.grad is not None and change_OG.grad is not None
    assert layer.master_OI.grad is not None and layer.log_change_OG.grad is not None
    torch.testing.assert_close(layer.master_OI.grad.double(), master_OI.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.log_change_OG.grad.double(), change_OG.grad, rtol=1e-3, atol=1e-5)
    clamped = (value_OGW.round() < scheme.quant_min) | (value_OGW.round() > scheme.quant_max)
    assert bool(clamped.any())  # both cases were there
    assert not bool(clamped.all())


@pytest.mark.parametrize("name", SCHEMES)
def test_integers_move_with_the_master(name: str) -> None:
    before, after = encoding(SCHEMES[name]), layer_of(SCHEMES[name], 3.0)[0].encode()
    changed = (before.q_OI.float() != after.q_OI.float()).float().mean()
    assert 0.3 < float(changed) <= 1
    low, high = SCHEMES[name].quant_min, SCHEMES[name].quant_max
    assert low <= float(after.q_OI.float().min()) and float(after.q_OI.float().max()) <= high


def test_kept_zeros_get_no_gradient() -> None:
    code = encoding(SCHEMES["W3 symmetric"])
    zero_OI = code.dequantize(torch.float32) == 0
    assert bool(zero_OI.any())
    module = torch.nn.Linear(16, 6, bias=False)
    layer = GridLayer(module, code, zero_OI)
    layer.write()
    module.weight.grad = torch.ones(6, 16)
    layer.take_gradient()
    assert layer.master_OI.grad is not None
    assert not bool(layer.master_OI.grad[zero_OI].any())
    assert bool(layer.master_OI.grad[~zero_OI].any())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grids")
    make_model(folder / "model", layers=3, dtype=torch.float32)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


def run(place: Path, methods: Methods, tracking_uri: str, *steps: str, name: str = "model") -> list[Any]:
    """Run a chain; return the artifacts of its steps."""
    calibrate = "calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 32}"
    lines = "".join(f"  - {step}\n" for step in (calibrate, *steps))
    path = place / "chain.yaml"
    path.write_text(f"version: 1\nname: grids\nmodel: {{id: {name}}}\nsteps:\n{lines}", encoding="utf-8")
    settings = Settings(place / "home", tracking_uri)
    document = run_locally(path, methods, settings, Watcher()).document()
    store = ArtifactStore(settings.home)
    return [store.find(step["artifact"]["digest"]) for step in document["steps"]]


QUANTIZED = {
    "gptq": "quantize: gptq\n    with: {num_bits: 3, group_size: 32}",
    "gptq asymmetric": "quantize: gptq\n    with: {num_bits: 2, group_size: 32, symmetric: false}",
    "mixed": "quantize: mixed\n    with: {bits_per_weight: 4.5, num_bits: [2, 4, 8], group_size: 32}",
    "smoothquant": "quantize: smoothquant\n    with: {activations: static}",
    "fp8": "quantize: fp8",
    "sparse": "quantize: sparse_gptq\n    with: {group_size: 32, pattern: '2:4'}",
}
QAD_STEP = "distill: qad\n    with: {updates: 12, batch_sequences: 4, length_tokens: 32, learning_rate: 2.e-3}"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_trained_grid_is_the_same_grid(kind: str, place: Path, methods: Methods, tracking_uri: str) -> None:
    """Stock Transformers loads the result, and what it computes is what was measured while training."""
    from transformers import AutoModelForCausalLM

    fine = kind in ("smoothquant", "fp8")  # eight bits: little is lost, and a large step loses more
    step = QAD_STEP.replace("2.e-3", "1.e-4") if fine else QAD_STEP
    _, quantized, trained = run(place, methods, tracking_uri, QUANTIZED[kind], step)
    before, after = Checkpoint(quantized.path), Checkpoint(trained.path)
    assert after.schemes() == before.schemes()
    assert trained.manifest["invariants"].keys() == quantized.manifest["invariants"].keys()
    assert trained.manifest["invariants"]["grid"] == quantized.manifest["invariants"]["grid"]
    assert after.weight_bytes() == before.weight_bytes()
    assert trained.metrics["kl_after"] < trained.metrics["kl_before"]
    assert trained.metrics["layers_on_grid"] == len(before.schemes()) == 21
    config = {name: value for name, value in after.config.items() if name != "quantization_config"}
    assert config == {name: value for name, value in before.config.items() if name != "quantization_config"}
    assert after.config["quantization_config"] == before.config["quantization_config"]
    loaded = AutoModelForCausalLM.from_pretrained(trained.path, dtype=torch.float32)
    tokens_BT = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        expected_BTV, found_BTV = (model(tokens_BT).logits for model in (loaded, after.load(torch.float32)))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    if kind == "sparse":
        zeros = [artifact.manifest["invariants"]["zeros"] for artifact in (quantized, trained)]
        assert zeros[0]["pattern"] == zeros[1]["pattern"] == "2:4"


def test_zeros_of_a_grid_are_free_unless_they_were_pruned(place: Path, methods: Methods, tracking_uri: str) -> None:
    _, free = run(place, methods, tracking_uri, QUANTIZED["gptq"], QAD_STEP)[1:]
    *_, kept = run(place, methods, tracking_uri, "prune: wanda", QUANTIZED["gptq"], QAD_STEP)
    assert free.metrics["zeros_kept"] == 0
    assert kept.metrics["zeros_kept"] >= 0.5 * 21 * 64 * 32
    assert "zeros" not in free.manifest["invariants"]


def test_scales_stay_where_they_are_not_to_be_learned(place: Path, methods: Methods, tracking_uri: str) -> None:
    from safetensors.torch import load_file

    moving = QAD_STEP.replace("length_tokens", "examine_every: 1, length_tokens")
    fixed = moving.replace("updates", "learn_scales: false, updates").replace("2.e-3", "5.e-3")
    _, quantized, held = run(place, methods, tracking_uri, QUANTIZED["gptq asymmetric"], fixed)
    *_, moved = run(place, methods, tracking_uri, QUANTIZED["gptq asymmetric"], moving)
    states = [load_file(artifact.path / "model.safetensors") for artifact in (quantized, held, moved)]
    fixed_parts = [name for name in states[0] if name.endswith(("weight_scale", "weight_zero_point"))]
    scales = [name for name in fixed_parts if name.endswith("scale")]
    assert held.metrics["best_update"] > 0 < moved.metrics["best_update"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in fixed_parts)
    assert not any(torch.equal(states[0][name], states[2][name]) for name in scales)


@pytest.mark.parametrize("method", ["qat", "qad"])
def test_training_against_quantization_needs_a_grid(method: str, place: Path, methods: Methods) -> None:
    path = place / "dense.yaml"
    text = "{source: text.txt, sequences: 8, length_tokens: 32}"
    steps = f"  - calibrate: text\n    with: {text}\n  - prune: wanda\n  - distill: {method}"
    path.write_text(f"version: 1\nname: dense\nmodel: {{id: model}}\nsteps:\n{steps}\n", encoding="utf-8")
    with pytest.raises(SpecError, match=f"distill {method} .* has a grid already.*no step before it gives one"):
        make_plan(path, methods, place / "home")


@pytest.mark.parametrize("kind", ["gptq", "mixed", "smoothquant", "fp8"])
def test_layers_go_and_the_grid_of_the_others_stays(
    kind: str, place: Path, methods: Methods, tracking_uri: str
) -> None:
    from safetensors.torch import load_file

    depth = "prune: depth\n    with: {layers: 1, criterion: evenly}"
    _, quantized, shallow = run(place, methods, tracking_uri, QUANTIZED[kind], depth)
    before, after = (load_file(artifact.path / "model.safetensors") for artifact in (quantized, shallow))
    for name, tensor in after.items():  # of three layers the second goes
        origin = name.replace("layers.1.", "layers.2.")
        assert torch.equal(tensor.view(torch.uint8), before[origin].view(torch.uint8)), name
    assert len(Checkpoint(shallow.path).schemes()) == 14
    assert Checkpoint(shallow.path).config["num_hidden_layers"] == 2


def test_fused_experts_are_refused(place: Path, methods: Methods, tracking_uri: str) -> None:
    make_model(place / "mixture", "mixtral", layers=2)
    with pytest.raises(StepError, match="holds it together with others"):
        run(place, methods, tracking_uri, "quantize: rtn\n    with: {group_size: 32}", QAD_STEP, name="mixture")


def test_a_killed_training_on_a_grid_goes_on(
    place: Path, methods: Methods, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator_distillation import resuming

    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "_SHARE", 0.0)
    calibrated, quantized = run(place, methods, tracking_uri, QUANTIZED["gptq"])
    from orchestrator.api import CalibrationSet

    student, calibration = Checkpoint(quantized.path), CalibrationSet.load(calibrated.path)
    chosen = QAD(updates=6, length_tokens=32, learning_rate=2e-3)
    stops = [3]

    def stop(fraction: float, message: str) -> None:
        if stops and message.startswith(f"update {stops[0]} of"):
            stops.pop()
            raise KeyboardInterrupt

    def context(name: str, **more: Any) -> Context:
        (tmp_path / name).mkdir(exist_ok=True)
        return Context(
            0,
            Checkpoint(place / "model"),
            calibration,
            tmp_path / name,
            checkpoint=student,
            held=frozenset({Invariant.GRID}),
            state=tmp_path / name,
            **more,
        )

    expected = chosen.apply(student.load(), context("whole")).encodings
    with pytest.raises(KeyboardInterrupt):
        chosen.apply(student.load(), context("killed", progress=stop))
    found = chosen.apply(student.load(), context("killed")).encodings
    for name, code in expected.items():
        assert torch.equal(code.q_OI, found[name].q_OI)
        assert torch.equal(code.scale_OG, found[name].scale_OG)


def test_curves_are_metrics_with_a_history_in_mlflow(place: Path, methods: Methods, tracking_uri: str) -> None:
    import json

    from orchestrator.tracking import connect

    step = QAD_STEP.replace("12", "4")
    *_, trained = run(place, methods, tracking_uri, QUANTIZED["gptq"], step)
    curves = json.loads((trained.path / "curves.json").read_text(encoding="utf-8"))
    assert [update for update, _ in curves["held_out_loss"]] == [0, 1, 2, 3, 4]
    client = connect(tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"tags.`orchestrator.artifact` = '{trained.digest}'"
    recorded = client.search_runs(experiments, filter_string=wanted)[0].info.run_id
    for name in ("held_out_loss", "train_loss", "gradient_norm"):
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(recorded, name))
        assert history == [(update, pytest.approx(value)) for update, value in curves[name]]
