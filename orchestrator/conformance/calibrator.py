"""Checks for a `Calibrator`.

Shape legend: N = sequences, T = tokens of a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.calibration import CalibrationSet
from orchestrator.conformance.bits import same_bytes
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.method import Calibrator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_calibrator(method: Calibrator, laboratory: Laboratory, findings: Findings) -> None:
    """The checks S1 to S4, C7 and C8."""
    tokenizer = laboratory.dense.load_tokenizer()
    drawn = [_sample(method, tokenizer, seed, global_seed, findings) for seed, global_seed in ((0, 0), (0, 1), (1, 0))]
    first, again, other = drawn
    if first is None or again is None or other is None or not _check_tokens(first, laboratory, findings):
        return
    findings.expect(
        "C8 deterministic",
        same_bytes(first.tokens_NT, again.tokens_NT) and first.provenance == again.provenance,
        "`sample` gave two sets for one seed; draw only from generators seeded with `seed`, and keep time and paths of "
        "the machine out of the provenance",
    )
    findings.expect(
        "S3 seed",
        not same_bytes(first.tokens_NT, other.tokens_NT),
        "the seeds 0 and 1 draw the same tokens; use `seed`, or (if the windows take the whole text) give check_method "
        "a smaller number of windows",
    )
    _check_storable(first, laboratory, findings)


def _sample(
    method: Calibrator, tokenizer: PreTrainedTokenizerBase, seed: int, global_seed: int, findings: Findings
) -> CalibrationSet | None:
    drawn = None
    with findings.attempt("S1 runs", "`sample`"), left_alone(findings, "`sample`", seed=global_seed):
        drawn = method.sample(tokenizer, seed)
        if not isinstance(drawn, CalibrationSet):
            findings.fail("S1 runs", f"`sample` returned {type(drawn).__name__}; return a CalibrationSet")
            drawn = None
    return drawn


def _check_tokens(drawn: CalibrationSet, laboratory: Laboratory, findings: Findings) -> bool:
    import torch

    tokens = drawn.tokens_NT
    if not findings.expect(
        "S2 tokens",
        isinstance(tokens, torch.Tensor) and tokens.dtype is torch.int64 and tokens.ndim == 2 and tokens.numel() > 0,
        f"tokens_NT is {getattr(tokens, 'dtype', type(tokens).__name__)} {tuple(getattr(tokens, 'shape', ()))}; make "
        "it torch.int64 [N, T] with no empty dimension",
    ):
        return False
    vocabulary = int(laboratory.dense.config["vocab_size"])
    low, high = int(tokens.min()), int(tokens.max())
    return findings.expect(
        "S2 tokens",
        low >= 0 and high < vocabulary,
        f"tokens reach from {low} to {high}, the vocabulary from 0 to {vocabulary - 1}; use the tokenizer that "
        "`sample` is given, and no padding",
    )


def _check_storable(drawn: CalibrationSet, laboratory: Laboratory, findings: Findings) -> None:
    with findings.attempt("S4 storable", "saving and loading the set"):
        contents = []
        for name in ("one", "two"):
            folder = laboratory.folder / f"set-{name}"
            folder.mkdir(exist_ok=True)
            drawn.save(folder)
            contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        loaded = CalibrationSet.load(laboratory.folder / "set-one")
        findings.expect("S4 storable", contents[0] == contents[1], "saving the set twice gives two different files")
        findings.expect(
            "S4 storable",
            same_bytes(loaded.tokens_NT, drawn.tokens_NT) and dict(loaded.provenance) == dict(drawn.provenance),
            f"{dict(drawn.provenance)!r} comes back as {dict(loaded.provenance)!r}; use str keys and plain JSON values",
        )
