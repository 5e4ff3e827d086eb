"""What the zeros of a pruned model are worth, in a sentence: nothing, unless its layout leaves them out.

Follows from what was checked on the stored bytes (the invariant `zeros`) and from the headers of the files. A pruned
model in an ordinary layout is as large and as slow as before: kernels multiply zeros like other numbers. Imports no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from orchestrator.artifact import Artifact, model_of
from orchestrator.checkpoint import Checkpoint
from orchestrator.report import size_text

_WEIGHT = re.compile(r"(?:.+\.)?(?:layers|h|blocks)\.\d+\..+\.(?:weight|weight_packed)")
# The layouts of compressed-tensors that store the other half of 2:4 alone, for which engines have kernels.
SPARSE_LAYOUTS = frozenset({"marlin-24", "sparse-24-bitmask"})


def zeros_of(artifact: Artifact) -> str | None:
    """Return the sentence for a model in the store."""
    return zeros_note(model_of(artifact), artifact.manifest["invariants"])


def zeros_note(model: Checkpoint, invariants: Mapping[str, Any]) -> str | None:
    """Say what share of the weights is zero and that neither bytes nor time are saved by it; None without zeros.

    invariants: those of the model's artifact.
    """
    zeros = invariants.get("zeros")
    if zeros is None:
        return None
    fraction, pattern = float(zeros["fraction"]), zeros.get("pattern")
    named = f" ({pattern})" if pattern and ":" in pattern else ""
    what = f"{fraction:.1%} of the weights in decoder blocks are zero{named}"
    layout = _layout(model.config)
    if layout in SPARSE_LAYOUTS:
        return f"{what}, and {layout} leaves them out of the files; engines with kernels for it save time too"
    weights = sum(
        info.num_bytes for name, info in model.tensors.items() if _WEIGHT.fullmatch(name) and len(info.shape) > 1
    )
    return (
        f"{what}, stored and multiplied like other numbers: {size_text(fraction * weights)} of the"
        f" {size_text(model.weight_bytes())} on disk are zeros, and no kernel skips them. They save neither bytes nor"
        " time."
    )


def _layout(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config") or {}
    sparsity = quantization.get("sparsity_config") or {}
    found = [layout for layout in (sparsity.get("format"), quantization.get("format")) if layout]
    return next((layout for layout in found if layout in SPARSE_LAYOUTS), found[0] if found else None)
