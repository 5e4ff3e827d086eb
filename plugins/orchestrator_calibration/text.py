"""Calibration on random windows of text.

Shape legend: N = sequences, T = tokens of a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import CalibrationSet, Calibrator, Stage, StepError, TextSource, check_text_size, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(Calibrator):
    """Distinct windows, drawn at random without overlap, of documents joined with the end token."""

    stage: ClassVar = Stage.CALIBRATE
    name: ClassVar = "text"
    paper: ClassVar = (
        "Random windows of concatenated text, the calibration set of GPTQ (arXiv:2210.17323, section 4), "
        "drawn without replacement."
    )

    source: TextSource = Field(
        min_length=1,
        description="Text: a file (.jsonl, .parquet, or plain UTF-8 text), or hub:OWNER/NAME[/CONFIG]:SPLIT@REVISION.",
    )
    sequences: int = Field(128, ge=1, le=1_000_000, description="Number of windows.")
    length_tokens: int = Field(512, ge=2, le=1_048_576, description="Length of each window, tokens.")
    field: str = Field("text", min_length=1, description="Key or column of JSON lines, Parquet or hub rows with text.")
    start_token: bool = Field(False, description="Put the tokenizer's start token first in every window.")

    def preflight(self) -> None:
        """Refuse a text file with fewer bytes than tokens needed. (The plan itself refuses an unreadable source.)"""
        check_text_size(self.source, self.sequences, self.length_tokens - self.start_token)

    def expected_shape(self) -> tuple[int, int]:
        """The set is of the size that is asked for, or there is none."""
        return self.sequences, self.length_tokens

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        """Return token ids [N, T]. Raises `StepError` for too little text, or windows longer than the model's."""
        # A tokenizer that knows no limit gives 10**30, which no window reaches.
        if self.length_tokens > tokenizer.model_max_length:
            raise StepError(
                f"windows of {self.length_tokens} tokens are longer than the {tokenizer.model_max_length} tokens that "
                "the tokenizer says the model can take",
                remedy=f"set length_tokens to at most {tokenizer.model_max_length}",
            )
        return token_windows(
            self.source,
            tokenizer,
            num_sequences=self.sequences,
            length=self.length_tokens,
            seed=seed,
            field=self.field,
            random=True,
            start_token=self.start_token,
        )
