"""Loading whole models, and access to a model block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError
from orchestrator.model import load_model, load_tokenizer
from orchestrator.skeleton import Skeleton
from tests.tiny import ARCHITECTURES, edit_config, make_model, make_tokens


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_model_gives_the_logits_of_stock_transformers(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    make_model(tmp_path, architecture)
    tokens = make_tokens(2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_model(Checkpoint(tmp_path), torch.bfloat16)
    assert not ours.training
    assert ours.dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, ours(tokens).logits)


def test_loading_writes_nothing_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path)
    capfd.readouterr()
    load_model(Checkpoint(tmp_path), torch.float32)
    load_tokenizer(Checkpoint(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    make_model(tmp_path)
    tokenizer = load_tokenizer(Checkpoint(tmp_path))
    text = "the quick brown fox"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_folder_without_tokenizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    make_model(tmp_path, tokenizer=False)
    with pytest.raises(PreflightError, match=r"no tokenizer.*copy tokenizer\.json"):
        load_tokenizer(Checkpoint(tmp_path))


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    make_model(tmp_path)
    edit_config(tmp_path, model_type="llamma", architectures=None)
    with pytest.raises(PreflightError, match="'llamma'"):
        load_model(Checkpoint(tmp_path), torch.float32)


def test_missing_tensor_is_refused_instead_of_filled_with_random_numbers(tmp_path: Path) -> None:
    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(Checkpoint(tmp_path), torch.float32)
    with pytest.raises(PreflightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Skeleton(Checkpoint(tmp_path))


def test_misshapen_tensor_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    edit_config(tmp_path, intermediate_size=96)
    with pytest.raises(PreflightError, match=r"does not fit its config\.json|cannot be loaded"):
        load_model(Checkpoint(tmp_path), torch.float32)
    with pytest.raises(PreflightError, match=r"down_proj\.weight has shape \(64, 128\), but .* \(64, 96\)"):
        Skeleton(Checkpoint(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(PreflightError, match="pickle"):
        load_model(Checkpoint(tmp_path), torch.float32)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(PreflightError, match="auto_map"):
        load_model(Checkpoint(tmp_path), torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_skeleton_run_block_by_block_gives_the_hidden_states_of_the_whole_model(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    make_model(tmp_path, architecture, tied=tied)
    checkpoint = Checkpoint(tmp_path)
    tokens = make_tokens(2)
    skeleton = Skeleton(checkpoint)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    whole = load_model(checkpoint, torch.float32)
    with torch.no_grad():
        expected = whole(tokens, output_hidden_states=True).hidden_states
        skeleton.load("model.embed_tokens")
        hidden, arguments = skeleton.capture(tokens, skeleton.model.get_input_embeddings())
        skeleton.release("model.embed_tokens")
        for index, block in enumerate(skeleton.blocks):
            assert torch.equal(hidden, expected[index])
            skeleton.load(block.name)
            hidden = block.module(hidden, **arguments[index])
            skeleton.release(block.name)
        assert torch.allclose(whole.model.norm(hidden), expected[-1], atol=1e-6)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_blocks_have_the_masks_of_their_layer_type(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    skeleton = Skeleton(Checkpoint(tmp_path))
    skeleton.load("model.embed_tokens")
    _, arguments = skeleton.capture(make_tokens(1), skeleton.model.get_input_embeddings())
    assert arguments[0]["attention_mask"] is None  # full causal attention needs no mask
    assert arguments[2]["attention_mask"].sum(-1).max() == 8  # a window of 8 tokens


def test_sharded_checkpoint_is_read_across_its_files(tmp_path: Path) -> None:
    make_model(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "two" / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / "two" / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    skeletons = [Skeleton(Checkpoint(tmp_path / name)) for name in ("one", "two")]
    for skeleton in skeletons:
        skeleton.load("model.layers.1")
    one, two = (skeleton.model.get_submodule("model.layers.1").state_dict() for skeleton in skeletons)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
