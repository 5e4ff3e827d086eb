"""Which layers of a model a step touches, and which layers serving engines fuse. Names only: imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

# Serving engines load each of these sets as one matrix, so its members must share one quantization scheme.
FUSED_SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a pattern of `skip` matches the full layer name or its last components.

    ``down_proj``, ``mlp.*``, ``layers.0.*`` and ``model.layers.[01].*`` are all patterns; case matters.
    """
    parts = name.split(".")
    tails = [".".join(parts[start:]) for start in range(len(parts))]
    return any(fnmatchcase(tail, pattern) for pattern in skip for tail in tails)


def ignored_layers(names: Iterable[str], skip: Sequence[str]) -> list[str]:
    """Return the layers that stay unquantized, sorted: the output head and what `skip` matches."""
    return sorted({"lm_head", *(name for name in names if is_skipped(name, skip))})


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the sets of layers among `names` that engines fuse, each in the order of `FUSED_SETS`."""
    present = set(names)
    groups = set()
    for name in present:
        parent, _, leaf = name.rpartition(".")
        for members in FUSED_SETS:
            if leaf in members:
                full = [f"{parent}.{member}" if parent else member for member in members]
                groups.add(tuple(member for member in full if member in present))
    return sorted(group for group in groups if len(group) > 1)


def split_fused_groups(names: Iterable[str], skip: Sequence[str]) -> list[str]:
    """Return one sentence for each fused set that `skip` would tear apart."""
    return list(_splits(names, skip))


def _splits(names: Iterable[str], skip: Sequence[str]) -> Iterator[str]:
    for group in fused_groups(names):
        skipped = [name for name in group if is_skipped(name, skip)]
        if skipped and len(skipped) < len(group):
            parent = group[0].rpartition(".")[0]
            left_out = ", ".join(name.rpartition(".")[2] for name in skipped)
            members = ", ".join(name.rpartition(".")[2] for name in group)
            yield (
                f"skip leaves out {left_out} of {parent}, but serving engines fuse {members} into one matrix with one"
                " quantization scheme"
            )
