"""How much of a text stands in what the model was calibrated or trained on too.

Counted are runs of 13 tokens, as in the contamination study of Brown et al. 2020, arXiv:2005.14165, appendix C. They
are compared by a 64-bit polynomial hash, so that two different ones are taken for one about once in 10^19.

Shape legend: N = windows, T = tokens of a window, R = runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

OVERLAP = "calibration_overlap"
OVERLAP_METRIC = {
    OVERLAP: "share of the runs of 13 tokens that stand in what the model was calibrated or trained on, 0 to 1"
}
RUN_TOKENS = 13
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplying loses nothing modulo 2^64


def overlap(tokens_NT: torch.Tensor, *seen_NT: torch.Tensor) -> float:
    """Return the share, 0 to 1, of the runs in the windows [N, T] that are in one of the other sets; 0 of none."""
    import numpy as np

    runs_R = _hashes(tokens_NT)
    if not runs_R.size or not seen_NT:
        return 0.0
    return float(np.isin(runs_R, np.unique(np.concatenate([_hashes(set_NT) for set_NT in seen_NT]))).mean())


def _hashes(tokens_NT: torch.Tensor) -> NDArray[np.uint64]:
    """Return a hash [R] for each run within a window."""
    import numpy as np

    values_NT = tokens_NT.numpy().astype(np.uint64) + np.uint64(1)
    starts = max(0, values_NT.shape[1] - RUN_TOKENS + 1)
    hashes_NR = np.zeros((len(values_NT), starts), np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(RUN_TOKENS):
            part_NR = values_NT[:, offset : offset + starts]
            hashes_NR = hashes_NR * np.uint64(_MULTIPLIER) + part_NR * (part_NR ^ np.uint64(0xD1B54A32D192ED03))
    return hashes_NR.ravel()
