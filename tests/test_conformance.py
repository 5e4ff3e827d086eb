"""The conformance kit passes what is right and names what is wrong."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from orchestrator.api import Method
from orchestrator.plugins import Methods, discover
from orchestrator.testing import CHECKS, SAMPLE_TEXT, check_method
from tests import seeded_bugs, seeded_policies, seeded_torch_import

# Every first-party method, by "stage name", with the parameters it is tried with.
_TRAINING = {"updates": 2, "length_tokens": 32, "batch_sequences": 2}
_WRITES = {"prompt_tokens": 8, "answer_tokens": 8}
_WINDOWS = {"source": SAMPLE_TEXT, "windows": 4, "length_tokens": 32}
_TASK = str(Path(__file__).parents[1] / "flows" / "specs" / "tasks" / "cloze")
FIRST_PARTY: dict[str, list[dict[str, object]]] = {
    "calibrate text": [
        {"source": SAMPLE_TEXT, "sequences": 4, "length_tokens": 16},
        {"source": SAMPLE_TEXT, "sequences": 4, "length_tokens": 16, "start_token": True},
    ],
    "prune depth": [{"layers": 1}, {"layers": 1, "criterion": "greedy"}],
    "prune magnitude": [{}, {"pattern": "4:8"}, {"scope": "layer", "sparsity": 0.3}],
    "prune sparsegpt": [{}, {"pattern": "2:4", "block_size": 32}, {"sparsity": 0.8, "block_size": 48, "damping": 0.1}],
    "prune wanda": [{"sparsity": 0.7}, {"pattern": "2:4"}],
    "prune llm_pruner": [
        {"ratio": 0.5, "lora_updates": 2, "length_tokens": 16},
        {"ratio": 0.5, "lora_rank": 0, "importance": "random", "mlp": False},
        {"attention": False, "round_to": 16, "order": "mixed", "granularity": "vector", "lora_rank": 0},
    ],
    "distill logits": [
        {"updates": 3, "length_tokens": 32, "batch_sequences": 2},
        {"source": SAMPLE_TEXT, "sequences": 8, "updates": 2, "length_tokens": 16, "alpha": 0.5, "temperature": 2.0},
        {**_TRAINING, "teacher_top_k": 16, "divergence": "skew_reverse_kl", "compute": "bfloat16"},
        {**_TRAINING, **_WRITES, "student_share": 0.5, "schedule": "linear", "replay_sequences": 8, "recompute": True},
    ],
    "distill gkd": [{**_TRAINING, **_WRITES}],
    "distill distillm": [{**_TRAINING, **_WRITES}],
    "distill minillm": [{**_TRAINING, **_WRITES, "sequences_at_once": 1}],
    "distill qat": [{**_TRAINING}, {**_TRAINING, "learn_scales": False}],
    "distill qad": [{**_TRAINING}],
    "quantize rtn": [
        {},
        {"num_bits": 3, "group_size": -1, "symmetric": False, "clip": "mse", "scale_dtype": "float32"},
    ],
    "quantize gptq": [
        {"group_size": 32},
        {"act_order": True, "symmetric": False, "num_bits": 8, "group_size": 16, "scale_dtype": "float16"},
        {"group_size": None, "num_bits": 2, "block_size": 8},
    ],
    "quantize sparse_gptq": [
        {"group_size": 32},
        {"pattern": "2:4", "group_size": None, "num_bits": 3, "symmetric": False, "mask_block_size": 48},
    ],
    "quantize awq": [
        {"group_size": 32},
        {"group_size": None, "symmetric": False, "num_bits": 3, "duo_scaling": False, "clip": "mse", "alphas": 3},
    ],
    "quantize smoothquant": [{}, {"activations": "static", "strength": 0.8, "scale_dtype": "float16"}],
    "quantize mixed": [
        {"bits_per_weight": 3.5, "group_size": 32},
        {"budget": "1MB", "num_bits": [3, 8], "group_size": None, "rounding": "rtn"},
    ],
    "quantize fp8": [{}, {"scale_dtype": "float32"}],
    "quantize kv_scales": [{}],
    "quantize hqq": [{}, {"num_bits": 3, "group_size": 32, "symmetric": True, "scale_dtype": "float16"}],
    "validate perplexity": [_WINDOWS],
    "validate fidelity": [_WINDOWS],
    "validate robustness": [{**_WINDOWS, "corpora": {"sample": SAMPLE_TEXT}, "seeds": [0, 1], "max_overlap": 1.0}],
    "validate tasks": [{"task_files": {"cloze": _TASK}, "questions": 20, "length_tokens": 64}],
    "validate footprint": [{"new_tokens": 2, "repeats": 1, "threads": 1, "batches": [2]}],
    "validate streaming": [{"source": SAMPLE_TEXT, "window_tokens": 32, "stream_tokens": 96, "passages": 2}],
    "validate paged": [{}],
    "validate streaming_llm": [{}, {"sinks": 2, "window": 30}],
    "validate window": [{"window": 32}],
    "validate h2o": [{}, {"heavy": 32, "recent": 32}, {"heavy": 4, "recent": 8}],
    "validate int8": [{}],
    "validate kivi": [{"group_size": 16}, {"num_bits": 4, "group_size": 8}],
    "validate fp8": [{}],
    "register release": [{}, {"alias": "candidate"}],
    "register vllm": [{}, {"kv_cache_dtype": "fp8", "block_size": 32}],
    "register kserve": [{"model_uri": "s3://models/tiny"}],
    "register llm_d": [{"model_uri": "pvc://models/tiny"}],
    "register production_stack": [{"model_uri": "hf://owner/tiny", "token_secret": "hub"}],
    "register compose": [{}],
    "register gguf": [{"tokens": 32}, {"type": "q4_k_m", "tokens": 32}],
    "register llama_cpp": [{}, {"policy": "streaming_llm", "recent_tokens": 32, "max_model_len": 64}],
    "register openvino": [{}],
    "register openvino_genai": [{}, {"policy": "streaming_llm", "sink_tokens": 32, "recent_tokens": 32}],
    "register sglang": [{}],
    "register tensorrt_llm": [{}],
}

# Each bug, and the check that must name it.
BUGS = {
    seeded_bugs.Mutates: "L3 pure",
    seeded_bugs.MutatesStatistic: "L3 pure",
    seeded_bugs.GlobalRandom: "C7 surroundings",
    seeded_bugs.HiddenGlobalRandom: "C8 deterministic",
    seeded_bugs.Nondeterministic: "C8 deterministic",
    seeded_bugs.LosesZeros: "L6 keeps zeros",
    seeded_bugs.PrunesNothing: "L7 prunes",
    seeded_bugs.UndeclaredNeed: "L2 needs",
    seeded_bugs.NotANumber: "L5 finite",
    seeded_bugs.Transposed: "L4 form",
    seeded_bugs.WrongPattern: "L8 pattern",
    seeded_bugs.UnclaimedPattern: "L8 pattern",
    seeded_bugs.UnlikeRows: "L8 pattern",
    seeded_bugs.IgnoresDtype: "L15 for_dtype",
    seeded_bugs.ScalesByZero: "L16 input_scale",
    seeded_bugs.ScalesInPlace: "L16 input_scale",
    seeded_bugs.ChoosesTooMuch: "L17 mixed",
    seeded_bugs.SameOptions: "L17 mixed",
    seeded_bugs.GradModeLeft: "C7 surroundings",
    seeded_bugs.Undescribed: "C1 complete",
    seeded_bugs.Unbounded: "C2 bounded",
    seeded_bugs.Thawed: "C4 frozen",
    seeded_bugs.Stateful: "C4 frozen",
    seeded_bugs.Lax: "C5 closed",
    seeded_bugs.RefusesParameters: "C6 planning",
    seeded_torch_import.ImportsTorch: "C6 planning",
    seeded_bugs.WrongEncoding: "L11 weight is encoding",
    seeded_bugs.OutOfRange: "L10 grid",
    seeded_bugs.OtherScheme: "L9 encoding",
    seeded_bugs.NoEncoding: "L9 encoding",
    seeded_bugs.Useless: "L13 useful",
    seeded_bugs.ForgetsMask: "M3 keeps what it claims",
    seeded_bugs.LeavesGrid: "M2 saves",
    seeded_bugs.SeedsGlobally: "C7 surroundings",
    seeded_bugs.WritesTeacher: "C9 inputs untouched",
    seeded_bugs.PercentProgress: "M4 progress",
    seeded_bugs.LosesBlock: "M5 foreseen",
    seeded_bugs.IgnoresSeed: "S3 seed",
    seeded_bugs.Int32Tokens: "S2 tokens",
    seeded_bugs.PadsWithMinusOne: "S2 tokens",
    seeded_bugs.TimeStamped: "C8 deterministic",
    seeded_bugs.PathInProvenance: "S4 storable",
    seeded_bugs.Unmeasured: "E2 declared",
    seeded_bugs.Undeclared: "E2 declared",
    seeded_bugs.Unfair: "E4 fair",
    seeded_bugs.InfiniteMetric: "E3 finite",
    seeded_bugs.Drifts: "C8 deterministic",
    seeded_bugs.FallingCurve: "E5 curves",
    seeded_bugs.ForeignSamples: "E6 samples",
    seeded_bugs.SamplesOfNothing: "E6 samples",
    seeded_policies.RefusesAll: "K1 runs",
    seeded_policies.DividesByZero: "K2 finite",
    seeded_policies.Miscounts: "K3 bytes",
    seeded_policies.RoundsByCall: "K4 in pieces",
    seeded_policies.ForgetsByCall: "K4 in pieces",
    seeded_policies.LooksAhead: "K4 in pieces",
    seeded_policies.LeavesEager: "K5 undone",
    seeded_policies.LeavesHook: "K5 undone",
    seeded_policies.TouchesWeights: "K6 weights",
    seeded_policies.RemembersStreams: "C8 deterministic",
    seeded_bugs.Forgets: "P2 finds",
    seeded_bugs.AddsFile: "P1 publishes",
    seeded_bugs.Renamed: "P1 publishes",
    seeded_bugs.FailsOnRetry: "P3 idempotent",
    seeded_bugs.Overwrites: "P4 immutable",
    seeded_bugs.BrokenYaml: "V2 files",
    seeded_bugs.EscapesFolder: "V2 files",
    seeded_bugs.TimeInFile: "V1 renders",
    seeded_bugs.NoVersions: "V4 versions",
    seeded_bugs.Crashes: "V3 refuses",
    seeded_bugs.RefusesLlama: "C6 planning",
    seeded_bugs.WritesNothing: "F2 writes",
    seeded_bugs.TimeInExport: "F3 deterministic",
    seeded_bugs.CarriesAnything: "F4 refuses",
    seeded_bugs.NoSuchLibrary: "F5 libraries",
}
# What a bug cannot but fail as well.
FOLLOWING = {seeded_bugs.GlobalRandom: ["C8 deterministic"], seeded_bugs.RefusesLlama: ["F1 accepts"]}
RIGHT = [
    seeded_bugs.Halve,
    seeded_bugs.Scaled,
    seeded_bugs.Eight,
    seeded_bugs.Either,
    seeded_bugs.Nudge,
    seeded_bugs.Firsts,
    seeded_bugs.Bytes,
    seeded_policies.Contiguous,
    seeded_bugs.WholePublisher,
    seeded_bugs.Engine,
    seeded_bugs.Export,
]


@cache
def installed() -> Methods:
    return discover()


def first_party_names() -> set[str]:
    ours = (method for method in installed().installed.values() if method.cls.__module__.startswith("orchestrator_"))
    return {f"{method.cls.stage} {method.cls.name}" for method in ours}


def test_every_first_party_method_is_tried_here() -> None:
    assert first_party_names() == FIRST_PARTY.keys()
    assert [broken for broken in installed().broken if broken.origin.distribution == "compression-orchestrator"] == []


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        pytest.param(name, values, id=f"{name} {n}")
        for name, entries in FIRST_PARTY.items()
        for n, values in enumerate(entries)
    ],
)
def test_first_party_method_conforms(name: str, parameters: dict[str, object]) -> None:
    by_name = {f"{method.cls.stage} {method.cls.name}": method.cls for method in installed().installed.values()}
    check_method(by_name[name].model_validate(parameters))


@pytest.mark.parametrize("method", RIGHT, ids=lambda cls: cls.__name__)
def test_method_without_bug_conforms(method: type[Method]) -> None:
    check_method(method())


@pytest.mark.parametrize(("method", "check"), BUGS.items(), ids=[cls.__name__ for cls in BUGS])
def test_seeded_bug_is_named_by_its_check(method: type[Method], check: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_method(method())
    failed = [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert failed == [check, *FOLLOWING.get(method, ())], str(caught.value)


def test_seeded_bugs_cover_all_kinds_of_checks() -> None:
    assert set(BUGS.values()) <= CHECKS.keys()
    assert {check[0] for check in BUGS.values()} == {check[0] for check in CHECKS}


def test_all_failures_of_a_method_are_told_at_once() -> None:
    class Several(seeded_bugs.Mutates):
        _seen: int = 0
        strength: float = seeded_bugs.Unbounded.model_fields["strength"]

    with pytest.raises(AssertionError) as caught:
        check_method(Several())
    assert all(check in str(caught.value) for check in ("C2 bounded", "C4 frozen", "L3 pure"))


def test_class_instead_of_instance_is_refused_with_a_sentence() -> None:
    with pytest.raises(AssertionError, match="takes an instance"):
        check_method(seeded_bugs.Halve)  # type: ignore[arg-type]


def test_kit_runs_in_a_plain_python_process_without_pytest(tmp_path: Path) -> None:
    code = """
import sys
from orchestrator.testing import check_method
assert "torch" not in sys.modules, "importing the kit imports torch"
from tests.seeded_bugs import Halve
check_method(Halve())
assert "pytest" not in sys.modules
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
