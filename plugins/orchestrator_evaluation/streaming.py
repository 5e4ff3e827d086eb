"""What a cache policy does to a model that reads far more than it was trained on at once.

The stream is read token by token, as an engine decodes, through the cache policy that the step names under `policy:`;
without one through the contiguous cache of Transformers. Beside it stand, on the same tokens:

* the same model with the whole contiguous cache, inside its first trained window, where that is what it was made for:
  what the policy costs where nothing had to be given up, in perplexity, speed and retrieval;
* the same model without a cache, its trained window moved along the stream: what it can know of a text of this length.
  Texts are not equally hard everywhere; `recomputed_ratio` leaves that out, `perplexity_growth` does not;
* the dense model without a cache: what compression costs, apart from any cache.

Weights are those that an engine computes with; activations and cache are float32, so that what is measured is the
policy and not the arithmetic. Bytes are therefore given twice: as held here, and as a ratio in the dtype of serving.

Shape legend: S = streams, T = tokens of a stream, L = predicted tokens (T - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import (
    CachePolicy,
    Checkpoint,
    Context,
    Evaluator,
    Measured,
    ModelFacts,
    ModelShape,
    Problem,
    Stage,
    StepError,
    TextSource,
    Work,
    token_windows,
)
from orchestrator_evaluation.forward import load_float32
from orchestrator_evaluation.retrieval import PIECE, Distances, ask, ask_without_cache, trials_of
from orchestrator_evaluation.stream import (
    FullCache,
    Pass,
    Reader,
    Reading,
    in_pieces,
    learned_positions,
    recomputed_losses,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WINDOWS = 8  # of training, in a stream
UNKNOWN_WINDOW = 512  # for estimates of a model that does not say what it was trained on
POINTS_PER_WINDOW = 8  # of a curve
MOST_PASSAGES = 8
FOR_PASSAGES = 1.75  # tokens read to ask for passages, over those of the streams: about 3 with the stream and a window


class Streaming(Evaluator):
    """Perplexity along a stream many trained windows long, what the cache holds, its speed, and what it still knows."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "streaming"
    paper: ClassVar = "Xiao et al. 2023, arXiv:2309.17453, section 4.1 (perplexity of streams, token by token)."
    takes_policy: ClassVar = True
    metrics: ClassVar[Mapping[str, str]] = {
        "stream_perplexity": "perplexity per token of the whole stream, with the policy",
        "first_window_perplexity": "perplexity of the first trained window, with the policy",
        "last_window_perplexity": "perplexity of the last trained window of the stream, with the policy",
        "perplexity_growth": "last_window_perplexity / first_window_perplexity: about 1 if the policy is stable",
        "recomputed_perplexity": "perplexity of the stream without a cache, the trained window moved by half of it",
        "dense_recomputed_perplexity": "the same of the dense model",
        "recomputed_ratio": "stream_perplexity / recomputed_perplexity",
        "full_cache_perplexity": "perplexity of the first trained window with the contiguous cache",
        "full_cache_ratio": "first_window_perplexity / full_cache_perplexity",
        "cache_bytes": "bytes that the cache holds after the last token, in float32 where it keeps numbers as they are",
        "cache_bytes_max": "most bytes that the cache held after any token",
        "full_cache_bytes": "bytes of a contiguous float32 cache of the same tokens",
        "cache_bytes_ratio": "cache_bytes_max / full_cache_bytes",
        "served_cache_bytes_ratio": "cache bytes with the policy / without, both as planned in the dtype of serving",
        "stream_tokens_per_second": "tokens read per second over the whole stream, with the policy",
        "full_cache_tokens_per_second": "tokens read per second in the first window, with the contiguous cache",
        "stream_tokens_per_second_ratio": "stream_tokens_per_second / full_cache_tokens_per_second",
        "retrieval_inside": "share of a passage's tokens predicted after reading it within the policy's reach, 0 to 1",
        "retrieval_outside": "the same after reading it beyond the policy's reach, or beyond the trained window",
        "full_cache_retrieval": "as retrieval_inside, with the whole past before the model's eyes",
        "retrieval_unread": "as full_cache_retrieval, without having read the passage: what is guessed",
        "retrieval_gain_inside": "what reading the passage within reach adds to ln p of its tokens, nats per token",
        "retrieval_gain_outside": "the same beyond reach",
        "full_cache_retrieval_gain": "the same within reach, with the whole past before the model's eyes",
        "stream_tokens": "tokens of each stream",
    }

    source: TextSource = Field(
        min_length=1,
        description="Text to read: a file (.jsonl, .parquet, plain UTF-8 text), or hub:OWNER/NAME:SPLIT@REVISION.",
    )
    stream_tokens: int | None = Field(
        None,
        ge=2,
        le=100_000_000,
        description="Length of each stream, tokens, read once through the policy. Default: 8 trained windows.",
    )
    window_tokens: int | None = Field(
        None,
        ge=8,
        le=1_048_576,
        description="The trained window, tokens; the first of each stream is read once more through the contiguous "
        "cache, as the stream is. Default: max_position_embeddings.",
    )
    chunk_tokens: int = Field(
        1, ge=1, le=65_536, description="New tokens in each forward pass: 1 as an engine decodes, more is faster."
    )
    start_token: bool = Field(
        False, description="Begin each stream with the tokenizer's start token, for models that always see one."
    )
    streams: int = Field(1, ge=1, le=10_000, description="Streams, one after the other in the text.")
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    passages: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Passages that the model is asked for, at each distance. Each is read four times, 64 tokens a "
        "forward pass: a quarter of the reach and a whole reach before it is asked for, and with another passage in "
        "its place. Default: as many as take 1.75 times the tokens of the streams, but 1 to 8.",
    )
    passage_tokens: int = Field(
        32, ge=2, le=65_536, description="Length of each passage, tokens; at most a quarter of what the policy reaches."
    )

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Token by token through the candidate, and window by window through both models, one after the other."""
        window = self.window_tokens or model.positions or UNKNOWN_WINDOW
        length = self.stream_tokens or WINDOWS * window
        whole = Work()
        for facts in (dense, model):
            cached = 8 * facts.kv_heads * facts.head_dim * len(facts.blocks) * length
            logits = 8 * window * facts.vocabulary
            held = facts.widened_bytes + logits + facts.activation_bytes(window, window) + cached
            memory = max(facts.load_bytes(as_float32=True), held)
            passed = facts.forward(2 * self.streams * length, window, window // 2, head=True)
            whole = whole.then(replace(passed, memory_bytes=memory, moved_bytes=passed.moved_bytes + 3 * held))
        decoded = model.forward(self.streams * (length + window), window, self.chunk_tokens, head=True)
        where = Distances.of(self.passage_tokens, max(8, window))
        asked = model.forward(self._passages(where, length) * where.read(), window, PIECE, head=True)
        return whole.then(decoded).then(asked)

    def check_model(self, model: Checkpoint, policy: CachePolicy | None) -> None:
        """Refuse a stream that goes beyond the last learned position of the model. Raises `StepError`."""
        window = self._window(model)
        reach = min((policy.reach_tokens() if policy else None) or window, window)
        self._refuse_positions(model, self.stream_tokens or WINDOWS * window, window, reach)

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        """Read the streams.

        Raises `StepError` for too little text, a broken model, one whose positions end before the stream, and one that
        the policy cannot serve.
        """
        policy, window = context.policy, self._window(baseline)
        length = self.stream_tokens or WINDOWS * window
        served = _served_shape(candidate) if policy else None  # refuses before anything is read
        reach = min((policy.reach_tokens() if policy else None) or window, window)
        where = Distances.of(self.passage_tokens, reach)
        self._refuse_positions(candidate, length, window, reach)
        passages = self._passages(where, length)
        text_ST = token_windows(
            self.source,
            baseline.load_tokenizer(),
            num_sequences=self.streams,
            length=max(length, where.material(passages) + self.start_token),
            field=self.field,
            random=False,
            start_token=self.start_token,
        ).tokens_NT
        start = int(text_ST[0, 0]) if self.start_token else None
        streams_ST = text_ST[:, :length]
        inside, outside = (
            trials_of(text_ST[0, self.start_token :], where, distance, passages, context.seed, start)
            for distance in (where.inside, where.outside)
        )
        first_ST = streams_ST[:, :window]
        meter = _Meter(context, first_ST.numel() + streams_ST.numel() + 2 * (inside[0].numel() + outside[0].numel()))

        meter.say("dense model, without a cache")
        dense_SL = self._recomputed(load_float32(baseline), streams_ST, window)
        model = load_float32(candidate)
        meter.say("without a cache")
        recomputed_SL = self._recomputed(model, streams_ST, window)
        full_cache = FullCache()
        full = self._read(Reader(model, candidate, full_cache), first_ST, meter, "full cache")
        reader = Reader(model, candidate, policy or full_cache)
        readings = self._read(reader, streams_ST, meter, "stream")
        known = ask_without_cache(model, inside, where)
        near, far = (ask(reader, trials, where, meter.teller("passages")) for trials in (inside, outside))

        losses_SL = _losses(readings)
        most = max(step.held for reading in readings for step in reading.passes)
        full_bytes = full_cache.bytes_of(model, length)
        speed, full_speed = _tokens_per_second(readings), _tokens_per_second(full)
        first, last = (_perplexity(losses_SL[:, part]) for part in (slice(0, window - 1), slice(-window, None)))
        whole, recomputed = _perplexity(losses_SL), _perplexity(recomputed_SL)
        full_perplexity = _perplexity(_losses(full))
        served_ratio = 1.0
        if policy and served:
            served_ratio = policy.planned_bytes(served, length) / _in_dtype(full_bytes, served.dtype)
        metrics = {
            "stream_perplexity": whole,
            "first_window_perplexity": first,
            "last_window_perplexity": last,
            "perplexity_growth": last / first,
            "recomputed_perplexity": recomputed,
            "dense_recomputed_perplexity": _perplexity(dense_SL),
            "recomputed_ratio": whole / recomputed,
            "full_cache_perplexity": full_perplexity,
            "full_cache_ratio": first / full_perplexity,
            "cache_bytes": readings[-1].passes[-1].held,
            "cache_bytes_max": most,
            "full_cache_bytes": full_bytes,
            "cache_bytes_ratio": most / full_bytes,
            "served_cache_bytes_ratio": served_ratio,
            "stream_tokens_per_second": speed,
            "full_cache_tokens_per_second": full_speed,
            "stream_tokens_per_second_ratio": speed / full_speed,
            "retrieval_inside": near.accuracy,
            "retrieval_outside": far.accuracy,
            "full_cache_retrieval": known.accuracy,
            "retrieval_unread": known.unread,
            "retrieval_gain_inside": near.gain,
            "retrieval_gain_outside": far.gain,
            "full_cache_retrieval_gain": known.gain,
            "stream_tokens": length,
        }
        step = max(1, window // POINTS_PER_WINDOW)
        curves = {
            "stream_perplexity_by_position": _along(losses_SL, step),
            "recomputed_perplexity_by_position": _along(recomputed_SL, step),
            "cache_bytes_by_position": _thinned(readings[0].passes, step),
        }
        return Measured(metrics, curves)

    def _window(self, model: Checkpoint) -> int:
        positions = model.config.get("max_position_embeddings", model.config.get("n_positions"))
        window = self.window_tokens or positions
        if not isinstance(window, int):
            raise StepError(
                "config.json does not say how many tokens the model was trained on at once",
                remedy="set window_tokens",
            )
        if model.positions is not None and window > model.positions:
            raise StepError(
                f"window_tokens is {window}, but the model has {model.positions} positions",
                remedy=f"set window_tokens to at most {model.positions}",
            )
        return window

    def _refuse_positions(self, model: Checkpoint, length: int, window: int, reach: int) -> None:
        """Raise `StepError` if something that is to be read is longer than the model's learned positions."""
        positions = learned_positions(model)
        if positions is None:
            return

        def asked(window: int) -> int:
            where = Distances.of(self.passage_tokens, min(reach, window))
            return self.start_token + where.trial(where.outside)

        end = f"but this {model.config.get('model_type')} has learned {positions} positions, and none after them"
        problems = []
        if length > positions:
            remedy = f"set stream_tokens to at most {positions}"
            problems.append(Problem(f"a stream is {length} tokens long, {end}", remedy=remedy))
        if asked(window) > positions:
            shorter = max((size for size in range(8, window) if asked(size) <= positions), default=8)
            what = f"it takes {asked(window)} tokens to ask for a passage that is out of reach, {end}"
            problems.append(Problem(what, remedy=f"set window_tokens to at most {shorter}"))
        if problems:
            raise StepError(problems)

    def _passages(self, where: Distances, length: int) -> int:
        wanted = int(FOR_PASSAGES * self.streams * length / where.read())
        return self.passages or min(max(wanted, 1), MOST_PASSAGES)

    def _recomputed(self, model: PreTrainedModel, streams_ST: torch.Tensor, window: int) -> torch.Tensor:
        import torch

        return torch.stack(
            [recomputed_losses(model, tokens_T, window, start_token=self.start_token) for tokens_T in streams_ST]
        )

    def _read(self, reader: Reader, streams_ST: torch.Tensor, meter: _Meter, what: str) -> list[Reading]:
        pieces = in_pieces(streams_ST.shape[1], self.chunk_tokens)
        return [reader.read(tokens_T, pieces, told=meter.teller(what)) for tokens_T in streams_ST]


class _Meter:
    """The progress of a step, in tokens that went through the model with a cache."""

    def __init__(self, context: Context, tokens: int) -> None:
        self._progress = context.progress
        self._tokens = tokens
        self._done = self._shown = 0

    def say(self, what: str) -> None:
        """Name what is being done."""
        self._progress(min(1.0, self._done / self._tokens), what)

    def teller(self, what: str) -> Callable[[int], None]:
        """What a `Reader` calls with the tokens of a forward pass: every hundredth of all is told."""

        def tell(tokens: int) -> None:
            self._done += tokens
            if self._done - self._shown >= self._tokens // 100:
                self._shown = self._done
                self.say(f"{what}: {self._done} of {self._tokens} tokens")

        return tell


def _served_shape(model: Checkpoint) -> ModelShape:
    shape = ModelShape.from_config(model.config)
    return replace(shape, dtype=shape.serving_dtype)


def _losses(readings: Sequence[Reading]) -> torch.Tensor:
    import torch

    return torch.stack([reading.losses_L for reading in readings])


def _perplexity(losses: torch.Tensor) -> float:
    mean = float(losses.mean())
    if not mean < 700.0:  # exp overflows above; also false for NaN
        raise StepError(
            f"the mean negative log-likelihood is {mean}: the model is broken, or the policy breaks it",
            remedy="look at the metrics of the steps before; measure without `policy`",
        )
    return math.exp(mean)


def _tokens_per_second(readings: Sequence[Reading]) -> float:
    passes = [step for reading in readings for step in reading.passes]
    return sum(reading.passes[-1].tokens for reading in readings) / max(sum(step.seconds for step in passes), 1e-9)


def _in_dtype(float32_bytes: int, dtype: str) -> float:
    import torch

    element: torch.dtype = getattr(torch, dtype)
    return float32_bytes / 4 * element.itemsize


def _along(losses_SL: torch.Tensor, step: int) -> list[tuple[int, float]]:
    """(tokens read, perplexity of the `step` tokens up to there)."""
    length = losses_SL.shape[1]
    ends = [min(begin + step, length) for begin in range(0, length, step)]
    return [(1 + end, _perplexity(losses_SL[:, (end - 1) // step * step : end])) for end in ends]


def _thinned(passes: Sequence[Pass], step: int) -> list[tuple[int, float]]:
    """(tokens read, bytes held then), about every `step` tokens, and at the end."""
    kept: list[tuple[int, float]] = []
    for tokens, held, _ in passes:
        if not kept or tokens >= kept[-1][0] + step or tokens == passes[-1].tokens:
            kept.append((tokens, held))
    return kept
