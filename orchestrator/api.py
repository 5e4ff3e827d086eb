"""The only module of the core that a plugin imports. What is listed here is stable within an API version."""

from __future__ import annotations

from orchestrator.attention import LayerCache, ModelShape
from orchestrator.blocks import decoder_blocks
from orchestrator.bootstrap import Quantile, Quotient, Samples
from orchestrator.cache_dtypes import CacheDtype
from orchestrator.cache_policy import CachePolicy
from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint, LayerShape
from orchestrator.columns import Removal, SaliencyMask, lowest, solve_columns
from orchestrator.errors import (
    GateError,
    OrchestratorError,
    PreflightError,
    Problem,
    PublishError,
    SpecError,
    StepError,
)
from orchestrator.export_format import ExportFacts, ExportFormat
from orchestrator.factor import MAX_RAISES, HessianFactor
from orchestrator.kv_scales import kv_scale_names, read_kv_scales
from orchestrator.layer_method import (
    InputMode,
    LayerCosts,
    LayerMethod,
    LayerResult,
    MixedMethod,
    Needs,
    ScalingMethod,
)
from orchestrator.method import (
    DENSE,
    TRAINED_TOKENS,
    CalibrationSources,
    Calibrator,
    Context,
    Evaluator,
    HeldOutSources,
    Invariant,
    Measured,
    Method,
    ModelMethod,
    ModelResult,
    Publisher,
    Stage,
    TextSource,
    TierFolders,
    WeightedModels,
)
from orchestrator.nm import require_own_sparsity, run_of, unfilled_runs
from orchestrator.packing import unpack
from orchestrator.parallel import in_parallel
from orchestrator.plugins import API_VERSION, hookimpl
from orchestrator.reader import TensorReader
from orchestrator.recalibration import Recalibration, Remade, Variant
from orchestrator.scheme import FLOAT8_MAX, InputScheme, QuantizedWeight, QuantScheme
from orchestrator.serving import KVGroup, KVPlan, Layout, LayoutRule, every_layer_in_full, heads_bytes, token_steps
from orchestrator.serving_engine import ServingEngine, UnsupportedPolicyError
from orchestrator.signing import key_fingerprint
from orchestrator.sources import check_source, check_text_size, read_documents
from orchestrator.statistics import InputMoment
from orchestrator.store import Release, StoredFile, open_store
from orchestrator.text import token_windows
from orchestrator.work import ModelFacts, Work

__all__ = [
    "API_VERSION",
    "DENSE",
    "FLOAT8_MAX",
    "MAX_RAISES",
    "TRAINED_TOKENS",
    "CacheDtype",
    "CachePolicy",
    "CalibrationSet",
    "CalibrationSources",
    "Calibrator",
    "Checkpoint",
    "Context",
    "Evaluator",
    "ExportFacts",
    "ExportFormat",
    "GateError",
    "HeldOutSources",
    "HessianFactor",
    "InputMode",
    "InputMoment",
    "InputScheme",
    "Invariant",
    "KVGroup",
    "KVPlan",
    "LayerCache",
    "LayerCosts",
    "LayerMethod",
    "LayerResult",
    "LayerShape",
    "Layout",
    "LayoutRule",
    "Measured",
    "Method",
    "MixedMethod",
    "ModelFacts",
    "ModelMethod",
    "ModelResult",
    "ModelShape",
    "Needs",
    "OrchestratorError",
    "PreflightError",
    "Problem",
    "PublishError",
    "Publisher",
    "QuantScheme",
    "Quantile",
    "QuantizedWeight",
    "Quotient",
    "Recalibration",
    "Release",
    "Remade",
    "Removal",
    "SaliencyMask",
    "Samples",
    "ScalingMethod",
    "ServingEngine",
    "SpecError",
    "Stage",
    "StepError",
    "StoredFile",
    "TensorReader",
    "TextSource",
    "TierFolders",
    "UnsupportedPolicyError",
    "Variant",
    "WeightedModels",
    "Work",
    "check_source",
    "check_text_size",
    "decoder_blocks",
    "every_layer_in_full",
    "heads_bytes",
    "hookimpl",
    "in_parallel",
    "key_fingerprint",
    "kv_scale_names",
    "lowest",
    "open_store",
    "read_documents",
    "read_kv_scales",
    "require_own_sparsity",
    "run_of",
    "solve_columns",
    "token_steps",
    "token_windows",
    "unfilled_runs",
    "unpack",
]
