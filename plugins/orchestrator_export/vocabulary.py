"""The tokenizer in a GGUF file, and the proof that llama.cpp then makes the same tokens of text.

A tokenizer.json with byte-level BPE becomes llama.cpp's "gpt2" vocabulary, one with BPE and byte fallback its "llama"
vocabulary (SentencePiece; a token's score is the rank of its merge). How text is cut before BPE is a name in the file
(`tokenizer.ggml.pre`) for an expression inside llama.cpp; no table says which is right for a tokenizer.json. So each is
tried on a file with this vocabulary and almost no weights, until llama.cpp's tokens of every probing text are those
of Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api import Checkpoint, StepError
from orchestrator_export.llama_cpp import tokenize

if TYPE_CHECKING:
    from gguf import GGUFWriter

TOKENIZER_FILE = "tokenizer.json"
# Cuts that llama.cpp knows, those of widespread models first; each stands for an expression of its own.
CUTS = (
    "gpt-2", "llama-bpe", "qwen2", "qwen35", "smollm", "gpt-4o", "llama4", "tekken", "pixtral", "deepseek-llm",
    "deepseek-coder", "deepseek-v3", "starcoder", "falcon", "olmo", "dbrx", "stablelm2", "command-r", "mpt", "refact",
    "chameleon", "exaone", "exaone4", "bloom", "viking", "poro-chat", "jais", "codeshell", "minerva-7b", "megrez",
    "superbpe", "trillion", "bailingmoe", "seed-coder", "kimi-k2", "hunyuan", "hunyuan-dense", "minimax-m2", "grok-2",
)  # fmt: skip
PROBES = (
    "Hello, world! It's the year 2024, isn't it? They'll say WE'VE, I'd guess.",
    "  leading, double  and   triple spaces, a trailing one ",
    "tabs\tand\n\nnewlines \n \n\n\tmixed\r\n  in between",
    "def f(x):\n    return x**2 + 3.14159 - 1234567890 // 7  # 0xFF, 1e-5, 10,000\n",
    "snake_case camelCase UPPERCASE MixedCASE x86_64 v1.2.3-rc4 a/b\\c http://example.org/?q=1&r=%20",
    "Größe, naïve café, Ελληνικά, русский текст, עברית, العربية, हिन्दी १२३, ไทย",
    "中文测试，日本語テスト、한국어 시험。１２３",  # noqa: RUF001
    "emoji 😀👩‍👩‍👧 and signs ©®™ → ≤ ½ ² — “quotes” ‘single’ …",  # noqa: RUF001
    "!!! ??? ... --- === *** ((nested [brackets] {braces})) <tags/> $%^&",
    "a",
    " ",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    kind: "gpt2" or "llama". cut: `tokenizer.ggml.pre`. prefix: whether "llama" puts a space before a text.
    types: as gguf.TokenType. special: ids by the name of the GGUFWriter's method.
    """

    kind: str
    cut: str
    prefix: bool
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.kind == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefix)
        else:
            writer.add_token_merges(self.merges)
        for method, token in sorted(self.special.items()):
            getattr(writer, method)(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def unreadable(folder: Path) -> str | None:
    """Return why the tokenizer of a folder cannot be carried, as far as its file says. Imports no torch."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return f"{folder} has no {TOKENIZER_FILE}, of which the vocabulary is made"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        kind, tokens, merges = model["type"], model["vocab"], model.get("merges")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read: {error!r}"
    if kind != "BPE" or not isinstance(tokens, dict) or not isinstance(merges, list):
        return f"{path} is of kind {kind!r}; only BPE is carried"
    return None


def find_vocabulary(model: Checkpoint, size: int, scratch: Path) -> Vocabulary:
    """Return the vocabulary with which llama.cpp makes the same tokens as Transformers. Raises `StepError` if none."""
    tokenizer: Any = model.load_tokenizer()
    texts = [*PROBES, *_with_special(tokenizer, size)]
    wanted = [list(tokenizer(text)["input_ids"]) for text in texts]
    first = _read(model, tokenizer, size)
    differing = ""
    for candidate in _candidates(first):
        path = scratch / "vocabulary.gguf"
        _write_probe(candidate, path)
        made = tokenize(path, texts, scratch)
        if made == wanted:
            return candidate
        if made is not None and not differing:
            differing = f"; with {candidate.cut!r}, for instance, {_first_difference(texts, wanted, made)}"
    raise StepError(
        f"llama.cpp cuts text in none of its ways as the tokenizer of {model.path} does{differing}",
        remedy="leave gguf out of `formats`, or export with a tokenizer that llama.cpp knows",
    )


def check_tokens(path: Path, model: Checkpoint, scratch: Path) -> None:
    """Raise `StepError` unless llama.cpp makes of text, with this file, what the model's tokenizer makes."""
    tokenizer: Any = model.load_tokenizer()
    wanted = [list(tokenizer(text)["input_ids"]) for text in PROBES]
    made = tokenize(path, PROBES, scratch)
    if made is None:
        raise StepError(
            f"llama.cpp does not load {path.name}", remedy="tell this plugin's authors; no file is released"
        )
    if made != wanted:
        raise StepError(f"with {path.name}, llama.cpp makes other tokens: {_first_difference(PROBES, wanted, made)}")


def _first_difference(texts: Sequence[str], wanted: Sequence[list[int]], made: Sequence[list[int]]) -> str:
    at = next(at for at, tokens in enumerate(made) if tokens != wanted[at])
    same = 0
    while made[at][: same + 1] == wanted[at][: same + 1]:
        same += 1
    found, right = made[at][same : same + 6], wanted[at][same : same + 6]
    return f"{texts[at]!r} gives {found} instead of {right} behind {same} tokens"


def _with_special(tokenizer: Any, size: int) -> list[str]:
    """Text around special tokens; Transformers adds some to a tokenizer that the model has no embedding for."""
    special = {token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) < size}
    return [f"a {token}b" for token in sorted(special)[:8]]


def _candidates(vocabulary: Vocabulary) -> Iterator[Vocabulary]:
    if vocabulary.kind == "llama":
        yield from (replace(vocabulary, prefix=prefix) for prefix in (True, False))
    else:
        yield from (replace(vocabulary, cut=cut) for cut in CUTS)


def _read(model: Checkpoint, tokenizer: Any, size: int) -> Vocabulary:
    from gguf import TokenType

    content = json.loads((model.path / TOKENIZER_FILE).read_text(encoding="utf-8"))
    bpe = content["model"]
    added = {entry["id"]: entry for entry in content.get("added_tokens", ())}
    by_id = {token: text for text, token in bpe["vocab"].items()}
    by_id |= {token: entry["content"] for token, entry in added.items()}
    if by_id and max(by_id) >= size:
        raise StepError(
            f"the tokenizer of {model.path} has token {max(by_id)}, but the model embeds only {size}",
            remedy="use the tokenizer that belongs to the model",
        )
    merges = [list(pair) if isinstance(pair, list) else pair.split(" ", 1) for pair in bpe["merges"]]
    kind = "llama" if bpe.get("byte_fallback") else "gpt2"
    types = []
    for token in range(size):
        text, entry = by_id.get(token), added.get(token)
        if text is None:
            found = TokenType.UNUSED
        elif kind == "llama" and text == bpe.get("unk_token"):
            found = TokenType.UNKNOWN
        elif entry is not None:
            found = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        elif kind == "llama" and len(text) == 6 and text.startswith("<0x"):
            found = TokenType.BYTE
        else:
            found = TokenType.NORMAL
        types.append(int(found))
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), -float(rank))
    tokens = tuple(by_id.get(token, f"[PAD{token}]") for token in range(size))
    lowest = -float(len(merges))
    ids = list(tokenizer("a")["input_ids"])
    return Vocabulary(
        kind,
        "default" if kind == "llama" else CUTS[0],
        True,
        tokens,
        tuple(types),
        tuple(ranks.get(text, lowest) for text in tokens),
        tuple(" ".join(pair) for pair in merges),
        _special(model, tokenizer),
        bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _special(model: Checkpoint, tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens: the tokenizer's, else the configuration's. A further end token is the end of a turn."""
    path = model.path / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        key = f"{name}_token_id"
        token = getattr(tokenizer, key, None)
        token = token if token is not None else _first(generation.get(key, model.config.get(key)))
        if token is not None:
            found[f"add_{key}"] = int(token)
    ends: Any = generation.get("eos_token_id", model.config.get("eos_token_id"))
    others = [end for end in ends if end != found.get("add_eos_token_id")] if isinstance(ends, list) else []
    if len(others) > 1:
        raise StepError(f"{model.path} ends text with the tokens {ends}; GGUF holds two", remedy="keep two of them")
    return {**found, "add_eot_token_id": int(others[0])} if others else found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, Sequence) and value else value


def _write_probe(vocabulary: Vocabulary, path: Path) -> None:
    """Write a Llama of one block and 32 features, all zero, with the vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for method, value in (
        ("add_context_length", 32), ("add_embedding_length", 32), ("add_block_count", 1), ("add_head_count", 1),
        ("add_feed_forward_length", 32), ("add_layer_norm_rms_eps", 1e-5), ("add_rope_dimension_count", 32),
    ):  # fmt: skip
        getattr(writer, method)(value)
    vocabulary.write(writer)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary.tokens), 32), np.float16))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.zeros(32, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
