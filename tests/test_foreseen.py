"""Planning knows the shapes that a step will make: later steps are held against them, and sizes follow from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator import foreseen as foreseen_module
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError, PreflightError, SpecError, StepError
from orchestrator.export import save_model
from orchestrator.foreseen import ask, check_foreseen, foresee_model, shapes_of, with_blocks
from orchestrator.home import Settings
from orchestrator.method import ModelMethod, ModelResult, Stage
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import InstalledMethod, Origin, check_class, discover
from orchestrator.preflight import foresee
from orchestrator.run import run_locally
from orchestrator_pruning.depth import Depth
from orchestrator_pruning.llm_pruner import LLMPruner
from tests.test_run import Watcher
from tests.tiny import edit_config, make_model

CALIBRATE = {"calibrate": "text", "with": {"source": "text.txt", "sequences": 8, "length_tokens": 32}}
PRUNE = {"ratio": 0.5, "round_to": 32, "importance": "l2", "lora_rank": 0}  # of 4 heads, 2 KV heads and 128 channels


def spec(folder: Path, *steps: Mapping[str, Any], **model: Any) -> Path:
    """A specification of these steps beside a model and some text."""
    if not (folder / "model").exists():
        make_model(folder / "model", **model)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    content = {"version": 1, "name": "foreseen", "model": {"id": "model"}, "steps": [CALIBRATE, *steps]}
    (folder / "spec.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "spec.yaml"


def plan_of(path: Path) -> Plan:
    return make_plan(path, discover(), path.parent / "home")


def prune(**changes: Any) -> dict[str, Any]:
    return {"prune": "llm_pruner", "with": {**PRUNE, **changes}}


def quantize(group_size: int) -> dict[str, Any]:
    return {"quantize": "rtn", "with": {"group_size": group_size}}


# Later steps are held against the shapes to come.


def test_a_group_size_that_only_the_old_widths_fill_is_refused(tmp_path: Path) -> None:
    path = spec(tmp_path, prune(ratio=0.4, round_to=8, attention=False), quantize(32))
    with pytest.raises(SpecError, match=r"32 does not divide in_features 80 of model\.layers\.0\.mlp\.down_proj") as e:
        plan_of(path)
    assert "steps[2].with.group_size" in str(e.value)


def test_a_group_size_that_only_the_new_widths_fill_is_accepted_and_runs(tmp_path: Path, tracking_uri: str) -> None:
    steps = (prune(ratio=0.55, attention=False), quantize(64))
    with pytest.raises(SpecError, match="64 does not divide in_features 144"):
        plan_of(spec(tmp_path, quantize(64), intermediate_size=144))
    path = spec(tmp_path, *steps)
    plan = plan_of(path)
    assert plan.steps[2].reads.config["intermediate_size"] == 64
    document = run_locally(path, discover(), Settings(tmp_path / "home", tracking_uri), Watcher()).document()
    quantized = Checkpoint(Path(document["steps"][2]["artifact"]["path"]))
    assert quantized.config["intermediate_size"] == 64 and quantized.is_quantized


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt"])
def test_foreseen_shapes_and_bytes_are_those_of_the_artifact(
    architecture: str, tmp_path: Path, tracking_uri: str
) -> None:
    attention = architecture not in ("gpt_neox", "opt")
    removing = {"prune": "depth", "with": {"layers": 1}}
    path = spec(tmp_path, prune(attention=attention), removing, architecture=architecture)
    plan = plan_of(path)
    estimates = foresee(plan, tmp_path / "home", [None] * 3)
    document = run_locally(path, discover(), Settings(tmp_path / "home", tracking_uri), Watcher()).document()
    for index in (1, 2):
        made = Checkpoint(Path(document["steps"][index]["artifact"]["path"]))
        assert shapes_of(made) == shapes_of(plan.steps[index].gives)
        # All that is not foreseen are some entries of config.json.
        assert document["steps"][index]["disk_bytes"] == pytest.approx(estimates[index].disk_bytes, abs=2048)
    assert plan.steps[1].reads is plan.source


def test_what_comes_later_is_reckoned_with_the_smaller_model(tmp_path: Path) -> None:
    later = {"distill": "logits", "with": {"batch_sequences": 1, "length_tokens": 32}}
    path = spec(tmp_path, later, prune(), later)
    before, _, after = foresee(plan_of(path), tmp_path / "home", [None] * 4)[1:]
    assert after.work.operations < before.work.operations
    assert after.work.memory_bytes < before.work.memory_bytes


def test_an_engine_that_only_the_smaller_cache_fits_is_accepted(tmp_path: Path) -> None:
    """16 tokens of 3 layers take 16 * 2 * 3 * 16 * 2 bytes for each KV head; there are 2, and 1 after pruning.

    vLLM keeps one block for itself, so that two blocks are the least.
    """
    gib = 3 * 16 * 2 * 3 * 16 * 2 / 2**30
    memory = {"gpu_memory_gib": gib, "memory_utilization": 1.0, "activation_gib": 0, "max_model_len": 16}
    register = {"register": "release", "engines": [{"vllm": memory}]}
    assert plan_of(spec(tmp_path, prune(), register)).steps[-1].engines
    with pytest.raises(PreflightError, match="not one sequence of 16 tokens fits"):
        plan_of(spec(tmp_path, register))


# What the step would refuse is refused before it.


def of_olmo(folder: Path) -> None:
    """Norms over all heads tie the heads together."""
    of_stock(folder, "olmo2")


def of_minicpm(folder: Path) -> None:
    """Latent attention: layers that read what other layers put out, and are read by a third."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    of_stock(folder, "minicpm3", num_key_value_heads=4, **latent)


def of_stock(folder: Path, architecture: str, **more: Any) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(architecture, **sizes, num_attention_heads=4, **more)
    source = Checkpoint(make_model(folder / "llama", layers=2))
    save_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), source, folder / "model")
    edit_config(folder / "model", **config.to_dict())


def of(architecture: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: make_model(folder / "model", architecture, **changes)


REFUSED = [
    (of("llama"), {"ratio": 0.9}, "ratio 0.9 of 2 KV groups of a block leaves none", "attention: false"),
    (of("llama"), {"ratio": 0.1}, "ratio 0.1 of 2 KV groups of a block removes none", "attention: false"),
    (of("llama"), {"round_to": 512}, "of 128 MLP channels .* multiple of 512, leaves none", "round_to"),
    (of("llama", kv_heads=4), {"ratio": 0.25}, "cannot say num_attention_heads 3", "leaves 1 or 2 of 4 KV groups"),
    (of("mixtral"), {}, "'mixtral' is a mixture of experts", "use a dense model"),
    (of("qwen2_moe"), {}, "'qwen2_moe' is a mixture of experts", "use a dense model"),
    (of("gpt2"), {}, "of a 'gpt2' model gives no num_attention_heads", "attention: false"),
    (of("gpt2"), {"attention": False}, "of a 'gpt2' model gives no intermediate_size", "use a dense model"),
    (of("gpt_neox"), {"mlp": False}, r"query_key_value|tracing found", "attention: false"),
    (of_minicpm, {}, r"model\.layers\.0\.self_attn\.\w+ fits into no group", "use a dense model"),
    (of_olmo, {}, r"found 1 groups around self_attn\.o_proj", "attention: false"),
]


@pytest.mark.parametrize(("model", "changes", "said", "remedy"), REFUSED)
def test_a_model_that_cannot_be_pruned_is_refused_while_planning(
    model: Callable[[Path], object], changes: dict[str, Any], said: str, remedy: str, tmp_path: Path
) -> None:
    model(tmp_path)
    path = spec(tmp_path, prune(**changes))
    with pytest.raises(PreflightError, match=said) as caught:
        plan_of(path)
    (problem,) = caught.value.problems
    assert remedy in str(problem.remedy)
    assert str(problem.where).endswith("steps[1].prune")


def test_layers_bound_to_their_places_are_refused_while_planning(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "gpt2")
    edit_config(tmp_path / "model", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PreflightError, match="scaling of attn") as caught:
        plan_of(spec(tmp_path, {"prune": "depth", "with": {"layers": 1}}))
    assert str(caught.value.problems[0].where).endswith("steps[1].prune")


# The process that is asked.


def test_the_process_gives_the_answer_that_is_found_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    here = plan_of(spec(tmp_path, prune()))
    (tmp_path / "home" / "foreseen.json").unlink()
    monkeypatch.setattr(foreseen_module, "has_torch", lambda: False)
    monkeypatch.setattr(foreseen_module, "ask", lambda *arguments: pytest.fail("asked in this process"))
    there = plan_of(tmp_path / "spec.yaml")
    for one, other in zip(here.steps, there.steps, strict=True):
        assert shapes_of(one.gives) == shapes_of(other.gives)
    monkeypatch.setattr(foreseen_module, "_ask_apart", lambda question: pytest.fail("asked again"))
    assert plan_of(tmp_path / "spec.yaml").steps[1].gives.config["num_key_value_heads"] == 1


def test_plan_refuses_with_its_exit_code_and_imports_no_torch(tmp_path: Path) -> None:
    make_model(tmp_path / "model", kv_heads=4)
    path = spec(tmp_path, prune(ratio=0.25))
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from orchestrator.errors import OrchestratorError\n"
        "from orchestrator.plan import make_plan\n"
        "from orchestrator.plugins import discover\n"
        "try:\n"
        f"    make_plan(Path({str(path)!r}), discover(), Path({str(tmp_path / 'home')!r}))\n"
        "except OrchestratorError as error:\n"
        "    print(error.exit_code, error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.startswith("3 ") and done.stdout.endswith("False\n"), done.stderr
    assert "leaves 1 or 2 of 4 KV groups" in done.stdout


# Planning is never quietly wrong.


class Widens(ModelMethod):
    """Says of itself what it does not do."""

    stage: ClassVar[Stage] = Stage.DISTILL
    name: ClassVar[str] = "widens"
    paper: ClassVar[str] = "none: it does nothing"

    def config_after(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**config, "intermediate_size": 96}

    def apply(self, model: Any, context: Any) -> ModelResult:
        return ModelResult(model)


def test_a_result_of_other_shapes_than_planned_fails_its_step(tmp_path: Path, tracking_uri: str) -> None:
    methods = discover()
    methods.add([InstalledMethod(check_class(Widens), Origin("widens", "widens-plugin", "0.1"))])
    path = spec(tmp_path, {"distill": "widens"})
    with pytest.raises(StepError, match=r"model\.layers\.0\.mlp\.down_proj is .*128.* `config_after` means .*96"):
        run_locally(path, methods, Settings(tmp_path / "home", tracking_uri), Watcher())


def test_any_blocks_may_go_and_are_compared_as_those_they_were(tmp_path: Path) -> None:
    """Of a model whose blocks differ planning cannot know which shapes will be left."""
    source = Checkpoint(make_model(tmp_path / "model", "qwen2_moe", tokenizer=False))
    method = Depth(layers=1)
    foreseen = foresee_model(method, source, lambda config: ask(method, source, config))
    first_dense, experts = with_blocks(source, (0, 1)), with_blocks(source, (1, 2))
    assert shapes_of(foreseen) == shapes_of(experts) != shapes_of(first_dense)  # the larger ones
    check_foreseen(foreseen, first_dense, (0, 1))
    with pytest.raises(StepError, match=r"is .* means"):
        check_foreseen(foreseen, first_dense, (1, 2))


def test_errors_of_the_specification_stay_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process raises keeps its kind, and a method's own failure names its distribution."""
    monkeypatch.setattr(foreseen_module, "has_torch", lambda: False)
    path = spec(tmp_path, prune())
    for kind, expected in (("spec", SpecError), ("fault", SpecError), ("model", PreflightError)):
        answer = json.dumps({"kind": kind, "problems": [{"what": "no", "where": None, "remedy": None}]})
        done = subprocess.CompletedProcess([], 1, stdout=answer, stderr="")
        monkeypatch.setattr(foreseen_module.subprocess, "run", lambda *a, done=done, **k: done)
        with pytest.raises(OrchestratorError, match="no") as caught:
            plan_of(path)
        assert type(caught.value) is expected


def test_counts_that_follow_from_the_class_are_those_of_tracing(tmp_path: Path) -> None:
    """Older files leave out what follows from other entries."""
    folder = make_model(tmp_path / "model", tokenizer=False, kv_heads=4)
    edit_config(folder, head_dim=None, num_key_value_heads=None)
    source, method = Checkpoint(folder), LLMPruner(**PRUNE)
    shapes = shapes_of(foresee_model(method, source, lambda config: ask(method, source, config)))
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 32)
