"""OpenVINO GenAI on a CPU: the settings of its continuous batching pipeline, and the program that starts it with them.

The model is that of `formats: [{openvino: {}}]`. OpenVINO GenAI is a library: nothing of it reads a file, so the folder
holds ``pipeline.json`` and a small program that hands it to `SchedulerConfig` and `CacheEvictionConfig`.

Eviction: the first `start_size` tokens stay, the last `recent_size` too, and of those between as many as have received
most attention. So h2o is what it is made for, with the sinks of its own that it insists on; and streaming_llm is the
same with one block between, for it takes no less. A prompt stays whole until its first token has been written behind
it: the plan counts the more of the two, the longest prompt (`prompt_tokens` if the traffic is given) with that token,
and what eviction leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.api import KVPlan, LayoutRule, ModelShape, ServingEngine, SpecError, Stage
from orchestrator_serving import openvino_pipeline
from orchestrator_serving.openvino_layout import BLOCK_TOKENS, OpenVINOLayout

PROGRAM = "pipeline.py"
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "u8": "u8", "u4": "u4"}


class OpenVINOGenAI(ServingEngine):
    """Renders ``pipeline.json`` and the program that serves the release with it."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "openvino_genai"
    paper: ClassVar = "Zhang et al. 2023, arXiv:2306.14048 (H2O); Xiao et al. 2023, arXiv:2309.17453 (sinks)."
    supported_versions: ClassVar = ">=2026.4,<2026.5"
    newest_version: ClassVar = "2026.4.1.0"
    policies: ClassVar = frozenset({"paged", "streaming_llm", "h2o"})
    cache_dtypes: ClassVar = ("auto", "float32", "u8", "u4")
    needs_format: ClassVar = "openvino"

    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "u8", "u4"] = Field(
        "auto", description="Element type of the KV cache. auto: float16, which goes with every inference_precision."
    )
    block_size: Literal[32] = Field(32, description="Tokens per KV-cache block; OpenVINO's CPU plugin has no other.")
    sink_tokens: int = Field(
        32, ge=BLOCK_TOKENS, le=2**20, multiple_of=BLOCK_TOKENS, description="First tokens that eviction keeps, tokens."
    )
    recent_tokens: int | None = Field(
        None,
        ge=BLOCK_TOKENS,
        le=2**30,
        multiple_of=BLOCK_TOKENS,
        description="Last tokens that eviction keeps, tokens.",
    )
    heavy_tokens: int = Field(
        0, ge=0, le=2**30, multiple_of=BLOCK_TOKENS, description="Most attended tokens that h2o keeps, tokens."
    )
    apply_rotation: bool = Field(
        False,
        description="Give keys that move up in the cache the position they then have, as StreamingLLM does. Needs "
        "inference_precision: float32.",
    )
    inference_precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="What OpenVINO computes in. auto: what the machine is best at. float32 is exact."
    )
    keys_by_channel: bool = Field(True, description="Scales of an integer cache's keys: for channels, else for tokens.")
    max_num_seqs: int = Field(256, ge=1, le=2**20, description="Most sequences to run at once. Sequences.")
    max_num_batched_tokens: int = Field(256, ge=1, le=2**30, description="Most tokens of one step. Tokens.")
    prefix_caching: bool = Field(True, description="Keep and share the KV blocks of common prompt beginnings.")

    def preflight(self) -> None:
        """Check policy and precisions too. Raises `SpecError`."""
        super().preflight()
        if self.policy == "h2o" and not self.heavy_tokens:
            raise SpecError("policy h2o keeps heavy_tokens most attended tokens, and there are none", remedy="set it")
        if self.apply_rotation and self.inference_precision != "float32":
            raise SpecError(
                "OpenVINO 2026.4 writes beyond its memory where it rotates keys and computes in 16 bits, and ends",
                remedy="set inference_precision: float32, or leave apply_rotation out",
            )
        if self.apply_rotation and self.kv_cache_dtype in ("u8", "u4"):
            raise SpecError(
                f"OpenVINO 2026.4 does not rotate keys that it keeps in {self.kv_cache_dtype}",
                remedy="set kv_cache_dtype: auto, or leave apply_rotation out",
            )
        wanted = {"float32": ("auto", "float32"), "bfloat16": ("auto", "bfloat16")}.get(self.kv_cache_dtype)
        if wanted is not None and self.inference_precision not in wanted:
            raise SpecError(
                f"OpenVINO takes a KV cache in {self.kv_cache_dtype} only where it computes in it, not in "
                f"{self.inference_precision}",
                remedy=f"set inference_precision: {self.kv_cache_dtype}, or kv_cache_dtype: float16",
            )

    def max_cache_tokens(self) -> int:
        """`max_cache_size` of the eviction; what lies between first and last is at least one block."""
        between = self.heavy_tokens if self.policy == "h2o" else BLOCK_TOKENS
        return self.sink_tokens + (self.recent_tokens or 0) + between

    def held_tokens(self) -> int | None:
        """Most that a sequence holds at any time: its whole prompt and one token, or what eviction leaves of it."""
        if super().held_tokens() is None:
            return None
        return max(self._whole_tokens(), self.evicted_tokens())

    def _whole_tokens(self) -> int:
        """The longest prompt, and the first token of its answer: eviction begins only behind them."""
        return self.max_model_len if self.prompt_tokens is None else min(self.prompt_tokens + 1, self.max_model_len)

    def evicted_tokens(self) -> int:
        """What eviction leaves of a sequence that is generated, and the block that is being filled."""
        return self.max_cache_tokens() + BLOCK_TOKENS

    def budget(self) -> dict[str, Any]:
        """The engine's 'auto' is float16."""
        given = super().budget()
        return given | {"kv_cache_dtype": "float16"} if self.kv_cache_dtype == "auto" else given

    def layout_rule(self) -> LayoutRule:
        """That of the CPU plugin."""
        return OpenVINOLayout(self.keys_by_channel)

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return ``pipeline.json`` and the program. Raises `SpecError` for what OpenVINO GenAI cannot honour."""
        scheduler = {
            "num_kv_blocks": plan.num_blocks,
            "max_num_seqs": max(1, min(self.max_num_seqs, int(plan.max_concurrency))),
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "dynamic_split_fuse": True,
            "enable_prefix_caching": self.prefix_caching,
        }
        settings: dict[str, Any] = {
            "model": "../../formats/openvino",
            "device": "CPU",
            "scheduler": scheduler,
            "properties": self._properties(plan),
        }
        if self.policy != "paged":
            settings["cache_eviction"] = {
                "start_size": self.sink_tokens,
                "recent_size": self.recent_tokens,
                "max_cache_size": self.max_cache_tokens(),
                "aggregation_mode": "NORM_SUM",
                "apply_rotation": self.apply_rotation,
            }
        program = Path(openvino_pipeline.__file__).read_text(encoding="utf-8")
        return {openvino_pipeline.SETTINGS: json.dumps(settings, indent=2) + "\n", PROGRAM: program}

    def _properties(self, plan: KVPlan) -> dict[str, Any]:
        """Of the CPU plugin. A cache in float32 or bfloat16 needs inference in it."""
        kind = plan.element_dtype
        precision: str = self.inference_precision
        if precision == "auto" and kind in ("float32", "bfloat16"):
            precision = kind
        found: dict[str, Any] = {"KV_CACHE_PRECISION": _PRECISIONS[kind]}
        if precision != "auto":
            found["INFERENCE_PRECISION_HINT"] = _PRECISIONS[precision]
        if precision == "float32":  # else inputs of layers with integer weights are rounded to 8 bits
            found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if kind in ("u8", "u4"):
            found["KEY_CACHE_QUANT_MODE"] = "BY_CHANNEL" if self.keys_by_channel else "BY_TOKEN"
        return found

    def command(self) -> str:
        """The program, with a prompt."""
        return f"python serving/{self.name}/{PROGRAM} 'PROMPT'"

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What the program needs, and what its figures are to be compared with."""
        reported = plan.num_blocks * plan.bytes_per_block
        notes = [
            "The release needs `formats: [{openvino: {}}]`; weights are counted as in the checkpoint.",
            f"After the first step, get_metrics().cache_size_in_bytes is {reported * (2 if _is_u4(plan) else 1)}"
            + (" (it counts a byte for every 4 bits; half of that is allocated)." if _is_u4(plan) else "."),
        ]
        if self.policy != "paged":
            longest = min(plan.num_blocks * BLOCK_TOKENS, plan.max_model_len) - 1
            whole = self._whole_tokens()
            steady = min(self.evicted_tokens(), plan.max_model_len)
            notes.append(
                f"A prompt is not evicted while it is read: it holds a block for each {BLOCK_TOKENS} tokens until the "
                f"first token of its answer is in the cache too (with that {whole} tokens: {_blocks(whole)}); after "
                f"that a sequence holds {_blocks(steady)} at most. The more of both is counted. The longest prompt "
                f"that fits is {longest} tokens."
            )
            if self.prompt_tokens is None:
                notes.append(
                    "Prompts are taken to be up to max_model_len long: where they are shorter, prompt_tokens and "
                    "answer_tokens say so, and more sequences run at once."
                )
            if not self.apply_rotation:
                notes.append(
                    f"Positions go on without apply_rotation: behind the {shape.max_position_embeddings}th token they "
                    "are none that the model was made for."
                )
        if self.policy == "streaming_llm":
            notes.append(
                f"Beside the first and the last tokens, OpenVINO keeps the {BLOCK_TOKENS} most attended ones between."
            )
        if self.policy == "h2o":
            notes.append(f"OpenVINO keeps the first {self.sink_tokens} tokens as well.")
        return notes


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _is_u4(plan: KVPlan) -> bool:
    return plan.element_dtype == "u4"
