"""What teaches a student: prefixes, teachers, their cache; and going on after a kill.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from orchestrator.api import CalibrationSet, Checkpoint, Context, PreflightError, StepError
from orchestrator_distillation import objective, outputs, resuming
from orchestrator_distillation.divergence import Divergence
from orchestrator_distillation.objective import Objective
from orchestrator_distillation.outputs import Scorer
from orchestrator_distillation.presets import GKD, QAT, DistiLLM, Logits, MiniLLM
from orchestrator_distillation.sampling import sample
from orchestrator_distillation.teachers import Ensemble
from orchestrator_distillation.training import Training
from tests.test_distillation_plugin import SMALL, block_weights, method, pruned
from tests.tiny import make_model, make_tokens

WRITES: dict[str, Any] = {"prompt_tokens": 6, "answer_tokens": 8}
# Every way to be taught that the presets stand for, at a small scale.
TAUGHT: dict[str, Training] = {
    "logits": Logits(**SMALL),
    "reverse": Logits(**SMALL, divergence="reverse_kl", temperature=2.0, alpha=0.5),
    "cached": Logits(**SMALL, teacher_top_k=16),
    "gkd": GKD(**SMALL, **WRITES),
    "distillm": DistiLLM(**SMALL, **WRITES, examine_every=1, replay_sequences=12),
    "minillm": MiniLLM(**SMALL, **WRITES, reuse=3),
    "qat": QAT(**SMALL),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_model(tmp_path_factory.mktemp("dense"), layers=2))


@pytest.fixture
def context(dense: Checkpoint, tmp_path: Path) -> Context:
    calibration = CalibrationSet(make_tokens(sequences=24, length=20), {})
    return Context(seed=0, dense=dense, calibration=calibration, scratch=tmp_path)


@pytest.mark.parametrize("name", TAUGHT)
def test_whatever_teaches_zeros_stay_and_bytes_repeat(name: str, dense: Checkpoint, context: Context) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = pruned(dense)
        zero = {key: weight.detach() == 0 for key, weight in block_weights(model).items()}
        result = TAUGHT[name].apply(model, context)
        states.append(result.model.state_dict())
        for key, weight in block_weights(result.model).items():
            assert not bool(weight[zero[key]].any())
        assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
        assert result.metrics["held_out_after"] < result.metrics["held_out_before"]
        assert not result.encodings
        assert [update for update, _ in result.curves["train_loss"]] == list(range(1, 13))
        assert result.curves["held_out_loss"][0] == (0, result.metrics["held_out_before"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("at", [3, 7])
@pytest.mark.parametrize("name", TAUGHT)
def test_training_goes_on_where_it_stopped_to_the_same_bytes(
    name: str, at: int, dense: Checkpoint, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "_SHARE", 0.0)
    chosen = TAUGHT[name]
    undisturbed = chosen.apply(pruned(dense), context)
    (tmp_path / "state").mkdir()
    said: list[str] = []

    def stop(fraction: float, message: str) -> None:
        said.append(message)
        if message.startswith(f"update {at} of"):
            raise KeyboardInterrupt

    kept = {"state": tmp_path / "state", "cache": tmp_path / "cache"}
    watched = Context(0, dense, context.calibration, tmp_path, stop, **kept)
    chosen.prepare(watched)
    with pytest.raises(KeyboardInterrupt):
        chosen.apply(pruned(dense), watched)
    said.clear()
    at = 0
    result = chosen.apply(pruned(dense), watched)
    assert said[0].startswith(("update 4 of", "update 8 of"))  # what was done is not done again
    state = undisturbed.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in result.model.state_dict().items())
    assert dict(result.curves) == dict(undisturbed.curves)
    assert result.metrics == undisturbed.metrics


def test_an_exam_after_the_last_state_does_not_spoil_it(
    dense: Checkpoint, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of update 3 speaks of the best parameters of update 2; those of update 4 are better."""
    asked = [0]

    def due(self: resuming.TrainingState) -> bool:
        asked[0] += 1
        return asked[0] == 3

    monkeypatch.setattr(resuming.TrainingState, "is_due", due)
    said: list[str] = []

    def stop(fraction: float, message: str) -> None:
        said.append(message)
        if message.startswith("update 5 of") and len(said) == 5:
            raise KeyboardInterrupt

    chosen = method(updates=8, examine_every=2)
    undisturbed = chosen.apply(pruned(dense), context)
    exams = [loss for _, loss in undisturbed.curves["held_out_loss"]]
    assert exams == sorted(exams, reverse=True)
    asked[0] = 0
    (tmp_path / "state").mkdir()
    watched = Context(0, dense, context.calibration, tmp_path, stop, state=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        chosen.apply(pruned(dense), watched)
    assert sorted(path.name[:14] for path in (tmp_path / "state").glob("best-*")) == [
        "best-000000002",
        "best-000000004",
    ]
    said.clear()
    result = chosen.apply(pruned(dense), watched)
    assert said[0].startswith("update 4 of 8")
    state = undisturbed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.model.state_dict().items())


def test_a_damaged_state_is_not_believed(
    dense: Checkpoint, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "_SHARE", 0.0)
    said: list[str] = []
    kept = Context(
        0, dense, context.calibration, tmp_path, lambda fraction, message: said.append(message), state=tmp_path
    )
    expected = method(updates=4).apply(pruned(dense), kept).model.state_dict()
    path = next(tmp_path.glob("training-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said.clear()
    found = method(updates=4).apply(pruned(dense), kept).model.state_dict()
    assert said[0].startswith("update 1 of 4")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_best_parameters_are_kept_not_the_last(dense: Checkpoint, context: Context) -> None:
    result = method(learning_rate=0.5, updates=6, warmup_fraction=0.0, examine_every=1).apply(pruned(dense), context)
    exams = dict(result.curves["held_out_loss"])
    best = min(exams, key=lambda update: (exams[update], update))
    assert result.metrics["best_update"] == best < 6
    assert exams[6] > 1.5 * exams[best]
    assert result.metrics["held_out_after"] == pytest.approx(exams[best], rel=0.05)  # but for rounding to bfloat16


def test_what_is_done_in_parts_is_the_same(
    dense: Checkpoint, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of positions, windows at once and recomputed blocks change memory, and no number but the last digits."""
    expected = method(updates=3).apply(pruned(dense), context)
    monkeypatch.setattr(outputs, "CHUNK_ELEMENTS", 7 * 256)
    monkeypatch.setattr(objective, "CHUNK_ELEMENTS", 7 * 256)
    found = method(updates=3, sequences_at_once=1, recompute=True).apply(pruned(dense), context)
    for (_, one), (_, other) in zip(expected.curves["train_loss"], found.curves["train_loss"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_chunked_gradients_are_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    """Also where logits are capped (Gemma 2), so that there is no plain head to take apart."""
    model = Checkpoint(make_model(tmp_path / "model", architecture, layers=2)).load(torch.float32)
    tokens_BT = make_tokens(sequences=2, length=12)
    scorer = Scorer(model)
    assert (scorer._head is None) == (architecture == "gemma2")
    rows_R = torch.tensor([0, 3, 4, 11, 20])
    found = scorer.backward(tokens_BT, rows_R, lambda rows, logits: (float(logits.square().sum()), 2 * logits))
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    expected = model(input_ids=tokens_BT, use_cache=False).logits.flatten(0, 1)[rows_R].square().sum()
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(
                gradients[name], weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max())
            )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_sampling_with_a_cache_is_sampling_without(architecture: str, share: float, tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path / "student", architecture, layers=3)).load(torch.float32)
    teacher = Checkpoint(make_model(tmp_path / "teacher", architecture, layers=3, seed=1)).load(torch.float32)
    prompts_BT = make_tokens(sequences=3, length=5)
    found = sample(
        Scorer(model),
        prompts_BT,
        9,
        torch.Generator().manual_seed(3),
        end_token=7,
        teacher=Ensemble([(1.0, Scorer(teacher))]),
        teacher_share=share,
    )
    generator = torch.Generator().manual_seed(3)
    tokens_BT, ended = prompts_BT, [False] * 3
    with torch.no_grad():
        for _ in range(9):
            q, p = (m(input_ids=tokens_BT, use_cache=False).logits[:, -1].softmax(-1) for m in (model, teacher))
            drawn_B = torch.multinomial(q if share == 0 else (1 - share) * q + share * p, 1, generator=generator)
            drawn_B = torch.where(torch.tensor(ended).unsqueeze(-1), 7, drawn_B)
            ended = [was or int(token) == 7 for was, token in zip(ended, drawn_B, strict=True)]
            tokens_BT = torch.cat([tokens_BT, drawn_B], dim=1)
    assert torch.equal(found.tokens_BT, tokens_BT)
    for row in range(3):
        answer = tokens_BT[row, 5:].tolist()
        written = answer.index(7) + 1 if 7 in answer else 9
        assert found.counted_BT[row].tolist() == [4 <= t < 4 + written for t in range(14)]


def test_the_student_s_text_is_learned_from_as_often_as_asked_for(dense: Checkpoint, context: Context) -> None:
    for share, schedule, least, most in ((1.0, "constant", 12, 12), (0.5, "constant", 2, 10), (1.0, "linear", 3, 11)):
        chosen = Logits(**SMALL, **WRITES, student_share=share, schedule=schedule)
        curve = chosen.apply(pruned(dense), context).curves["student_updates"]
        assert least <= curve[-1][1] <= most
    # A loss that only falls is no reason to leave the data.
    adaptive = DistiLLM(**SMALL, **WRITES, examine_every=3).apply(pruned(dense), context)
    losses = [loss for _, loss in adaptive.curves["held_out_loss"]]
    assert losses == sorted(losses, reverse=True)
    assert adaptive.curves["student_updates"][-1][1] == 0


def test_a_rising_loss_sends_distillm_to_the_student_s_text(dense: Checkpoint, context: Context) -> None:
    rising = {**SMALL, "learning_rate": 0.1, "updates": 24, "warmup_fraction": 0.0}
    curves = DistiLLM(**rising, **WRITES, examine_every=1).apply(pruned(dense), context).curves
    assert curves["student_updates"][-1][1] > 0


def test_several_teachers_are_one_mean_distribution(dense: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint(make_model(tmp_path / "other", layers=2, seed=1))
    both = Ensemble.load([(dense, 3.0), (other, 1.0)], 1.0, "float32")
    tokens_BT = make_tokens(sequences=2, length=6)
    rows_C = torch.tensor([0, 5, 11])
    found = both.listen(tokens_BT).at(rows_C).log_p.exp()
    with torch.no_grad():
        parts = [
            checkpoint.load(torch.float32)(input_ids=tokens_BT, use_cache=False).logits.flatten(0, 1).softmax(-1)
            for checkpoint in (dense, other)
        ]
    torch.testing.assert_close(found, (0.75 * parts[0] + 0.25 * parts[1])[rows_C], rtol=1e-4, atol=1e-6)


def test_a_teacher_that_speaks_otherwise_is_refused(dense: Checkpoint, context: Context, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", layers=2, seed=1)
    path = other / "tokenizer.json"
    text = json.loads(path.read_text())
    first, second = list(text["model"]["vocab"])[5:7]
    vocabulary = text["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(text))
    with pytest.raises(StepError, match=r"teacher other have different tokenizers: token .* to the teacher"):
        method(teachers={"dense": 1.0, str(other): 1.0}).apply(pruned(dense), context)


def test_two_folders_with_the_same_bytes_are_two_teachers(cached: Cached, dense: Checkpoint, tmp_path: Path) -> None:
    """Their weights add up; so a mixture has an identity of its own."""
    copy = tmp_path / "copy"
    shutil.copytree(dense.path, copy)
    other = str(make_model(tmp_path / "other", layers=2, seed=1))
    for count, teachers in enumerate(({"dense": 3.0, other: 1.0}, {"dense": 3.0, str(copy): 9.0, other: 1.0}), start=1):
        method(teacher_top_k=16, teachers=teachers).prepare(cached.context)
        assert len(cached.files()) == count


class Cached:
    """A folder of teacher caches, and what happens in it."""

    def __init__(self, dense: Checkpoint, calibration: CalibrationSet, folder: Path) -> None:
        self.said: list[str] = []
        self.folder = folder
        self.context = Context(
            0, dense, calibration, folder, lambda fraction, message: self.said.append(message), cache=folder / "cache"
        )

    def files(self) -> list[Path]:
        return sorted((self.folder / "cache").glob("*/windows-*.safetensors"))


@pytest.fixture
def cached(dense: Checkpoint, context: Context, tmp_path: Path) -> Cached:
    assert context.calibration is not None
    return Cached(dense, context.calibration, tmp_path)


def test_the_teacher_runs_once(cached: Cached, dense: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    first = method(teacher_top_k=16).apply(pruned(dense), cached.context)
    times = [path.stat().st_mtime_ns for path in cached.files()]
    assert len(times) == 1
    student = pruned(dense)

    def refuse(*args: Any, **named: Any) -> Any:
        raise AssertionError("the teacher was loaded again")

    monkeypatch.setattr(Ensemble, "load", refuse)
    second = method(teacher_top_k=16).apply(student, cached.context)
    assert [path.stat().st_mtime_ns for path in cached.files()] == times
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())


def test_all_tokens_but_one_in_the_cache_are_the_whole_teacher(cached: Cached, dense: Checkpoint) -> None:
    """With V - 1 tokens named, the tail is the last one: nothing is lost."""
    whole = method(updates=4).apply(pruned(dense), cached.context)
    found = method(updates=4, teacher_top_k=255).apply(pruned(dense), cached.context)
    for (_, one), (_, other) in zip(whole.curves["train_loss"], found.curves["train_loss"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_another_teacher_text_or_temperature_has_a_cache_of_its_own(
    cached: Cached, dense: Checkpoint, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", layers=2, seed=1)
    for count, changes in enumerate(
        ({}, {"temperature": 2.0}, {"teacher_top_k": 8}, {"teachers": {str(other): 1.0}}, {"length_tokens": 10}),
        start=1,
    ):
        method(**{"teacher_top_k": 16, **changes}).prepare(cached.context)
        assert len(cached.files()) == count


@pytest.mark.parametrize("fault", ["torn", "changed", "of another teacher"])
def test_a_cache_that_is_not_what_it_should_be_is_set_aside(
    fault: str, cached: Cached, dense: Checkpoint, tmp_path: Path
) -> None:
    chosen = method(teacher_top_k=16)
    expected = chosen.apply(pruned(dense), cached.context).model.state_dict()
    (path,) = cached.files()
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "changed":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        method(teacher_top_k=16, teachers={str(make_model(tmp_path / "other", layers=2, seed=1)): 1.0}).prepare(
            cached.context
        )
        (foreign,) = set(cached.files()) - {path}
        path.write_bytes(foreign.read_bytes())
    cached.said.clear()
    found = chosen.apply(pruned(dense), cached.context).model.state_dict()
    assert any("set aside" in message for message in cached.said)
    assert path.with_suffix(".unusable").exists()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("cls", "changes", "match"),
    [
        (Logits, {"student_share": 0.5, "teacher_top_k": 8}, "the student's own text .* is new"),
        (Logits, {"schedule": "linear"}, "mean nothing without student_share"),
        (GKD, {"prompt_tokens": 64, "length_tokens": 64}, "leave nothing of length_tokens"),
        (MiniLLM, {"teacher_top_k": 8}, "what the student writes is new"),
        (MiniLLM, {"prompt_tokens": 300}, "leave nothing of length_tokens"),
        (Logits, {"teachers": {}}, "at least 1 item"),
        (QAT, {"teacher_top_k": 8}, "mean nothing with alpha 0"),
        (Logits, {"teachers": {"dense": 0.0}}, "greater than 0"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(cls: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        cls(**changes)


def test_what_config_json_shows_is_refused_while_planning(dense: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="teacher_top_k is 256, and the teacher knows 256 tokens"):
        method(teacher_top_k=256).config_after(dense.config)
    other = make_model(tmp_path / "other", layers=2)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(StepError, match="the student scores 256 tokens, the teacher other 300"):
        method(teachers={str(other): 1.0}).config_after(dense.config)
    with pytest.raises(StepError, match="to write 200 tokens after 100, and it has 256 positions") as caught:
        MiniLLM(prompt_tokens=100, answer_tokens=200).config_after({**dense.config, "max_position_embeddings": 256})
    assert caught.value.problems[0].remedy == "lower answer_tokens to at most 156"
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(PreflightError, match="holds 9 bytes, too few for the 2048 tokens of 16 windows"):
        method(source=str(tmp_path / "short.txt"), sequences=16, length_tokens=128).preflight()


def test_a_prompt_longer_than_the_windows_is_refused(dense: Checkpoint, context: Context) -> None:
    with pytest.raises(StepError, match="prompt_tokens 20 leave nothing of windows of 20 tokens"):
        MiniLLM(**{**SMALL, "length_tokens": 64}, prompt_tokens=20, answer_tokens=4).apply(pruned(dense), context)


@pytest.mark.parametrize("fault", ["a folder for a file", "a file for the folder", "a link"])
def test_a_cache_that_cannot_be_used_is_named(fault: str, cached: Cached, dense: Checkpoint, tmp_path: Path) -> None:
    chosen = method(teacher_top_k=16)
    chosen.prepare(cached.context)
    (path,) = cached.files()
    path.unlink()
    if fault == "a folder for a file":
        path.mkdir()
    else:
        path.parent.rmdir()
        if fault == "a link":
            (tmp_path / "elsewhere").mkdir()
            path.parent.symlink_to(tmp_path / "elsewhere")
        else:
            path.parent.write_text("")
    with pytest.raises(StepError, match=r"the teacher's cache .*teacher-.* cannot be used") as caught:
        chosen.prepare(cached.context)
    assert caught.value.problems[0].remedy == "remove it, and run again"
    assert not (tmp_path / "elsewhere").exists() or not list((tmp_path / "elsewhere").iterdir())


def test_a_broken_teacher_fills_no_cache(cached: Cached, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = make_model(tmp_path / "other", layers=2, seed=1)
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(StepError, match="the teacher gives probabilities that are not finite"):
        method(teacher_top_k=16, teachers={str(other): 1.0}).prepare(cached.context)
    assert not cached.files()


def test_tokens_that_a_teacher_rules_out_have_no_probability(dense: Checkpoint) -> None:
    both = Ensemble.load([(dense, 1.0)], 1.0, "float32")
    model = both.members[0][1].model
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(256))
    model.lm_head.bias.data[7] = float("-inf")
    chunk = both.listen(make_tokens(sequences=1, length=4)).at(torch.arange(4))
    student_PV = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    assert bool((chunk.log_p[:, 7].exp() == 0).all())
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"):
        value_P, gradient_PV = Objective(Divergence(name)).divergence_and_gradient(student_PV, chunk)  # type: ignore[arg-type]
        assert bool(value_P.isfinite().all()) and bool(gradient_PV.isfinite().all())


def test_a_teacher_that_cuts_text_otherwise_is_refused(dense: Checkpoint, context: Context, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", layers=2, seed=1)
    path = other / "tokenizer.json"
    text = json.loads(path.read_text())
    text["model"]["merges"] = []
    path.write_text(json.dumps(text))
    with pytest.raises(StepError, match="cut text into other tokens"):
        method(teachers={str(other): 1.0}).apply(pruned(dense), context)


def test_a_rate_that_only_harms_leaves_the_model_as_it_was(dense: Checkpoint, context: Context, tmp_path: Path) -> None:
    said: list[str] = []
    watched = Context(0, dense, context.calibration, tmp_path, lambda fraction, message: said.append(message))
    model = pruned(dense)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = method(learning_rate=1.0, warmup_fraction=0.0, updates=4).apply(model, watched)
    assert "no update has lowered the held-out loss" in said[-1]
    assert result.metrics["best_update"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_held_out_loss_is_that_of_the_student_and_the_teacher(
    temperature: float, dense: Checkpoint, context: Context
) -> None:
    """The first windows of the calibration set, which are not trained on; in float64, by torch."""
    assert context.calibration is not None
    chosen = method(temperature=temperature, updates=1, divergence="reverse_kl")
    metrics = chosen.apply(pruned(dense), context).metrics
    tokens_NT = context.calibration.tokens_NT[:3]
    with torch.no_grad():
        log_q, log_p = (
            (model.double()(input_ids=tokens_NT, use_cache=False).logits / temperature).log_softmax(-1)
            for model in (pruned(dense), dense.load())
        )
    for name, (one, other) in {"held_out_before": (log_q, log_p), "kl_before": (log_p, log_q)}.items():
        assert metrics[name] == pytest.approx(float((one.exp() * (one - other)).sum(-1).mean()), rel=1e-4)
