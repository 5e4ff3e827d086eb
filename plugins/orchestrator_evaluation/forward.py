"""What the evaluators that run models share: the text fields, models in float32, logits window by window.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, V = vocabulary, C = tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from orchestrator.api import Checkpoint, Evaluator, ModelFacts, StepError, TextSource, Work, token_windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Float32 numbers of a vocabulary-wide temporary: 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


class WindowEvaluator(Evaluator):
    """An evaluator on contiguous, non-overlapping windows of text without start token, in float32.

    The weights are those that an engine computes with (a quantized model's are decompressed in its own dtype);
    activations and logits are float32, so that what is measured is the compression and not the arithmetic.
    """

    source: TextSource = Field(
        min_length=1,
        description="Held-out text: a file (.jsonl, .parquet, plain UTF-8 text), or hub:OWNER/NAME:SPLIT@REVISION.",
    )
    windows: int | None = Field(None, ge=1, description="Number of windows, from the start of the text. Default: all.")
    length_tokens: int = Field(512, ge=2, le=1_048_576, description="Length of each window, tokens.")
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    batch: int = Field(4, ge=1, le=4096, description="Windows per forward pass; bounds the memory of the logits.")

    def passing(self, model: ModelFacts) -> Work:
        """One model's pass over all windows: activations and logits in memory, the model itself not."""
        windows = self.windows or _windows_of(self.source, self.length_tokens)
        batch = self.length_tokens * min(self.batch, windows)
        scored = model.forward(windows * self.length_tokens, self.length_tokens, batch, head=True)
        logits = 4 * batch * model.vocabulary
        activations = model.activation_bytes(batch, self.length_tokens)
        return Work(memory_bytes=max(logits + 4 * batch * model.hidden, activations)).then(scored)

    def chunk_bytes(self, model: ModelFacts) -> int:
        """A temporary as wide as the vocabulary, float32."""
        return 4 * min(_CHUNK_ELEMENTS, self.length_tokens * model.vocabulary)

    def tokens_NT(self, baseline: Checkpoint) -> torch.Tensor:
        """The windows, in tokens of the dense model. Raises `StepError` for too little text or too long windows."""
        positions = baseline.positions
        if positions is not None and self.length_tokens > positions:
            raise StepError(
                f"windows of {self.length_tokens} tokens are longer than the {positions} positions of the model",
                remedy=f"set length_tokens to at most {positions}",
            )
        windows = token_windows(
            self.source,
            baseline.load_tokenizer(),
            num_sequences=self.windows,
            length=self.length_tokens,
            field=self.field,
            random=False,
        )
        return windows.tokens_NT


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
