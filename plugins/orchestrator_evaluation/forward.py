"""What the evaluators that run models share: the text fields, models in float32, logits window by window.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, V = vocabulary, C = tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, model_validator

from orchestrator.api import (
    CalibrationSet,
    Checkpoint,
    Context,
    Evaluator,
    HeldOutSources,
    ModelFacts,
    StepError,
    TextSource,
    Work,
    token_windows,
)
from orchestrator_evaluation.overlap import OVERLAP, RUN_TOKENS, overlap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_REMEDY = "name a text that is held out, or raise max_overlap if such repetition is its nature"
# Float32 numbers of a vocabulary-wide temporary: 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


class WindowEvaluator(Evaluator):
    """An evaluator on contiguous, non-overlapping windows of text without start token, in float32.

    The weights are those that an engine computes with (a quantized model's are decompressed in its own dtype);
    activations and logits are float32, so that what is measured is the compression and not the arithmetic.
    """

    source: TextSource | None = Field(
        None,
        min_length=1,
        description="Held-out text: a file (.jsonl, .parquet, plain UTF-8 text), or hub:OWNER/NAME:SPLIT@REVISION.",
    )
    sources: HeldOutSources | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Instead of `source`: several held-out texts by name, none of which the specification calibrates "
        "or trains on. Metrics are then called METRIC.NAME.",
    )
    max_overlap: float = Field(
        0.1,
        ge=0,
        le=1,
        description="The largest share of runs of 13 tokens that may stand in what the model was calibrated or trained "
        "on: of `sources` always, of `source` where there are bounds.",
    )
    windows: int | None = Field(None, ge=1, description="Number of windows, from the start of each text. Default: all.")
    length_tokens: int = Field(512, ge=2, le=1_048_576, description="Length of each window, tokens.")
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    batch: int = Field(4, ge=1, le=4096, description="Windows per forward pass; bounds the memory of the logits.")

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> WindowEvaluator:
        if (self.source is None) == (self.sources is None):
            raise ValueError("give source, or sources with a name for each")
        return self

    def declared(self) -> Mapping[str, str]:
        """The metrics of every text, and how much of it the model was calibrated or trained on."""
        if self.sources is None:
            return self.metrics
        return {
            f"{name}.{tier}": f"{what}; text {tier}"
            for tier in sorted(self.sources)
            for name, what in self.metrics.items()
        }

    def reads_calibration(self) -> bool:
        """Texts are compared with the calibration set."""
        return True

    def presupposed(self) -> Mapping[str, tuple[float, str]]:
        """A text that bounds rest on is held out. (Of several, one that is not is no longer measured.)"""
        return {} if self.sources else {OVERLAP: (self.max_overlap, _REMEDY)}

    def most_units(self) -> int | None:
        """Windows of each text, if their number is given."""
        return self.windows

    def expected_units(self) -> int:
        """Windows of all texts."""
        return sum(self.windows or _windows_of(source, self.length_tokens) for source in self._texts().values())

    def _texts(self) -> dict[str, str]:
        """By what is put behind a metric's name, the texts."""
        if self.sources is None:
            return {"": str(self.source)}
        return {f".{tier}": source for tier, source in sorted(self.sources.items())}

    def passing(self, model: ModelFacts) -> Work:
        """One model's pass over all windows: activations and logits in memory, the model itself not."""
        windows = self.expected_units()
        batch = self.length_tokens * min(self.batch, windows)
        scored = model.forward(windows * self.length_tokens, self.length_tokens, batch, head=True)
        logits = 4 * batch * model.vocabulary
        activations = model.activation_bytes(batch, self.length_tokens)
        return Work(memory_bytes=max(logits + 4 * batch * model.hidden, activations)).then(scored)

    def chunk_bytes(self, model: ModelFacts) -> int:
        """A temporary as wide as the vocabulary, float32."""
        return 4 * min(_CHUNK_ELEMENTS, self.length_tokens * model.vocabulary)

    def windows_of_texts(
        self, baseline: Checkpoint, context: Context
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Return the windows [N, T] of every text, by what is put behind a metric's name, and the overlap metrics.

        Raises `StepError` for too little text, too long windows, or one of several texts that is not held out.
        """
        texts = self.tokens_of_texts(baseline)
        shares = overlaps(texts, *((context.calibration,) if context.calibration else ()), *context.trained_on)
        if self.sources:
            self.refuse_overlap(shares, "what the model was calibrated or trained on")
        return texts, shares

    def tokens_of_texts(self, baseline: Checkpoint) -> dict[str, torch.Tensor]:
        """The windows [N, T] of every text, by what is put behind a metric's name. Raises as `tokens_NT` does."""
        return {suffix: self.tokens_NT(baseline, source) for suffix, source in self._texts().items()}

    def refuse_overlap(self, shares: Mapping[str, float], what: str) -> None:
        """Raise `StepError` if one of `overlaps` is too large. what: that was compared with, for people."""
        for metric, share in shares.items():
            if share > self.max_overlap:
                text = f"sources{metric.removeprefix(OVERLAP)}" if self.sources else "source"
                raise StepError(
                    f"{share:.1%} of the runs of {RUN_TOKENS} tokens in {text} stand in {what} too; at most "
                    f"{self.max_overlap:.1%} may",
                    remedy=_REMEDY,
                )

    def tokens_NT(self, baseline: Checkpoint, source: str | None = None) -> torch.Tensor:
        """The windows, in tokens of the dense model. Raises `StepError` for too little text or too long windows."""
        positions = baseline.positions
        if positions is not None and self.length_tokens > positions:
            raise StepError(
                f"windows of {self.length_tokens} tokens are longer than the {positions} positions of the model",
                remedy=f"set length_tokens to at most {positions}",
            )
        windows = token_windows(
            source or str(self.source),
            baseline.load_tokenizer(),
            num_sequences=self.windows,
            length=self.length_tokens,
            field=self.field,
            random=False,
        )
        return windows.tokens_NT


def overlaps(texts: Mapping[str, torch.Tensor], *seen: CalibrationSet) -> dict[str, float]:
    """By metric, how much of each text's windows [N, T] stands in one of the sets, 0 to 1."""
    return {
        f"{OVERLAP}{suffix}": overlap(tokens_NT, *(one.tokens_NT for one in seen))
        for suffix, tokens_NT in texts.items()
    }


def _windows_of(source: str, length: int) -> int:
    """About as many windows as a text gives: some four bytes are a token."""
    path = Path(source)
    size = path.stat().st_size if path.is_file() else 1 << 20
    return max(1, size // 4 // length)


def load_float32(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the model as it is stored and widen it to float32."""
    model: Any = checkpoint.load()
    return cast("PreTrainedModel", model.float())


def check_vocabulary(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Raise `StepError` if a token is not in the vocabulary."""
    rows = int(cast("torch.nn.Embedding", model.get_input_embeddings()).weight.shape[0])
    if int(tokens.max()) >= rows:
        raise StepError(
            f"the tokenizer makes token {int(tokens.max())}, but the model embeds only {rows}",
            remedy="use the tokenizer that belongs to the model",
        )


def logits_of(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, T, V], float32, of one batch. Raises `StepError` if a token is not in the vocabulary."""
    import torch

    check_vocabulary(model, tokens_BT)
    with torch.inference_mode():
        logits_BTV: torch.Tensor = model(input_ids=tokens_BT.to(model.device), use_cache=False).logits
    return logits_BTV.float()


def chunks(num_tokens: int, num_vocabulary: int) -> Iterator[slice]:
    """Yield slices over tokens, each small enough for a few temporaries [C, V]."""
    size = max(1, _CHUNK_ELEMENTS // num_vocabulary)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
