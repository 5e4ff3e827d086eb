"""llama.cpp's server: a shell script that starts it on the release's GGUF file, with every size of its cache stated.

``llama-server`` reads no file of options for a single model, and `--keep` has no environment variable: a script is the
one form that holds all of them. `--fit off`, or the server would change what is not stated.

A full slot: `--context-shift` drops the older half of what lies behind the first `--keep` tokens, and moves the rest
up. So at least recent_tokens are always kept if a slot has room for twice as many.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.api import KVPlan, LayoutRule, ModelShape, ServingEngine, SpecError, Stage
from orchestrator_serving.llama_cpp_layout import BLOCKS, LlamaCppLayout, check_model, padded

SCRIPT = "llama-server.sh"
MOST_SLOTS = 256  # LLAMA_MAX_SEQ
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_SPARE = 2  # a token that begins every text is kept as well, and the last cell of a slot is never filled

CacheType = Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class LlamaCpp(ServingEngine):
    """Renders ``llama-server.sh``, which finds the GGUF file of its release by itself."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "llama_cpp"
    paper: ClassVar = "No paper: github.com/ggml-org/llama.cpp, tools/server."
    supported_versions: ClassVar = ">=11000,<12000"
    newest_version: ClassVar = "11549"
    policies: ClassVar = frozenset({"paged", "window", "streaming_llm"})
    cache_dtypes: ClassVar = ("auto", "q8_0", "q4_0")
    needs_format: ClassVar = "gguf"
    shares_prefixes: ClassVar = False

    engine_version: str | None = Field(None, max_length=40, description="Number of llama.cpp's build, e.g. '11549'.")
    kv_cache_dtype: CacheType = Field("auto", description="Element type of the KV cache. auto: float16.")
    max_num_seqs: int = Field(
        4, ge=1, le=MOST_SLOTS, description="Slots, each with a cache of its own; fewer if fewer fit. Sequences."
    )
    ubatch_size: int = Field(512, ge=1, le=2**20, description="Tokens computed at once; windows keep as many more.")
    prompt_cache_mib: int = Field(
        0,
        ge=0,
        le=2**20,
        description="Memory of the host for the caches of finished prompts; the server's own is 8192.",
    )
    cache_reuse: int = Field(
        0, ge=0, le=2**20, description="Shortest run of tokens that is moved and used again, tokens; 0: none."
    )

    def held_tokens(self) -> int | None:
        """The cells of a slot that has room for twice recent_tokens: it fills before anything is dropped."""
        needed = self._needed_tokens()
        return None if needed is None else padded(needed)

    def _needed_tokens(self) -> int | None:
        """What a slot has to hold for recent_tokens to be there at any time; None: the whole sequence."""
        if self.policy == "paged" or self.recent_tokens is None:
            return None
        return self._keep() + 2 * self.recent_tokens + _SPARE

    def budget(self) -> dict[str, Any]:
        """The engine's 'auto' is float16."""
        given = super().budget()
        return given | {"kv_cache_dtype": "float16"} if self.kv_cache_dtype == "auto" else given

    def layout_rule(self) -> LayoutRule:
        """One row of cells for each slot."""
        return LlamaCppLayout(self.held_tokens(), self.ubatch_size, self.policy != "paged")

    def plan(self, shape: ModelShape, weight_bytes: int) -> KVPlan:
        """Divide the memory. Raises `SpecError` too for a slot that is longer than the model's positions."""
        check_model(shape)
        needed = self._needed_tokens()
        if needed is not None and needed > shape.max_position_embeddings:
            most = (shape.max_position_embeddings - self._keep() - _SPARE) // 2
            raise SpecError(
                f"llama.cpp drops half of a slot that is full: to keep {self.recent_tokens} recent tokens it needs "
                f"{needed} positions, and the model has {shape.max_position_embeddings}",
                remedy=f"set recent_tokens to at most {most}",
            )
        return super().plan(shape, weight_bytes)

    def _keep(self) -> int:
        return self.sink_tokens if self.policy == "streaming_llm" else 0

    def arguments(self, shape: ModelShape, plan: KVPlan) -> list[str]:
        """The options of ``llama-server``, but for the model."""
        slots = max(1, min(self.max_num_seqs, int(plan.max_concurrency)))
        kind = _TYPES.get(plan.element_dtype, plan.element_dtype)
        options: list[str] = [
            "--ctx-size", str(slots * plan.block_size),
            "--parallel", str(slots),
            "--no-kv-unified",
            "--cache-type-k", kind,
            "--cache-type-v", kind,
            "--ubatch-size", str(self.ubatch_size),
            "--batch-size", str(max(2048, self.ubatch_size)),
            "--cache-ram", str(self.prompt_cache_mib),
            "--fit", "off",
        ]  # fmt: skip
        if plan.element_dtype in BLOCKS:
            options += ["--flash-attn", "on"]
        if self.cache_reuse:
            options += ["--cache-reuse", str(self.cache_reuse)]
        if self.policy != "paged":
            options += ["--keep", str(self._keep()), "--context-shift"]
            if any(shape.windows):
                options += ["--swa-full"]
        return options

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return ``{"llama-server.sh": text}``."""
        lines: list[str] = []
        for option in self.arguments(shape, plan):
            if option.startswith("--"):
                lines.append(option)
            else:
                lines[-1] += f" {shlex.quote(option)}"
        return {SCRIPT: _SCRIPT.format(versions=self.supported_versions, options=" \\\n  ".join(lines))}

    def command(self) -> str:
        """The script; what is given behind it goes to the server."""
        return f"sh serving/{self.name}/{SCRIPT} --port 8080"

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What the server must log, and what a full slot does."""
        slots = max(1, min(self.max_num_seqs, int(plan.max_concurrency)))
        notes = [
            "The release needs `formats: [{gguf: {}}]`; weights are counted as in the checkpoint.",
            f"The cache of {slots} slots is allocated at once: with -lv 4 the server logs 'KV buffer size' of together "
            f"{slots * plan.bytes_per_block / 2**20:.2f} MiB.",
        ]
        if self.policy != "paged":
            slot = min(plan.block_size, shape.max_position_embeddings)
            keep = self._keep()
            dropped = (slot - 1 - keep) // 2
            notes += [
                f"A prompt must be shorter than a slot, {slot} tokens.",
                f"At {slot - 1} tokens a slot drops the older half of those behind the first {keep}: "
                f"({slot - 1} - {keep}) // 2 = {dropped} tokens. So of a long sequence between {slot - 1 - dropped} "
                f"and {slot - 1} tokens are kept. If the tokenizer begins every text with a token of its own, the "
                "server keeps that one besides.",
            ]
        return notes


_SCRIPT = """\
#!/bin/sh
# For builds {versions} of llama.cpp. What is given behind the script goes to the server too.
set -e
cd "$(dirname "$0")/../.."
for model in formats/gguf/*.gguf; do break; done
if [ ! -f "$model" ]; then
  echo "this release has no GGUF file: register it with formats: [{{gguf: {{}}}}]" >&2
  exit 2
fi
exec llama-server --model "$model" \\
  {options} "$@"
"""
