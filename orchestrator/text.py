"""Token windows from text: random ones for calibration and distillation, contiguous ones for evaluation.

Documents are joined with the end token, if the tokenizer has one, and cut into windows without regard to where a
document begins. There is no padding, and no start token unless asked for. Imports no torch until windows are made.

Shape legend: N = sequences, T = tokens of a sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.calibration import CalibrationSet
from orchestrator.errors import StepError
from orchestrator.sources import (
    PREFIX,
    InputFile,
    check_source,
    read_blocks,
    read_documents,
    resolve_source,
    source_digest,
    source_name,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "InputFile",
    "check_source",
    "read_documents",
    "resolve_source",
    "source_digest",
    "token_windows",
    "tokenize",
]

# Characters tokenized at once. A tokenizer's own record of a piece is some hundred bytes per token.
PIECE_CHARACTERS = 1 << 18
# Random windows are drawn from at most this many times the tokens they take, and never from less than the floor, so
# that a data set of any size can be a source.
POOL_FACTOR = 32
POOL_FLOOR_TOKENS = 1_000_000


def token_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int | None,
    length: int,
    seed: int = 0,
    field: str = "text",
    random: bool = True,
    start_token: bool = False,
) -> CalibrationSet:
    """Return windows of `length` tokens that do not overlap, and where they came from.

    random: the text is cut into adjacent windows from a random offset on, and `num_sequences` distinct ones are drawn
        in random order (of the first `POOL_FACTOR` times the tokens needed, where the source holds more than that and
        than `POOL_FLOOR_TOKENS`). Otherwise the first `num_sequences` windows from the first token on; None takes all.
    start_token: put the start token first in every window; it counts as one of the `length` tokens.

    The same arguments and text give the same windows; global random state is neither used nor changed.
    Raises `StepError` if the source holds too little text or the tokenizer lacks a start token that is asked for.
    """
    import torch

    start_id = tokenizer.bos_token_id if start_token else None
    if start_token and start_id is None:
        raise StepError("the tokenizer has no start token", remedy="leave `start_token` off")
    width = length - (start_id is not None)
    least = width * (num_sequences or 1)
    limit = max(POOL_FACTOR * least, POOL_FLOOR_TOKENS) if random else None if num_sequences is None else least
    digest = source_digest(source)  # before reading, so that a file that changes meanwhile is noticed later
    tokens = _collect(tokenize(source, tokenizer, field=field), limit)
    available = tokens.numel()
    if available < least:
        raise StepError(
            f"{source_name(source)} holds {available} tokens, but {num_sequences or 1} windows need {least}: "
            f"{least - available} are missing",
            remedy="name a source with more text, or ask for fewer or shorter windows",
        )
    if random:
        generator = torch.Generator().manual_seed(seed)
        highest = min(width - 1, available - least)
        offset = int(torch.randint(highest + 1, (1,), generator=generator))
        order = torch.randperm((available - offset) // width, generator=generator)[:num_sequences]
    else:
        offset = 0
        order = torch.arange(available // width)[:num_sequences]
    slots_NT = tokens[offset : offset + (available - offset) // width * width].view(-1, width)
    tokens_NT = slots_NT[order].long()
    if start_id is not None:
        tokens_NT = torch.cat([torch.full((len(order), 1), int(start_id)), tokens_NT], dim=1)
    provenance: dict[str, Any] = {
        "source": source_name(source),
        "source_sha256": digest,
        "field": field,
        "windows": "random" if random else "contiguous",
        "seed": seed if random else None,
        "sequences": len(order),
        "length_tokens": length,
        "start_token": start_token,
        "tokens_read": available,
    }
    return CalibrationSet(tokens_NT.contiguous(), provenance)


def tokenize(source: str, tokenizer: PreTrainedTokenizerBase, *, field: str = "text") -> Iterator[list[int]]:
    """Yield the token ids of a source piece by piece, with the end token between documents.

    A long text is cut between a letter or digit and a space or line break, where no common pre-tokenizer joins the
    two sides. A tokenizer that puts a word mark before every text (SentencePiece) adds one such mark per piece.
    """
    end_id = tokenizer.eos_token_id
    first = True
    for starts_document, piece in _pieces(source, field):
        # `verbose=False`: the text is longer than the model's context on purpose.
        ids = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield [end_id, *ids] if starts_document and not first and end_id is not None else ids
        first = False


def _pieces(source: str, field: str) -> Iterator[tuple[bool, str]]:
    """Yield (whether a document starts here, text)."""
    path = Path(source)
    plain = not source.startswith(PREFIX) and path.suffix not in (".jsonl", ".parquet")
    if plain:
        check_source(source)
    # A plain file is never held as a whole; a document of the other kinds is, because its reader yields it so.
    documents: Iterable[Iterable[str]] = (
        [read_blocks(path, PIECE_CHARACTERS)] if plain else ([text] for text in read_documents(source, field=field))
    )
    for blocks in documents:
        for number, piece in enumerate(_cut(blocks)):
            yield number == 0, piece


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the joined blocks as pieces of about `PIECE_CHARACTERS`, cut at safe places where there are any."""
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) >= 2 * PIECE_CHARACTERS:
            end = _safe_end(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _safe_end(text: str) -> int:
    """The last place in the first `PIECE_CHARACTERS` where a letter or digit is followed by a space or line break."""
    for end in range(PIECE_CHARACTERS, 0, -1):
        if text[end] in " \n" and text[end - 1].isalnum():
            return end
    return PIECE_CHARACTERS


def _collect(pieces: Iterable[list[int]], limit: int | None) -> torch.Tensor:
    """The first `limit` token ids, int32."""
    import torch

    ids = array("i")
    for piece in pieces:
        ids.extend(piece)
        if limit is not None and len(ids) >= limit:
            break
    return torch.frombuffer(ids, dtype=torch.int32)[:limit] if ids else torch.empty(0, dtype=torch.int32)
