"""The written folder: what stock Transformers makes of it, in a process that never imports this project."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import StepError
from orchestrator.export import ModelWriter, save_model
from orchestrator.reader import TensorReader
from orchestrator.shards import Shards
from orchestrator.walk import walk
from orchestrator_quantization import FP8, SmoothQuant
from tests.layer_methods import KeepLarge, Round, round_weight
from tests.tiny import ARCHITECTURES, edit_config, make_model, make_tokens

_STOCK_LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokens = load_file(sys.argv[1])["tokens"]
for folder, out in zip(sys.argv[2::2], sys.argv[3::2]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, out)
    AutoTokenizer.from_pretrained(folder)
assert not any(name.startswith("orchestrator") for name in sys.modules)
"""


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _stock_logits(folders: list[Path], tokens: torch.Tensor, scratch: Path) -> list[torch.Tensor]:
    """Logits of stock Transformers in a fresh process, in the dtype that config.json names."""
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    pairs = [(str(folder), str(scratch / f"logits-{index}")) for index, folder in enumerate(folders)]
    arguments = [str(scratch / "tokens.safetensors"), *(path for pair in pairs for path in pair)]
    subprocess.run([sys.executable, "-I", "-c", _STOCK_LOGITS, *arguments], check=True)
    return [load_file(out)["logits"] for _, out in pairs]


def _quantize(checkpoint: Checkpoint, folder: Path, method: Round, skip: tuple[str, ...] = ()) -> Checkpoint:
    writer = ModelWriter(checkpoint, folder, scheme=method.scheme(), skip=skip)
    walk(checkpoint, method, None, writer, skip=skip)
    writer.finish()
    return Checkpoint(folder)


def _prune(checkpoint: Checkpoint, folder: Path, **options: int) -> Checkpoint:
    writer = ModelWriter(checkpoint, folder, **options)
    walk(checkpoint, KeepLarge(), None, writer)
    writer.finish()
    return Checkpoint(folder)


def _dequantized_by_hand(checkpoint: Checkpoint, method: Round, skipped: str = "none") -> Any:
    """The dense model with its weights rounded in process."""
    model = checkpoint.load()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name and skipped not in name:
            encoding = round_weight(module.weight.data, method.scheme(), getattr(torch, method.scale_dtype))
            module.weight.data = encoding.dequantize(model.dtype)
    return model


def test_stock_transformers_computes_what_the_pipeline_computed(tmp_path: Path) -> None:
    cases = [
        ("llama", torch.bfloat16, True, Round(), ()),
        ("qwen2", torch.bfloat16, False, Round(num_bits=8, group_size=None), ()),
        ("qwen3", torch.bfloat16, False, Round(num_bits=3, symmetric=False), ("down_proj",)),
        ("mistral", torch.float32, True, Round(num_bits=5, symmetric=False, scale_dtype="float32"), ()),
        ("llama", torch.float32, False, Round(num_bits=2, group_size=16), ("o_proj",)),
    ]
    tokens = make_tokens(2)
    folders, expected = [], []
    for index, (architecture, dtype, tied, method, skip) in enumerate(cases):
        checkpoint = Checkpoint(make_model(tmp_path / f"m{index}", architecture, dtype=dtype, tied=tied))
        result = _quantize(checkpoint, tmp_path / f"q{index}", method, skip)
        by_hand = _dequantized_by_hand(checkpoint, method, *skip)
        with torch.no_grad():
            expected.append(by_hand(tokens).logits)
            ours = result.load()
            assert torch.equal(ours(tokens).logits, expected[-1])
            assert not torch.equal(checkpoint.load()(tokens).logits, expected[-1])
            # In another dtype the weights are still the decoded ones.
            wide = result.load(torch.float32).get_submodule("model.layers.0.self_attn.q_proj").weight
            assert torch.equal(wide, by_hand.get_submodule("model.layers.0.self_attn.q_proj").weight.float())
        folders.append(result.path)
    pruned = _prune(Checkpoint(tmp_path / "m0"), tmp_path / "pruned")
    with torch.no_grad():
        expected.append(pruned.load()(tokens).logits)
    for index, logits in enumerate(_stock_logits([*folders, pruned.path], tokens, tmp_path)):
        assert torch.equal(logits, expected[index]), index


def test_quantized_folder_holds_packed_layers_dense_skipped_ones_and_all_companions(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    result = _quantize(checkpoint, tmp_path / "q", Round(symmetric=False), ("layers.1.*", "down_proj"))
    stored = result.tensors
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == "I32"
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].shape == (128, 8)
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (128, 2)
    assert stored["model.layers.0.mlp.up_proj.weight_zero_point"].shape == (16, 2)
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == "BF16"
    entry = result.config["quantization_config"]
    assert entry["ignore"] == sorted(entry["ignore"]) and "lm_head" in entry["ignore"]
    assert len(entry["ignore"]) == 1 + 7 + 2
    assert result.companion_files() == checkpoint.companion_files()
    for name in checkpoint.companion_files():
        assert filecmp.cmp(checkpoint.path / name, result.path / name, shallow=False)
    assert result.weight_bytes() < 0.75 * checkpoint.weight_bytes()


def test_pruned_folder_is_dense(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", tied=True))
    result = _prune(checkpoint, tmp_path / "out")
    assert result.config == checkpoint.config
    assert result.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in load_file(result.path / "model.safetensors").items():
        assert ((tensor == 0).float().mean() == 0.5) == ("proj" in name)


def test_shards_are_cut_by_size_and_load_as_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    for name, limit in (("one", 10**9), ("many", 60_000), ("again", 60_000)):
        _prune(checkpoint, tmp_path / name, max_shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "many" / file).stat().st_size < 64_000 for file in files)
    assert not list((tmp_path / "many").glob(".*"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    split = {name: t for file in files for name, t in load_file(tmp_path / "many" / file).items()}
    assert whole.keys() == split.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert filecmp.cmpfiles(tmp_path / "many", tmp_path / "again", names, shallow=False) == (names, [], [])


def test_weight_files_carry_one_metadata_key_so_that_their_bytes_repeat(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    result = _quantize(checkpoint, tmp_path / "q", Round())
    with safe_open(result.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_requested_dtype_reaches_every_tensor_and_config_json(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32), dtype="bfloat16")
    result = _prune(checkpoint, tmp_path / "out")
    assert {info.dtype for info in result.tensors.values()} == {"BF16"}
    assert result.config["dtype"] == "bfloat16"


def test_a_layer_that_is_missing_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    scheme = Round().scheme()
    writer = ModelWriter(checkpoint, tmp_path / "a", scheme=scheme, skip=["down_proj"])
    with pytest.raises(StepError, match="was not quantized"):
        writer.finish()
    encoding = round_weight(torch.randn(64, 64), Round(num_bits=8).scheme(), torch.bfloat16)
    with pytest.raises(StepError, match="up_proj is quantized as"):
        writer.add_quantized("model.layers.0.mlp.up_proj", encoding)
    encoding = round_weight(torch.randn(64, 64), scheme, torch.bfloat16)
    with pytest.raises(StepError, match="down_proj is quantized, although"):
        writer.add_quantized("model.layers.0.mlp.down_proj", encoding)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_is_the_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture, tied=tied))
    model = checkpoint.load(torch.float32)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data.mul_(1.5)
    save_model(model, checkpoint, tmp_path / "out")
    result = Checkpoint(tmp_path / "out")
    assert result.tensors.keys() == checkpoint.tensors.keys()
    assert ("lm_head.weight" in result.tensors) is not tied
    assert {info.dtype for info in result.tensors.values()} == {"BF16"}
    tokens = make_tokens(2)
    with torch.no_grad():
        for parameter in model.parameters():  # not model.to(), which would round the rotary tables too
            parameter.data = parameter.data.bfloat16().float()
        assert torch.equal(result.load(torch.float32)(tokens).logits, model(tokens).logits)
    changed = {k for k in result.config if result.config[k] != checkpoint.config.get(k)}
    assert changed == set()


def test_saved_model_keeps_what_the_method_changed_in_the_configuration(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=3))
    model = checkpoint.load()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    save_model(model, checkpoint, tmp_path / "out")
    result = Checkpoint(tmp_path / "out")
    assert result.config["num_hidden_layers"] == 2
    tokens = make_tokens(2)
    with torch.no_grad():
        assert torch.equal(result.load()(tokens).logits, model(tokens).logits)


def test_model_with_not_finite_weights_is_not_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    model = checkpoint.load(torch.float32)
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds numbers"):
        save_model(model, checkpoint, tmp_path / "out")


def test_the_old_name_of_dtype_is_replaced(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    edit_config(tmp_path / "model", torch_dtype="float32", dtype=None)
    checkpoint = Checkpoint(tmp_path / "model")
    ModelWriter(checkpoint, tmp_path / "out").finish()
    config = Checkpoint(tmp_path / "out").config
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_threads_that_begin_at_once_find_the_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are made when the first tensor comes; a second one that comes meanwhile has to wait for them."""
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=2))
    making = threading.Event()
    real = Shards.create

    def slow(shards: Shards) -> None:
        making.set()
        time.sleep(0.2)
        real(shards)

    monkeypatch.setattr(Shards, "create", slow)
    writer = ModelWriter(checkpoint, tmp_path / "out")
    names = [f"{layer.name}.weight" for layer in checkpoint.block_layers()][:2]
    with TensorReader(checkpoint) as read, ThreadPoolExecutor(2) as pool:
        first = pool.submit(writer.add, names[0], read(names[0]))
        assert making.wait(30)
        second = pool.submit(writer.add, names[1], read(names[1]))
        assert first.result(30) != second.result(30)
    writer.close()


def test_stock_transformers_quantizes_the_inputs_that_the_pipeline_quantized(tmp_path: Path) -> None:
    cases = [
        ("llama", torch.float32, FP8()),
        ("qwen2", torch.float32, SmoothQuant()),
        ("mistral", torch.float32, SmoothQuant(activations="static")),
    ]
    tokens = make_tokens(2)
    results = []
    for index, (architecture, dtype, method) in enumerate(cases):
        checkpoint = Checkpoint(make_model(tmp_path / f"m{index}", architecture, dtype=dtype))
        planned = method.for_dtype(checkpoint.dtype_name)
        writer = ModelWriter(checkpoint, tmp_path / f"q{index}", scheme=planned.scheme())
        walk(checkpoint, planned, CalibrationSet(make_tokens(3), {}), writer)
        writer.finish()
        results.append(Checkpoint(writer.folder))
    stock = _stock_logits([result.path for result in results], tokens, tmp_path)
    for result, logits in zip(results, stock, strict=True):
        model = result.load()
        with torch.no_grad():
            quantized = model(tokens).logits
            for module in model.modules():
                module._forward_pre_hooks.clear()
            weights_only = model(tokens).logits
        # Exactly: in float32 a token's scale is computed as compressed-tensors does. In bfloat16 theirs is rounded.
        assert torch.equal(quantized, logits)
        assert not torch.allclose(weights_only, logits, atol=0.01 * float(logits.abs().max()), rtol=0)
        read = TensorReader(result)
        layer = "model.layers.1.mlp.down_proj"
        assert read(f"{layer}.weight").dtype in (torch.int8, torch.float8_e4m3fn)
        inputs = result.schemes()[layer].input_activations
        assert inputs is not None and (f"{layer}.input_scale" in result.tensors) != inputs.dynamic
        read.close()
