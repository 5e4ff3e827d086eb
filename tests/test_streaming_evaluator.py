"""`validate: streaming` against plain loops over Transformers' own cache, and on the trained model that comes along."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.attention_sink import add_sink
from orchestrator.api import CachePolicy, Checkpoint, Context, Measured, Stage, StepError
from orchestrator.artifact import ArtifactStore
from orchestrator.errors import GateError
from orchestrator.facts import facts_of
from orchestrator.home import Settings
from orchestrator.plugins import Methods, discover
from orchestrator.run import run_locally
from orchestrator.text import token_windows
from orchestrator_evaluation.forward import load_float32
from orchestrator_evaluation.retrieval import Distances, ask, ask_without_cache, trials_of
from orchestrator_evaluation.stream import FullCache, Reader, recomputed_losses
from orchestrator_evaluation.streaming import Streaming
from tests.test_run import Watcher
from tests.tiny import edit_config, make_model

QUICKSTART = Path(__file__).parents[1] / "orchestrator" / "quickstart" / "model"
TRAINED = 256  # tokens that the quickstart's model was trained on at once
TIMED = ("stream_tokens_per_second", "full_cache_tokens_per_second", "stream_tokens_per_second_ratio")


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python, of which the quickstart's model was made to know something."""
    path = tmp_path_factory.mktemp("streaming") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_model(tmp_path_factory.mktemp("streaming") / "model"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A model with 128 learned positions, by its architecture."""
    return cache(lambda name: Checkpoint(make_model(tmp_path_factory.mktemp("learned") / name, name)))


@pytest.fixture
def context(tmp_path: Path, tiny: Checkpoint) -> Context:
    def progress(fraction: float, message: str) -> None:
        assert 0 <= fraction <= 1

    return Context(3, tiny, None, tmp_path, progress)


def policy(methods: Methods, name: str, **parameters: Any) -> CachePolicy:
    made = methods.find(Stage.VALIDATE, name).cls(**parameters)
    assert isinstance(made, CachePolicy)
    return made


def tokens_of(model: Checkpoint, text: Path, length: int) -> torch.Tensor:
    found = token_windows(str(text), model.load_tokenizer(), num_sequences=1, length=length, random=False)
    return found.tokens_NT[0]


def looped(model: Any, tokens_T: torch.Tensor) -> torch.Tensor:
    """-ln p of every token but the first, one forward pass each, float64 after the logits."""
    cache, losses = DynamicCache(config=model.config), []
    with torch.no_grad():
        for token, following in pairwise(tokens_T):
            logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[following])
    return torch.stack(losses)


def perplexity(losses: torch.Tensor) -> float:
    return math.exp(float(losses.mean()))


def test_a_stream_is_what_a_plain_loop_over_transformers_cache_gives(
    tiny: Checkpoint, text: Path, context: Context
) -> None:
    window, length = 32, 100
    evaluator = Streaming(source=str(text), window_tokens=window, stream_tokens=length, passages=1)
    found = evaluator.measure(tiny, tiny, context)
    model: Any = load_float32(tiny)
    losses = looped(model, tokens_of(tiny, text, length))
    metrics = found.metrics
    assert metrics.keys() == Streaming.metrics.keys()
    first, last = perplexity(losses[: window - 1]), perplexity(losses[-window:])
    expected = {
        "stream_perplexity": perplexity(losses),
        "first_window_perplexity": first,
        "full_cache_perplexity": first,
        "last_window_perplexity": last,
        "perplexity_growth": last / first,
        "full_cache_ratio": 1.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    config = model.config
    of_a_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert metrics["cache_bytes"] == metrics["cache_bytes_max"] == metrics["full_cache_bytes"] == of_a_token * length
    assert metrics["served_cache_bytes_ratio"] == metrics["cache_bytes_ratio"] == 1
    curve = found.curves["stream_perplexity_by_position"]
    assert [place for place, _ in curve] == [*range(5, 98, 4), 100]
    for place, value in curve[:-1]:
        assert value == pytest.approx(perplexity(losses[place - 5 : place - 1]), rel=1e-6)
    assert found.curves["cache_bytes_by_position"][0] == (1, of_a_token)
    assert found.curves["cache_bytes_by_position"][-1] == (length, of_a_token * length)


def test_several_tokens_at_once_give_the_same(tiny: Checkpoint, text: Path, context: Context) -> None:
    given: dict[str, Any] = {
        "source": str(text),
        "window_tokens": 32,
        "stream_tokens": 100,
        "passages": 1,
        "streams": 2,
    }
    one, seven = (Streaming(**given, chunk_tokens=chunk).measure(tiny, tiny, context) for chunk in (1, 7))
    for name in Streaming.metrics:
        if name not in TIMED:
            assert seven.metrics[name] == pytest.approx(one.metrics[name], rel=1e-5, abs=1e-5), name


def test_recomputation_sees_half_a_window_to_a_whole_one(tiny: Checkpoint, text: Path) -> None:
    model: Any = load_float32(tiny)
    tokens_T = tokens_of(tiny, text, 75)
    for window in (20, 21, 75, 200):
        losses = recomputed_losses(model, tokens_T, window)
        stride, begin = window // 2, 0
        for place in range(1, len(tokens_T)):
            if place >= window and (place - window) % stride == 0:
                begin = min(place + stride, len(tokens_T)) - window
            seen_T = tokens_T[begin:place]
            assert place < window or window - stride <= len(seen_T) < window
            with torch.no_grad():
                expected = -model(seen_T[None]).logits[0, -1].double().log_softmax(-1)[tokens_T[place]]
            assert float(losses[place - 1]) == pytest.approx(float(expected), abs=1e-5)


def test_trials_repeat_a_passage_at_the_distance_and_nowhere_else() -> None:
    where = Distances.of(passage=8, reach=64)
    assert where == Distances(passage=8, cue=2, inside=16, outside=80, lead=8)
    material_T = torch.arange(where.material(trials=3))  # every token once: a repetition is the trial's
    for distance in (where.inside, where.outside):
        read_KT, unread_KT = trials_of(material_T, where, distance, 3, seed=5)
        assert read_KT.shape == unread_KT.shape == (3, where.lead + distance + where.passage)
        assert torch.equal(read_KT[:, where.lead : where.lead + 8], read_KT[:, -8:])
        assert all(len(set(trial.tolist())) == len(trial) - 8 for trial in read_KT)
        assert all(len(set(trial.tolist())) == len(trial) for trial in unread_KT)
        assert torch.equal(read_KT[:, where.lead + 8 :], unread_KT[:, where.lead + 8 :])
    assert not torch.equal(trials_of(material_T, where, 16, 3, seed=6)[0], trials_of(material_T, where, 16, 3, 5)[0])
    with pytest.raises(StepError, match="too few to ask"):
        Distances.of(passage=8, reach=7)


def test_what_is_recalled_is_what_the_whole_text_says(tiny: Checkpoint, text: Path) -> None:
    """Both ways to ask, against a plain sum."""
    model: Any = load_float32(tiny)
    where = Distances.of(passage=16, reach=100)
    trials = trials_of(tokens_of(tiny, text, where.material(2)), where, where.inside, 2, seed=0)
    asked = where.passage - where.cue
    right, losses = [], []
    for trials_KT in trials:
        with torch.no_grad():
            log_p_KTV = model(trials_KT).logits.double().log_softmax(-1)[:, :-1]
        log_p_KAV, targets_KA = log_p_KTV[:, -asked:], trials_KT[:, -asked:]
        right.append(float((log_p_KAV.argmax(-1) == targets_KA).double().mean()))
        losses.append(-float(log_p_KAV.gather(-1, targets_KA[..., None]).mean()))
    done: list[int] = []
    for recall in (
        ask_without_cache(model, trials, where),
        ask(Reader(model, tiny, FullCache()), trials, where, done.append),
    ):
        assert (recall.accuracy, recall.unread) == pytest.approx(right)
        assert recall.gain == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert sum(done) == trials[0].numel() * 2


@pytest.fixture(scope="module")
def streamed(methods: Methods, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Measured]:
    """Measure the quickstart's model on a stream of eight trained windows, with a policy."""
    model = Checkpoint(QUICKSTART)
    evaluator = Streaming(source=str(text), window_tokens=TRAINED, chunk_tokens=64, passages=4)
    context = Context(0, model, None, tmp_path_factory.mktemp("scratch"))

    def measure(name: str | None = None, **parameters: Any) -> Measured:
        chosen = policy(methods, name, **parameters) if name else None
        return evaluator.measure(model, model, replace(context, policy=chosen))

    return measure


def test_streaming_llm_stays_stable_in_bounded_memory_where_the_whole_cache_explodes(
    streamed: Callable[..., Measured],
) -> None:
    whole, sinks = streamed(), streamed("streaming_llm", sinks=4, window=TRAINED - 4)
    assert whole.metrics["stream_tokens"] == 8 * TRAINED
    assert whole.metrics["recomputed_perplexity"] == sinks.metrics["recomputed_perplexity"]
    # Inside the trained window nothing is given up; at the end of the stream only one of the two still works.
    assert sinks.metrics["full_cache_ratio"] == pytest.approx(1, abs=1e-4)
    assert sinks.metrics["recomputed_ratio"] < 1.2
    assert whole.metrics["recomputed_ratio"] > 3
    assert whole.metrics["perplexity_growth"] > 3 * sinks.metrics["perplexity_growth"]
    assert sinks.metrics["cache_bytes_max"] * 8 == sinks.metrics["full_cache_bytes"] == whole.metrics["cache_bytes"]
    assert sinks.metrics["served_cache_bytes_ratio"] == 1 / 8
    held = [value for _, value in sinks.curves["cache_bytes_by_position"]]
    assert held == sorted(held) and held[-1] == held[-2]
    # What has left the cache is not known any more; what is in it is known as well as without a cache.
    assert sinks.metrics["full_cache_retrieval_gain"] > 0.5
    assert sinks.metrics["full_cache_retrieval"] > sinks.metrics["retrieval_unread"]
    assert sinks.metrics["retrieval_gain_inside"] == pytest.approx(sinks.metrics["full_cache_retrieval_gain"], abs=0.1)
    assert abs(sinks.metrics["retrieval_gain_outside"]) < 0.1


def test_a_plain_window_explodes_where_the_model_has_an_attention_sink(
    methods: Methods, text: Path, tmp_path: Path
) -> None:
    """StreamingLLM's claim: four tokens more are the difference (arXiv:2309.17453, table 1)."""
    plain = Checkpoint(QUICKSTART)
    add_sink(QUICKSTART, tmp_path / "model", tokens_of(plain, text, TRAINED))
    model = Checkpoint(tmp_path / "model")
    evaluator = Streaming(
        source=str(text),
        window_tokens=TRAINED,
        stream_tokens=4 * TRAINED,
        chunk_tokens=64,
        passages=2,
        start_token=True,
    )
    sinks, window = (
        evaluator.measure(model, model, Context(0, model, None, tmp_path, policy=chosen)).metrics
        for chosen in (
            policy(methods, "streaming_llm", sinks=4, window=TRAINED - 4),
            policy(methods, "window", window=TRAINED),
        )
    )
    assert sinks["cache_bytes_max"] == window["cache_bytes_max"]
    assert sinks["first_window_perplexity"] == pytest.approx(window["first_window_perplexity"], rel=1e-4)
    assert sinks["recomputed_ratio"] < 1.2
    assert sinks["perplexity_growth"] < 1.2
    assert window["perplexity_growth"] > 5
    assert window["recomputed_ratio"] > 5


def test_a_start_token_stands_before_every_text(tiny: Checkpoint, text: Path, context: Context) -> None:
    given: dict[str, Any] = {"source": str(text), "window_tokens": 32, "stream_tokens": 64, "passages": 1}
    metrics = Streaming(**given, start_token=True).measure(tiny, tiny, context).metrics
    start = torch.tensor([tiny.load_tokenizer().bos_token_id])
    model: Any = load_float32(tiny)
    tokens_T = torch.cat([start, tokens_of(tiny, text, 63)])
    assert metrics["stream_perplexity"] == pytest.approx(perplexity(looped(model, tokens_T)), rel=1e-6)
    losses = recomputed_losses(model, tokens_T, 32, start_token=True)
    assert metrics["recomputed_perplexity"] == pytest.approx(perplexity(losses))
    with torch.no_grad():
        log_p_V = model(torch.cat([start, tokens_T[33:63]])[None]).logits[0, -1].double().log_softmax(-1)
    assert float(losses[62]) == pytest.approx(-float(log_p_V[tokens_T[63]]), abs=1e-5)


def test_same_seed_same_numbers(tiny: Checkpoint, text: Path, context: Context, methods: Methods) -> None:
    evaluator = Streaming(source=str(text), window_tokens=32, stream_tokens=64, passages=2)
    context = replace(context, policy=policy(methods, "streaming_llm", sinks=2, window=14))
    first, again = (evaluator.measure(tiny, tiny, context) for _ in range(2))
    other = evaluator.measure(tiny, tiny, replace(context, seed=4))
    same = [name for name in Streaming.metrics if name not in TIMED]
    assert {name: first.metrics[name] for name in same} == {name: again.metrics[name] for name in same}
    assert first.curves == again.curves == other.curves
    assert first.metrics["retrieval_gain_inside"] != other.metrics["retrieval_gain_inside"]


def test_the_dense_model_stands_beside_the_candidate(
    tiny: Checkpoint, text: Path, context: Context, tmp_path: Path
) -> None:
    other = Checkpoint(make_model(tmp_path / "other", seed=1))
    metrics = (
        Streaming(source=str(text), window_tokens=32, stream_tokens=64, passages=1)
        .measure(other, tiny, context)
        .metrics
    )
    for name, checkpoint in (("recomputed_perplexity", other), ("dense_recomputed_perplexity", tiny)):
        losses = recomputed_losses(load_float32(checkpoint), tokens_of(tiny, text, 64), 32)
        assert metrics[name] == pytest.approx(perplexity(losses))


def test_too_little_text_says_how_many_tokens_are_missing(tiny: Checkpoint, tmp_path: Path, context: Context) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words. " * 30, encoding="utf-8")
    tokenizer = tiny.load_tokenizer()
    have = len(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    with pytest.raises(StepError, match=rf"short.txt holds {have} tokens, .* need 4000: {4000 - have} are missing"):
        Streaming(source=str(path), window_tokens=32, stream_tokens=4000).measure(tiny, tiny, context)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize("name", [None, "window", "h2o", "paged", "int8", "kivi", "fp8"])
def test_a_stream_beyond_learned_positions_is_refused_before_it_is_read(
    methods: Methods, learned: Callable[[str], Checkpoint], context: Context, architecture: str, name: str | None
) -> None:
    model = learned(architecture)
    positions = 128
    chosen = replace(context, policy=policy(methods, name) if name else None)
    evaluator = Streaming(source="not read.txt", stream_tokens=positions + 8)
    with pytest.raises(StepError, match=f"a stream is {positions + 8} tokens long, but this {architecture}") as caught:
        evaluator.measure(model, model, chosen)
    assert [problem.remedy for problem in caught.value.problems] == [
        f"set stream_tokens to at most {positions}",
        "set window_tokens to at most 64",
    ]


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_are_read_to_the_last(
    learned: Callable[[str], Checkpoint], text: Path, context: Context, architecture: str
) -> None:
    """What the refusal offers instead works, and one token more would not."""
    model = learned(architecture)
    metrics = (
        Streaming(source=str(text), stream_tokens=128, window_tokens=64, chunk_tokens=16, passages=1)
        .measure(model, model, context)
        .metrics
    )
    losses = looped(load_float32(model), tokens_of(model, text, 128))
    assert metrics["stream_perplexity"] == pytest.approx(perplexity(losses), rel=1e-5)
    with pytest.raises(StepError, match="set window_tokens to at most 64"):
        Streaming(source=str(text), stream_tokens=128, window_tokens=65).measure(model, model, context)
    reader = Reader(load_float32(model), model, FullCache())
    with pytest.raises(StepError, match="no position for token 130") as caught:
        reader.read(tokens_of(model, text, 130), [5] * 26)
    assert caught.value.problems[0].remedy == (
        "set stream_tokens to at most 125: its positions are learned, and end there"
    )


def test_by_default_about_three_times_the_stream_is_read() -> None:
    for window, windows in ((256, 2), (256, 8), (512, 2), (512, 8), (2048, 8)):
        length, where = windows * window, Distances.of(32, window)
        passages = Streaming(source="a.txt")._passages(where, length)
        assert 1 <= passages <= 8
        assert length + window + passages * where.read() <= (3 if windows == 8 else 3.5) * length
    assert Streaming(source="a.txt", passages=20)._passages(where, length) == 20


def test_a_model_that_does_not_say_its_window_is_asked_for_it(tmp_path: Path, text: Path, context: Context) -> None:
    folder = make_model(tmp_path / "model")
    edit_config(folder, max_position_embeddings=None)
    model = Checkpoint(folder)
    with pytest.raises(StepError, match="does not say how many tokens") as caught:
        Streaming(source=str(text)).measure(model, model, context)
    assert caught.value.problems[0].remedy == "set window_tokens"


def test_a_window_beyond_the_positions_is_refused(tiny: Checkpoint, text: Path, context: Context) -> None:
    positions = tiny.positions
    assert positions is not None
    with pytest.raises(StepError, match=f"window_tokens is {positions + 1}, but the model has {positions} positions"):
        Streaming(source=str(text), window_tokens=positions + 1).measure(tiny, tiny, context)


def test_the_estimate_grows_with_the_stream_and_knows_the_trained_window(tiny: Checkpoint, text: Path) -> None:
    facts = facts_of(tiny)
    assert facts.positions == tiny.config["max_position_embeddings"]
    default, same, longer, chunked = (
        Streaming(source=str(text), **given).estimate(facts, facts, (0, 0))
        for given in (
            {},
            {"stream_tokens": 8 * facts.positions, "window_tokens": facts.positions},
            {"stream_tokens": 16 * facts.positions},
            {"chunk_tokens": 16},
        )
    )
    assert default == same
    assert longer.operations > 1.5 * default.operations
    assert longer.memory_bytes > default.memory_bytes
    assert chunked.calls < default.calls / 2


SPEC = """\
version: 1
name: streamed
model: {{id: model}}
steps:
  - validate: streaming
    with: {{source: text.txt, window_tokens: 32, stream_tokens: 128, chunk_tokens: 4, passages: 1}}
    policy: {{streaming_llm: {{sinks: 4, window: 12}}}}
    require: {{cache_bytes_ratio: {{max: {most}}}}}
  - register: release
"""


def test_a_run_keeps_the_curves_and_holds_the_gate(
    tiny: Checkpoint, text: Path, methods: Methods, tmp_path: Path, tracking_uri: str
) -> None:
    (tmp_path / "model").symlink_to(tiny.path)
    (tmp_path / "text.txt").symlink_to(text)
    settings = Settings(tmp_path / "home", tracking_uri)
    (tmp_path / "spec.yaml").write_text(SPEC.format(most=0.125), encoding="utf-8")
    execution = run_locally(tmp_path / "spec.yaml", methods, settings, Watcher())
    assert execution.document()["release"] is not None
    artifact = ArtifactStore(settings.home).find(execution.outcomes[0].digest)
    curves = json.loads((artifact.path / "curves.json").read_text(encoding="utf-8"))
    assert sorted(curves) == [
        "cache_bytes_by_position",
        "recomputed_perplexity_by_position",
        "stream_perplexity_by_position",
    ]
    assert curves["stream_perplexity_by_position"][-1][0] == 128
    assert artifact.manifest["metrics"]["cache_bytes_ratio"] == 16 / 128
    (tmp_path / "spec.yaml").write_text(SPEC.format(most=0.1), encoding="utf-8")
    with pytest.raises(GateError, match=r"cache_bytes_ratio is 0.125, max allowed is 0.1"):
        run_locally(tmp_path / "spec.yaml", methods, settings, Watcher())
