"""Packed integers: they decode to what went in, here and in compressed-tensors itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from orchestrator.errors import PreflightError
from orchestrator.packing import (
    check_scheme,
    pack,
    pack_integers,
    quantization_config,
    read_scheme,
    unpack,
    unpack_integers,
)
from orchestrator.scheme import QuantScheme
from tests.layer_methods import round_weight


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
    config = QuantizationConfig(**quantization_config(scheme, ["lm_head"]))
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
    ):
        assert check_scheme(scheme) is None
        assert read_scheme({"quantization_config": quantization_config(scheme, [])}) == scheme


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
def test_other_quantizations_are_refused_not_misread(entry: dict[str, object]) -> None:
    with pytest.raises(PreflightError, match=r"does not read.*before quantization"):
        read_scheme({"quantization_config": entry})


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
