"""How far the logits of llama.cpp, on the written file, are from those of Transformers on the release's model.

Shape legend: N = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api import CalibrationSet, StepError
from orchestrator_export.llama_cpp import logits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

LENGTH = 128  # tokens of a sequence; fewer if the model takes no more

# The KL divergence, nats, that a file may show whose weights are those of the checkpoint, rounded to the type at most.
# llama.cpp rounds what enters a product to the precision of the weights, keys and values to float16, GELU to a table.
# Random models of three blocks show 1e-6 (f32), 8e-6 (f16) and 3e-4 (bf16); what is computed otherwise, 0.01 and more.
ALLOWED_KL: Mapping[str, float] = {"f32": 1e-4, "f16": 1e-4, "bf16": 5e-3}
# The same where the weights are exact and what enters a product is rounded to blocks of 8 bits: up to 0.012 is seen.
ALLOWED_KL_BLOCKS = 0.05


def tokens_for(
    calibration: CalibrationSet | None, wanted: int, positions: int, vocabulary: int, seed: int
) -> torch.Tensor:
    """Return token ids [N, T], about `wanted`: the first of the calibration set, else random ones."""
    import torch

    length = min(LENGTH, positions, wanted)
    if calibration is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (max(1, wanted // length), length), generator=generator)
    length = min(length, calibration.tokens_NT.shape[1])
    return calibration.tokens_NT[: max(1, wanted // length), :length]


def reference_logits(model: Any, tokens_NT: torch.Tensor) -> torch.Tensor:
    """The logits [N, T, V] of a Transformers model in float32, sequence by sequence."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=tokens_T[None], use_cache=False).logits.float() for tokens_T in tokens_NT])


def compare(path: Path, tokens_NT: torch.Tensor, reference_NTV: torch.Tensor, scratch: Path) -> dict[str, float]:
    """Run llama.cpp and return the differences by name. Raises `StepError` if it cannot run the file."""
    import torch

    found: NDArray[np.float32] = logits(path, tokens_NT.numpy(), scratch)
    if found.shape != tuple(reference_NTV.shape):
        raise StepError(f"llama.cpp gives logits {found.shape}, Transformers {tuple(reference_NTV.shape)}")
    kl, largest, agreeing = [], 0.0, 0
    for number, reference_TV in enumerate(reference_NTV):
        other_TV = torch.from_numpy(found[number].copy())
        if not bool(other_TV.isfinite().all()):
            raise StepError(f"llama.cpp's logits of {path.name} are not finite", remedy="export it as type f32")
        log_p_TV, log_q_TV = reference_TV.log_softmax(-1), other_TV.log_softmax(-1)
        kl.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).clamp(min=0))
        largest = max(largest, float((reference_TV - other_TV).abs().max()))
        agreeing += int((reference_TV.argmax(-1) == other_TV.argmax(-1)).sum())
    kl_P = torch.cat(kl).double()
    return {
        "kl_mean": float(kl_P.mean()),
        "kl_median": float(kl_P.median()),
        "kl_max": float(kl_P.max()),
        "max_logit_difference": largest,
        "top1_agreement": agreeing / len(kl_P),
        "tokens": len(kl_P),
    }
