"""Where a model has its decoder blocks: no architecture is listed. Imports no torch by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import PreflightError

if TYPE_CHECKING:
    from torch import nn


def decoder_blocks(root: nn.Module, count: int) -> list[str]:
    """Return the names of the decoder blocks of `root`: the only outermost list of `count` modules.

    Raises `PreflightError` if there is no such list, or more than one.
    """
    from torch import nn

    found: list[str] = []
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found.append(name)
    if len(found) != 1:
        raise PreflightError(
            f"its decoder blocks were not found: {len(found)} lists of {count} modules",
            remedy="use a decoder-only model whose blocks are one list",
        )
    return [f"{found[0]}.{index}" for index in range(count)]
