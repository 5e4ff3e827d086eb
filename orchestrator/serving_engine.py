"""The method kind `ServingEngine`: the files with which one engine serves the compressed model, its KV cache planned.

Imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import Field

from orchestrator.errors import SpecError
from orchestrator.method import Method
from orchestrator.serving import KVPlan, LayoutRule, ModelShape, plan_kv

Policy = Literal["paged", "window", "streaming_llm", "h2o"]

_BUDGET = (
    "gpu_memory_gib",
    "memory_utilization",
    "max_model_len",
    "kv_cache_dtype",
    "block_size",
    "activation_gib",
    "tensor_parallel_size",
    "policy",
)


class UnsupportedPolicyError(SpecError):
    """An engine cannot keep its cache as asked. engines: the installed ones that can."""

    def __init__(self, engine: str, policy: str, engines: Sequence[str] = ()) -> None:
        self.engine, self.policy, self.engines = engine, policy, tuple(engines)
        can = f"engines that can: {', '.join(engines)}" if engines else "no installed engine can"
        super().__init__(
            f"{engine} cannot keep a KV cache by the policy {policy!r}", remedy=f"set policy: paged; {can}"
        )


class ServingEngine(Method):
    """Writes the files with which one engine serves the compressed model with a planned KV cache.

    The fields below are common to all engines; an engine adds its own, and narrows those that it has fewer choices for.
    supported_versions: a specifier, e.g. ">=0.30,<0.34". newest_version: the one the files are written for unless
    `engine_version` says otherwise. policies: what the engine can do with a cache that is full. cache_dtypes: values of
    `kv_cache_dtype`, to say what would fit with another. needs_format: the file format of the release that it loads, if
    that is not the checkpoint itself. shares_prefixes: whether sequences can have blocks in common.
    """

    supported_versions: ClassVar[str]
    newest_version: ClassVar[str | None] = None
    policies: ClassVar[frozenset[str]] = frozenset({"paged"})
    cache_dtypes: ClassVar[tuple[str, ...]] = ()
    needs_format: ClassVar[str | None] = None
    shares_prefixes: ClassVar[bool] = True

    engine_version: str | None = Field(
        None,
        max_length=40,
        description="Version of the engine that will serve, e.g. '0.33.0'. Default: the newest known.",
    )
    gpu_memory_gib: float = Field(24.0, gt=0, le=100_000, description="Memory of one accelerator, GiB.")
    memory_utilization: float = Field(0.92, gt=0, le=1, description="Share of that memory the engine may use.")
    max_model_len: int = Field(2048, gt=0, description="Longest sequence served: prompt and answer, tokens.")
    kv_cache_dtype: str = Field(
        "auto",
        description="Element type of the KV cache; 'auto' is the model's, fp8 where it brings scales for it.",
    )
    block_size: int = Field(16, gt=0, description="Tokens per KV-cache block.")
    activation_gib: float = Field(1.0, ge=0, le=100_000, description="Memory left to activations and graphs, GiB.")
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="Accelerators that share the heads of every layer.")
    policy: Policy = Field(
        "paged",
        description="What is kept of a sequence: all of it (paged), the last tokens (window), the first and the last "
        "(streaming_llm), or the most attended and the last (h2o).",
    )
    sink_tokens: int = Field(4, ge=0, le=2**20, description="First tokens that streaming_llm keeps, tokens.")
    recent_tokens: int | None = Field(
        None, ge=1, le=2**30, description="Last tokens that a policy other than paged keeps, tokens."
    )
    heavy_tokens: int = Field(0, ge=0, le=2**30, description="Most attended tokens that h2o keeps, tokens.")
    prompt_tokens: int | None = Field(None, ge=1, le=2**30, description="Expected traffic: tokens of a prompt.")
    answer_tokens: int | None = Field(None, ge=1, le=2**30, description="Expected traffic: tokens of an answer.")
    shared_prefix_tokens: int = Field(
        0, ge=0, le=2**30, description="Expected traffic: tokens at the beginning that all prompts share."
    )

    def budget(self) -> dict[str, Any]:
        """The arguments of `orchestrator.serving.plan_kv` that the fields above give."""
        return {name: getattr(self, name) for name in _BUDGET} | {"held_tokens": self.held_tokens()}

    def held_tokens(self) -> int | None:
        """Most tokens of a sequence that the policy keeps; None: all of them."""
        if self.policy == "paged" or self.recent_tokens is None:
            return None
        first = {"streaming_llm": self.sink_tokens, "h2o": self.heavy_tokens}.get(self.policy, 0)
        return first + self.recent_tokens

    def version(self) -> str:
        """The version of the engine that the files are for."""
        return self.engine_version or self.newest_version or self.supported_versions

    def written_for(self) -> str:
        """What the files are for, in words."""
        return f"{self.name} {self.supported_versions}"

    def preflight(self) -> None:
        """Check version and policy. Raises `SpecError`, `UnsupportedPolicyError` for a policy it cannot honour."""
        if self.engine_version is not None:
            try:
                supported = Version(self.engine_version) in SpecifierSet(self.supported_versions)
            except InvalidVersion:
                raise SpecError(
                    f"engine_version {self.engine_version!r} is no version", remedy="write it as 0.33.0"
                ) from None
            if not supported:
                raise SpecError(
                    f"{self.name} {self.engine_version} is outside {self.supported_versions}, for which its files are "
                    "written",
                    remedy="serve with a version inside, or install a plugin for this one",
                )
        if self.policy not in self.policies:
            raise UnsupportedPolicyError(self.name, self.policy)
        if self.policy != "paged" and self.recent_tokens is None:
            raise SpecError(
                f"policy {self.policy} keeps the last recent_tokens tokens, and there is no such number",
                remedy="set recent_tokens, e.g. to a quarter of max_model_len",
            )
        if (self.prompt_tokens is None) != (self.answer_tokens is None):
            raise SpecError(
                "of the expected traffic only one of prompt_tokens and answer_tokens is given", remedy="give both"
            )
        unused = [name for name in ("recent_tokens", "heavy_tokens") if getattr(self, name)]
        if self.policy == "paged" and unused:
            raise SpecError(f"{unused[0]} means nothing to the policy paged", remedy="remove it, or set a policy")
        if self.prompt_tokens and self.answer_tokens and self.prompt_tokens + self.answer_tokens > self.max_model_len:
            raise SpecError(
                f"the expected prompt and answer are {self.prompt_tokens + self.answer_tokens} tokens, more than "
                f"max_model_len {self.max_model_len}",
                remedy="raise max_model_len, or expect less",
            )
        if self.prompt_tokens is not None and self.shared_prefix_tokens > self.prompt_tokens:
            raise SpecError(
                f"shared_prefix_tokens {self.shared_prefix_tokens} is more than prompt_tokens {self.prompt_tokens}",
                remedy="the prefix is the beginning of the prompt",
            )

    def layout_rule(self) -> LayoutRule | None:
        """How this version of the engine lays out the cache; None: every layer is charged for every token."""
        return None

    def plan(self, shape: ModelShape, weight_bytes: int) -> KVPlan:
        """Divide the memory. weight_bytes: of the whole compressed model. Raises `SpecError` or `PreflightError`."""
        return plan_kv(shape, weight_bytes=weight_bytes, layout_rule=self.layout_rule(), **self.budget())

    @abstractmethod
    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return {file name: content}. Raise `SpecError` for what this engine cannot honour."""

    def command(self) -> str:
        """How the engine is started with these files, from the root of the release. For the README beside them."""
        return ""

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What was assumed, and what to compare when the engine starts: sentences for the README beside the files."""
        return ()
