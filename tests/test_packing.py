"""Packed integers: they decode to what went in, here and in compressed-tensors itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError
from orchestrator.packing import check_scheme, pack, pack_integers, packed_specs, unpack, unpack_integers
from orchestrator.quantized import quantization_config, read_groups
from orchestrator.scheme import InputScheme, QuantizedWeight, QuantScheme
from tests.layer_methods import round_weight
from tests.tiny import edit_config, make_model


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [43, None])
def test_integers_survive_packing_and_compressed_tensors_decodes_the_same_weight(
    num_bits: int, symmetric: bool, group_size: int | None
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantScheme(
        num_bits=num_bits,
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    weight_OI = torch.randn(37, 172, generator=torch.Generator().manual_seed(num_bits))
    encoding = round_weight(weight_OI, scheme, torch.bfloat16)
    assert encoding.q_OI.min() == scheme.quant_min or symmetric
    stored = pack(encoding)
    assert stored["weight_packed"].dtype is torch.int32
    assert stored["weight_packed"].shape == (37, -(-172 * num_bits // 32))
    decoded = unpack({f"x.{name}": tensor for name, tensor in stored.items()}.__getitem__, "x", scheme)
    assert torch.equal(decoded.q_OI, encoding.q_OI)
    assert torch.equal(decoded.scale_OG, encoding.scale_OG)
    if not symmetric:
        assert encoding.zero_point_OG is not None and decoded.zero_point_OG is not None
        assert torch.equal(decoded.zero_point_OG, encoding.zero_point_OG)
    config = QuantizationConfig(**quantization_config({"x": scheme}, ["lm_head"]))
    theirs = BaseCompressor.get_value_from_registry(config.format).decompress(stored, config.config_groups["group_0"])
    assert torch.equal(theirs["weight"], encoding.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [
        (QuantScheme(num_bits=1), "num_bits: 1 "),
        (QuantScheme(num_bits=9), "num_bits: 9 "),
        (QuantScheme(num_bits=4, group_size=None), "group_size: None "),
        (QuantScheme(num_bits=4, strategy="channel", group_size=64), "group_size: 64 "),
    ],
)
def test_a_scheme_the_layout_cannot_carry_is_named(scheme: QuantScheme, fault: str) -> None:
    told = check_scheme(scheme)
    assert told is not None and told.startswith(fault)


def test_a_scheme_the_layout_can_carry_is_read_back_from_config_json() -> None:
    for scheme in (
        QuantScheme(num_bits=4, actorder="static"),
        QuantScheme(num_bits=3, symmetric=False, strategy="channel", group_size=None),
        *EIGHT_BITS,
    ):
        assert check_scheme(scheme) is None
        assert read_groups({"quantization_config": quantization_config({"x": scheme}, [])}) == [(["Linear"], scheme)]


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": {"weights": {}}}},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}},
        },
    ],
)
def test_other_quantizations_are_refused_not_misread(entry: dict[str, object], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    edit_config(folder, quantization_config=entry)
    with pytest.raises(PreflightError, match=r"does not read.*before quantization"):
        Checkpoint(folder).schemes()


def test_layers_that_two_groups_claim_are_refused(tmp_path: Path) -> None:
    names = {f"model.layers.{i}.mlp.up_proj": QuantScheme(num_bits=3 + i, group_size=32) for i in range(2)}
    entry = quantization_config(names, ["lm_head"])
    assert [targets for targets, _ in read_groups({"quantization_config": entry}) or ()] == [[name] for name in names]
    folder = make_model(tmp_path / "model")
    tensors = {f"{name}.weight_scale": torch.ones(1) for name in names}
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors")
    edit_config(folder, quantization_config=entry)
    assert Checkpoint(folder).schemes() == names
    entry["config_groups"]["group_0"]["targets"].append(r"re:.*layers\.1\..*")
    edit_config(folder, quantization_config=entry)
    with pytest.raises(PreflightError, match="does not read"):
        Checkpoint(folder).schemes()


STATIC = InputScheme(strategy="tensor", dynamic=False)
EIGHT_BITS = tuple(
    QuantScheme(num_bits=8, type=kind, strategy="channel", group_size=None, input_activations=inputs)
    for kind, inputs in (
        ("int", InputScheme()),
        ("int", STATIC),
        ("float", InputScheme(type="float")),
        ("float", InputScheme(type="float", strategy="tensor", dynamic=False)),
        ("float", None),
    )
)


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda s: f"{s.type}-{s.input_activations}")
def test_eight_bit_weights_are_stored_as_they_are_and_inputs_rounded_as_compressed_tensors_does(
    scheme: QuantScheme,
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    generator = torch.Generator().manual_seed(0)
    scale_O1 = (0.1 + torch.rand(5, 1, generator=generator)).bfloat16()
    if scheme.type == "float":
        q_OI = (200 * torch.randn(5, 12, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        q_OI = torch.randint(-128, 128, (5, 12), generator=generator, dtype=torch.int8)
    inputs = scheme.input_activations
    static = inputs is not None and not inputs.dynamic
    encoding = QuantizedWeight(q_OI, scale_O1, None, scheme, torch.tensor([0.02]) if static else None)
    stored = pack(encoding)
    announced = packed_specs(5, 12, scheme)
    assert {n: tuple(t.shape) for n, t in stored.items()} == {n: shape for n, (_, shape) in announced.items()}
    decoded = unpack({f"x.{name}": tensor for name, tensor in stored.items()}.__getitem__, "x", scheme)
    assert torch.equal(decoded.dequantize(torch.bfloat16), encoding.dequantize(torch.bfloat16))
    config = QuantizationConfig(**quantization_config({"x": scheme}, ["lm_head"]))
    group = config.config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry(config.format).decompress(stored, group)
    assert torch.equal(theirs["weight"], encoding.dequantize(torch.bfloat16))
    if inputs is not None:
        x_BTI = 3 * torch.randn(2, 3, 12, generator=generator)
        args = group.input_activations
        zero = torch.zeros(1)
        scale, zero = (encoding.input_scale_1, zero) if static else compute_dynamic_scales_and_zp(x_BTI, args, None)
        expected = fake_quantize(x_BTI, scale, zero, args)
        assert torch.equal(inputs.fake_quantize(x_BTI, encoding.input_scale_1), expected)
        assert not torch.equal(expected, x_BTI)


def test_eight_bits_of_other_forms_are_refused() -> None:
    token = InputScheme()
    for scheme in (
        QuantScheme(num_bits=4, strategy="channel", group_size=None, input_activations=token),
        QuantScheme(num_bits=8, group_size=32, input_activations=token),
        QuantScheme(num_bits=8, type="float", strategy="channel", group_size=None, input_activations=token),
    ):
        assert check_scheme(scheme) is not None


def test_planning_modules_import_no_torch() -> None:
    code = (
        "import sys, orchestrator.layers, orchestrator.packing, orchestrator.export, orchestrator.invariants,"
        " orchestrator.walk, orchestrator.skeleton, orchestrator.model;"
        " sys.exit(bool({'torch', 'transformers', 'compressed_tensors'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (128, 37), (1, 1)])
def test_the_packed_words_are_those_of_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    q_RC = torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    packed_RW = pack_integers(q_RC, bits)
    assert torch.equal(packed_RW, pack_to_int32(q_RC, bits))
    assert torch.equal(pack_integers(q_RC.T, bits).T, pack_to_int32(q_RC, bits, packed_dim=0))
    assert torch.equal(unpack_integers(packed_RW, bits, shape[1]), q_RC)
