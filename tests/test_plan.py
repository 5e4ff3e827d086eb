"""Planning: everything a user can get wrong is found here, and fingerprints change exactly when results may."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.artifact import ArtifactStore
from orchestrator.checkpoint import LayerShape
from orchestrator.errors import OrchestratorError, PreflightError, SpecError
from orchestrator.layer_method import LayerMethod, LayerResult, Needs
from orchestrator.method import ModelMethod, ModelResult, Stage
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import InstalledMethod, Methods, Origin, check_class, discover
from orchestrator.scheme import QuantScheme
from orchestrator.serving_engine import ServingEngine
from orchestrator.status import statuses
from tests.tiny import ARCHITECTURES, edit_config, make_model

CHAIN = """\
version: 1
name: chain
model: {id: model}
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 4, length_tokens: 16}
  - prune: wanda
    with: {sparsity: 0.5}
  - quantize: gptq
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: valid.txt, length_tokens: 16}
    require: {perplexity_ratio: {max: 2}}
  - register: release
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 32}}]
"""


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture
def planner(tmp_path: Path, model: Path, methods: Methods) -> Callable[[str], Plan]:
    """A function that plans a specification beside a copy of the model and some text."""
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("some words to read. " * 200, encoding="utf-8")
    (tmp_path / "valid.txt").write_text("more words, held out. " * 200, encoding="utf-8")

    def plan(text: str) -> Plan:
        (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
        return make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home")

    return plan


def refused(plan: Callable[[str], Plan], text: str, kind: type[OrchestratorError] = SpecError) -> str:
    with pytest.raises(kind) as caught:
        plan(text)
    assert type(caught.value) is kind
    return str(caught.value)


def fingerprints(plan: Plan) -> list[str]:
    return [step.fingerprint for step in plan.steps]


def test_planning_twice_gives_the_same_fingerprints_and_writes_nothing(
    planner: Callable[[str], Plan], tmp_path: Path
) -> None:
    assert fingerprints(planner(CHAIN)) == fingerprints(planner(CHAIN))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("old", "new", "first_changed"),
    [
        ("sequences: 4", "sequences: 5", 0),
        ("sparsity: 0.5", "sparsity: 0.4", 1),
        ("num_bits: 4", "num_bits: 8", 2),
        ("length_tokens: 16}\n    require", "length_tokens: 8}\n    require", 3),
        ("max_model_len: 32", "max_model_len: 16", 4),
    ],
)
def test_a_changed_parameter_changes_its_step_and_those_that_read_it(
    planner: Callable[[str], Plan], old: str, new: str, first_changed: int
) -> None:
    before, after = fingerprints(planner(CHAIN)), fingerprints(planner(CHAIN.replace(old, new, 1)))
    changed = [index for index in range(5) if before[index] != after[index]]
    downstream = {0: [0, 1, 2, 3, 4], 1: [1, 2, 3, 4], 2: [2, 3, 4], 3: [3], 4: [4]}
    assert changed == downstream[first_changed]


def test_gate_bounds_change_no_fingerprint(planner: Callable[[str], Plan]) -> None:
    assert fingerprints(planner(CHAIN)) == fingerprints(planner(CHAIN.replace("max: 2", "max: 3")))


def test_one_flipped_byte_of_model_or_text_changes_fingerprints(planner: Callable[[str], Plan], tmp_path: Path) -> None:
    before = fingerprints(planner(CHAIN))
    (tmp_path / "text.txt").write_text("some words to reae. " * 200, encoding="utf-8")
    text_changed = fingerprints(planner(CHAIN))
    assert all(a != b for a, b in zip(before[:4], text_changed[:4], strict=True))
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert all(a != b for a, b in zip(text_changed, fingerprints(planner(CHAIN)), strict=True))


def test_moving_the_folder_changes_no_fingerprint_but_the_release_address(
    planner: Callable[[str], Plan], tmp_path: Path, methods: Methods
) -> None:
    before = fingerprints(planner(CHAIN))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("model", "text.txt", "valid.txt", "spec.yaml"):
        (tmp_path / name).rename(moved / name)
    assert fingerprints(make_plan(moved / "spec.yaml", methods, tmp_path / "home"))[:4] == before[:4]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("prune: wanda", "prune: wnada", 7, 'did you mean "wanda"?'),
        ("prune: wanda", "prune: gptq", 7, "belongs to stage quantize"),
        ("{sparsity: 0.5}", "{sparsity: 1.5}", 8, "less than 1"),
        ("{sparsity: 0.5}", "{sparsity: '0.5'}", 8, "valid number"),
        ("{sparsity: 0.5}", "{sparsty: 0.5}", 8, 'did you mean "sparsity"?'),
        ("group_size: 32", "group_size: 100", 10, "100"),
        ("group_size: 32", "group_size: 32, scale_dtype: float32", 10, "the model is loaded in bfloat16"),
        ("valid.txt, length_tokens: 16}\n    require", "none.txt, length_tokens: 16}\n    require", 12, "none.txt"),
        ("perplexity_ratio:", "perplexity_ration:", 13, "perplexity_ratio"),
        ("{vllm:", "{vlm:", 15, 'did you mean "vllm"?'),
        ("{vllm:", "{release:", 15, "no serving engine"),
        ("register: release", "register: vllm", 14, "engines"),
        ("max_model_len: 32", "max_model_len: 100000", 15, "max_model_len"),
        ("with: {sparsity: 0.5}", "with: {sparsity: 0.5}\n    engines: [{vllm: {}}]", 9, "means nothing"),
        ("with: {num_bits: 4, group_size: 32}", "with: {num_bits: 4, group_size: 32}\n    skip: [q_proj]", 11, "fuse"),
        (
            "with: {num_bits: 4, group_size: 32}",
            "with: {num_bits: 4, group_size: 32}\n    skip: [nothing]",
            11,
            "no layer",
        ),
        (
            "with: {num_bits: 4, group_size: 32}",
            "with: {num_bits: 4, group_size: 32}\n    skip: ['*']",
            11,
            "every layer",
        ),
    ],
)
def test_a_mistake_is_answered_with_place_and_remedy(
    planner: Callable[[str], Plan], tmp_path: Path, old: str, new: str, line: int, said: str
) -> None:
    assert old in CHAIN
    with pytest.raises((SpecError, PreflightError)) as caught:
        planner(CHAIN.replace(old, new, 1))
    found = [str(problem) for problem in caught.value.problems]
    assert any(p.startswith(f"{tmp_path / 'spec.yaml'}:{line}") and said in p for p in found), found


def test_all_mistakes_come_at_once(planner: Callable[[str], Plan]) -> None:
    text = CHAIN.replace("wanda", "wnada").replace("group_size: 32", "group_size: 7").replace("{vllm:", "{vlm:")
    message = refused(planner, text.replace("id: model", "id: ./nowhere"))
    assert all(word in message for word in ("wnada", "vlm", "nowhere"))


def test_a_mistake_in_a_core_key_hides_no_other(planner: Callable[[str], Plan]) -> None:
    text = (
        CHAIN.replace("name: chain", "nme: chain").replace("wanda", "wnada").replace("group_size: 32", "group_size: 7")
    )
    text = text.replace("valid.txt, length_tokens: 16}\n    require", "none.txt, length_tokens: 16}\n    require")
    text = text.replace("register: release", "register: release\n    skp: [x]")
    message = refused(planner, text)
    for said in ("nme: there is no such key", "wnada", "group_size", "none.txt", 'did you mean "skip"?'):
        assert said in message
    lines = [int(line) for line in re.findall(r"spec\.yaml:(\d+)", message)]
    assert lines == sorted(lines) and len(lines) >= 6
    assert "nowhere" in refused(planner, text.replace("id: model", "id: ./nowhere"))


def test_a_faulty_key_hides_no_other_fault_of_its_step(planner: Callable[[str], Plan]) -> None:
    text = CHAIN.replace("prune: wanda", "prune: wnada\n    wth: {}").replace("perplexity_ratio", "perplexity_rato")
    text = text.replace("valid.txt, length_tokens: 16}\n    require", "none.txt, lenght_tokens: 16}\n    require")
    message = refused(planner, text)
    assert all(word in message for word in ("wnada", "wth", "perplexity_rato", "none.txt", "lenght_tokens"))


def test_a_chain_that_loses_an_invariant_is_refused(planner: Callable[[str], Plan]) -> None:
    prune, quantize = CHAIN.index("  - prune"), CHAIN.index("  - quantize")
    rest = CHAIN.index("  - validate")
    swapped = CHAIN[:prune] + CHAIN[quantize:rest] + CHAIN[prune:quantize] + CHAIN[rest:]
    message = refused(planner, swapped)
    assert "prune wanda would destroy the grid that quantize gptq established" in message
    assert "put prune wanda before quantize gptq" in message


@pytest.mark.parametrize("second", ["gptq", "rtn"])
def test_a_model_is_quantized_once(planner: Callable[[str], Plan], second: str) -> None:
    again = f"  - quantize: {second}\n    with: {{num_bits: 4, group_size: 32}}\n  - validate"
    message = refused(planner, CHAIN.replace("  - validate", again))
    assert "a model is quantized once; remove one of the two" in message
    assert "before quantize" not in message


def test_a_gate_after_the_release_is_refused(planner: Callable[[str], Plan]) -> None:
    validate, register = CHAIN.index("  - validate"), CHAIN.index("  - register")
    moved = CHAIN[:validate] + CHAIN[register:] + CHAIN[validate:register]
    message = refused(planner, moved)
    assert "the gate comes after register release; put it before, so that a failed gate registers nothing" in message
    planner(moved.replace("    require: {perplexity_ratio: {max: 2}}\n", ""))  # measuring afterwards gates nothing


def test_a_skip_that_splits_fused_layers_is_said_once(planner: Callable[[str], Plan]) -> None:
    message = refused(planner, CHAIN.replace("group_size: 32}", "group_size: 32}\n    skip: [q_proj]"))
    assert message.count("skip leaves out") == 1
    assert message.endswith("(and 2 more layers)")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("id: model", "id: ~nosuchuser/x", "3: model.id: ~nosuchuser is nobody's home folder"),
        ("id: model", f"id: {'m' * 5000}", "3: model.id: there is no model folder"),
        ("id: model", f"id: ./{'m' * 5000}", "3: model.id: there is no model folder"),
        (
            "register: release",
            "register: release\n    with: {uri: ~nosuchuser/x}",
            "15: steps[4].with.uri: ~nosuchuser",
        ),
    ],
)
def test_a_path_that_cannot_be_is_refused(planner: Callable[[str], Plan], old: str, new: str, said: str) -> None:
    assert f"spec.yaml:{said}" in refused(planner, CHAIN.replace(old, new), PreflightError)


FAILING: list[str] = []  # the call that fails; a method is frozen, and its parameters are not the point here


def _call(name: str, answer: Any) -> Any:
    if f"{name} exits" in FAILING:
        raise SystemExit(3)
    if name in FAILING:
        raise RuntimeError("out of\nluck")
    return answer


class Clumsy(LayerMethod):
    """Prunes nothing; fails where it is told to."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "clumsy"
    paper: ClassVar[str] = "none: it does nothing"
    needs: ClassVar[Needs] = Needs.WEIGHT

    def preflight(self) -> None:
        _call("preflight", None)

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        answer: tuple[str, str] | None = _call("check_layer", None)
        return answer

    def for_dtype(self, dtype: str) -> LayerMethod:
        answer: LayerMethod = _call("for_dtype", self)
        return answer

    def scheme(self) -> QuantScheme | None:
        answer: QuantScheme | None = _call("scheme", None)
        return answer

    def sparsity_pattern(self) -> str | None:
        answer: str | None = _call("sparsity_pattern", None)
        return answer

    def compress(self, weight_OI: Any, statistic: Any) -> LayerResult:
        return LayerResult(weight_OI)


class ClumsyTraining(ModelMethod):
    """Trains nothing; fails where it is told to."""

    stage: ClassVar[Stage] = Stage.DISTILL
    name: ClassVar[str] = "clumsy"
    paper: ClassVar[str] = "none: it does nothing"

    def needs_calibration(self) -> bool:
        return bool(_call("needs_calibration", False))

    def blocks_removed(self) -> int:
        answer: int = _call("blocks_removed", 0)
        return answer

    def config_after(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = _call("config_after", config)
        return answer

    def check_model(self, model: Any) -> None:
        _call("check_model", None)

    def apply(self, model: Any, context: Any) -> ModelResult:
        return ModelResult(model)


class ClumsyEngine(ServingEngine):
    """Serves nothing; fails where it is told to."""

    stage: ClassVar[Stage] = Stage.REGISTER
    name: ClassVar[str] = "clumsy"
    paper: ClassVar[str] = "none: it does nothing"
    supported_versions: ClassVar[str] = ">=1"

    def render(self, shape: Any, plan: Any) -> dict[str, str]:
        answer: dict[str, str] = _call("render", {})
        return answer


CLUMSY = """\
version: 1
name: clumsy
model: {id: model}
steps:
  - distill: clumsy
  - prune: clumsy
  - register: release
    engines: [{clumsy: {max_model_len: 32}}]
"""


@pytest.mark.parametrize(
    ("failing", "place"),
    [
        ("preflight", "6: steps[1].prune"),
        ("check_layer", "6: steps[1].prune"),
        ("for_dtype", "6: steps[1].prune"),
        ("scheme", "6: steps[1].prune"),
        ("sparsity_pattern", "6: steps[1].prune"),
        ("needs_calibration", "5: steps[0].distill"),
        ("blocks_removed", "5: steps[0].distill"),
        ("config_after", "5: steps[0].distill"),
        ("check_model", "5: steps[0].distill"),
        ("render", "8: steps[2].engines[0].clumsy"),
    ],
)
def test_a_plugin_that_fails_while_planning_is_named(
    planner: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, place: str
) -> None:
    planner(CHAIN)  # writes the model and the text
    methods = discover()
    origin = Origin("clumsy", "clumsy-plugin", "0.1")
    methods.add(InstalledMethod(check_class(cls), origin) for cls in (Clumsy, ClumsyTraining, ClumsyEngine))
    (tmp_path / "spec.yaml").write_text(CLUMSY, encoding="utf-8")
    assert len(make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home").steps) == 3
    for how, said in ((failing, "RuntimeError: out of luck"), (f"{failing} exits", "SystemExit: 3")):
        monkeypatch.setattr(sys.modules[__name__], "FAILING", [how])
        with pytest.raises(SpecError) as caught:
            make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home")
        (problem,) = caught.value.problems
        assert str(problem).startswith(f"{tmp_path / 'spec.yaml'}:{place}: ")
        assert f"{failing} of clumsy-plugin 0.1 (plugin 'clumsy') failed: {said}" in problem.what


def test_a_method_that_needs_calibration_says_so(planner: Callable[[str], Plan]) -> None:
    start, end = CHAIN.index("  - calibrate"), CHAIN.index("  - prune")
    assert "put a calibrate step before" in refused(planner, CHAIN[:start] + CHAIN[end:])


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def _deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000, encoding="utf-8")


def _index(content: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    return harm


def _raw_header(text: str) -> Callable[[Path], None]:
    data = text.encode()

    def harm(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)

    return harm


def _header(**changes: Any) -> Callable[[Path], None]:
    return _raw_header(json.dumps({"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], **changes}}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_deep_config, "config.json cannot be read"),
        (_index("[" * 100_000), "cannot be read"),
        (_index('{"weight_map": {"a": 5}}'), "weight_map must give a file name"),
        (_index('{"weight_map": {"a": ["x"]}}'), "weight_map must give a file name"),
        (_index('{"weight_map": 5}'), "cannot be read"),
        (_index(json.dumps({"weight_map": {"a": "x" * 500}})), "not in the folder"),
        (_index(json.dumps({"weight_map": {"a": "x" * 5000}})), "characters); copy the model again"),
        (_raw_header("[" * 100_000), "cannot be read"),
        (_raw_header('{"w": 5}'), "cannot be read"),
        (_header(dtype="U8", shape=["64"], data_offsets=[0, 64]), "the header gives 'w' the shape"),
        (_header(dtype="U8", shape=[-1], data_offsets=[0, 0]), "the header gives 'w' the shape [-1]"),
        (_header(dtype="U8", shape=[1], data_offsets=[1, 0]), "the header gives 'w' the shape"),
        (_header(dtype=["U8"], shape=[1], data_offsets=[0, 1]), "no dtype and shape for 'w'"),
        (_header(dtype="F32", shape=[3], data_offsets=[0, 4]), "4 bytes for F32 [3]"),
        (_config(model_type=5), "names no model_type"),
        (_config(quantization_config={"quant_method": "gptq"}), "already quantized"),
        (_config(num_hidden_layers=2), "num_hidden_layers as 2, but 3 decoder blocks are stored"),
        (_config(num_hidden_layers=10**15), "but 3 decoder blocks are stored"),
        (_config(num_hidden_layers="3"), "num_hidden_layers as 3, not as a positive whole number"),
        (_config(hidden_size=65), "hidden_size as 65, but model.embed_tokens.weight has [256, 64]"),
        (_config(vocab_size=10**9), "vocab_size as 1000000000, but model.embed_tokens.weight"),
        (_config(intermediate_size=96), "intermediate_size as 96, but mlp.gate_proj.weight has 128 rows"),
        (_config(num_attention_heads=0), "num_attention_heads as 0, not as a positive whole number"),
        (_config(num_attention_heads=7), "num_attention_heads as 7, but self_attn.q_proj.weight has 64 rows"),
        (_config(max_position_embeddings=-1), "max_position_embeddings as -1"),
        (_truncate, "damaged"),
        (_garbage, "cannot be read"),
        (_pickle, "pickle"),
        (_no_config, "config.json"),
        (_remote_code, "remote code"),
    ],
)
def test_an_unusable_checkpoint_is_refused(
    planner: Callable[[str], Plan], tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    planner(CHAIN)
    harm(tmp_path / "model")
    message = refused(planner, CHAIN, PreflightError)
    assert said in message
    assert f"{tmp_path / 'spec.yaml'}:3: model.id" in message


def test_no_quantization_is_not_quantized(planner: Callable[[str], Plan], tmp_path: Path) -> None:
    planner(CHAIN)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": None}), encoding="utf-8")
    assert not planner(CHAIN).source.is_quantized


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_other_architectures_fit_their_config(
    tmp_path: Path, planner: Callable[[str], Plan], architecture: str
) -> None:
    make_model(tmp_path / architecture, architecture, tied=True)
    plan = planner(CHAIN.replace("id: model", f"id: {architecture}"))
    assert plan.source.path == tmp_path / architecture


def test_a_model_that_cannot_be_had_is_refused(planner: Callable[[str], Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hub" in refused(planner, CHAIN.replace("id: model", "id: nobody/nothing"), PreflightError)


def test_why_says_what_changed(planner: Callable[[str], Plan], tmp_path: Path) -> None:
    from orchestrator.status import remember

    store = ArtifactStore(tmp_path / "home")
    plan = planner(CHAIN)
    assert {status.why for status in statuses(plan, store)} == {"not run yet"}
    remember(plan, store.home)
    changed = planner(CHAIN.replace("sparsity: 0.5", "sparsity: 0.4"))
    assert statuses(changed, store)[1].why == "changed: parameters.sparsity"
    assert statuses(changed, store)[2].why == "changed: inputs.model"


def test_help_methods_and_plan_import_no_torch(planner: Callable[[str], Plan], tmp_path: Path) -> None:
    planner(CHAIN)
    program = (
        "import sys, contextlib, io\n"
        "from orchestrator.cli import app\n"
        "for arguments in (['--help'], ['methods'], ['plan', sys.argv[1]]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        app(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'prefect'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spec.yaml")],
        env={**os.environ, "ORCHESTRATOR_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_weights_that_are_no_plain_numbers_are_refused_by_layer(tmp_path: Path, planner: Callable[[str], Plan]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.gate_proj"
    tensors = load_file(path)
    tensors[f"{name}.weight"] = torch.zeros_like(tensors[f"{name}.weight"], dtype=torch.int8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        PreflightError, match=rf"{re.escape(name)} is stored as I8, not in F64.*before it was quantized"
    ):
        planner(CHAIN)
