"""Writing a GGUF file tensor by tensor, and what became of the weights on the way.

Every tensor is read back from the bytes that go into the file (gguf-py's dequantization, not the code that packed it)
and compared with what the checkpoint stands for: how many weights changed, and whether every pruned zero is a zero.

Shape legend: E = experts, R = rows, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.api import QuantScheme, StepError
from orchestrator_export.architectures import Carried, Target
from orchestrator_export.grids import PLAIN_REMEDY, as_blocks, carriers
from orchestrator_export.llama_cpp import quantize
from orchestrator_export.tensor_types import (
    FILE_TYPE_NUMBERS,
    PLAIN,
    WIDEST_BLOCK,
    ModelFigures,
    is_matrix,
    matrix_type,
)
from orchestrator_export.vocabulary import Vocabulary
from orchestrator_export.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STORED_AS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass
class Account:
    """What became of the weights of all matrices. fallback: matrices that got another type than asked for."""

    weights: int = 0
    changed: int = 0
    matrices: dict[str, int] = field(default_factory=dict)
    fallback: list[str] = field(default_factory=list)


def figures(carried: Carried) -> ModelFigures:
    """What llama.cpp's mixtures look at."""
    return ModelFigures(carried.layers, carried.heads, carried.kv_heads, carried.experts, carried.tied)


def tensor_type(target: Target, file_type: str, scheme: QuantScheme | None, exact: str, carried: Carried) -> str:
    """The type of a tensor.

    scheme: of the grid on which it is. exact: in a file that is to change nothing, the type of tensors on no grid, else
    "".
    """
    if not is_matrix(target.name, len(target.shape)):
        return "f32"
    if scheme is not None and file_type not in PLAIN:
        return carriers(scheme)[0] if exact else file_type
    return exact or matrix_type(target.name, target.shape[-1], file_type, figures(carried))


def write_file(
    path: Path,
    carried: Carried,
    vocabulary: Vocabulary,
    weights: Weights,
    file_type: str,
    *,
    exact: str = "",
    zeros: bool,
) -> Account:
    """Write the file; the same checkpoint gives the same bytes. Raises `StepError` for a tensor that cannot be carried.

    file_type: a type of `tensor_types`, not "auto". exact: see `tensor_type`. zeros: whether zeros must stay.
    """
    import gguf
    import numpy as np

    targets = carried.targets(weights.shapes)
    factors = carried.rope_factors()
    account = Account()
    types = [tensor_type(target, file_type, weights.scheme(target), exact, carried) for target in targets]
    writer = gguf.GGUFWriter(path, carried.family.arch)
    try:
        for method, value in carried.entries():
            getattr(writer, method)(value)
        writer.add_file_type(FILE_TYPE_NUMBERS[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.write(writer)
        for target, kind in zip(targets, types, strict=True):
            number = gguf.GGMLQuantizationType[kind.upper()]
            width = gguf.quant_shape_to_byte_shape(target.shape, number)
            writer.add_tensor_info(target.name, width, np.dtype(np.uint8), int(np.prod(width)), number)
        if factors is not None:
            factors_H = np.array(factors, np.float32)
            writer.add_tensor_info("rope_freqs.weight", factors_H.shape, factors_H.dtype, factors_H.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, kind in zip(targets, types, strict=True):
            writer.write_tensor_data(_encode(target, kind, weights, zeros, account))
            if is_matrix(target.name, len(target.shape)):
                account.matrices[kind] = account.matrices.get(kind, 0) + 1
                if not (exact or weights.scheme(target)):
                    usual = matrix_type(target.name, WIDEST_BLOCK, file_type, figures(carried))
                    account.fallback += [target.name] if kind != usual else []
        if factors is not None:
            writer.write_tensor_data(factors_H)
    finally:
        writer.close()
    return account


def _encode(target: Target, kind: str, weights: Weights, zeros: bool, account: Account) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, with what became of its weights added to the account."""
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind.upper()]
    on_grid = weights.scheme(target) is not None and kind not in PLAIN
    parts = []
    for name in target.sources:
        if on_grid:
            weight = weights.grid(name, target)
            packed = as_blocks(weight, kind, name)
            meant = weight.q_OI.float()
            width = weight.scheme.group_width(meant.shape[1])
            if weight.zero_point_OG is not None:
                meant = meant - weight.zero_point_OG.float().repeat_interleave(width, 1)
            wanted = (meant * weight.scale_OG.float().repeat_interleave(width, 1)).numpy()
        else:
            wanted = weights.dense(name, target)
            packed = _bytes_of(wanted, kind, int(number), name)
        held = gguf.dequantize(packed, number).reshape(wanted.shape)
        _check(name, kind, wanted, held, zeros=zeros and target.name.startswith("blk."), exact=on_grid)
        if wanted.ndim > 1:
            account.weights += wanted.size
            account.changed += int((held != wanted).sum())
        parts.append(packed)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check(
    name: str, kind: str, wanted: NDArray[np.float32], held: NDArray[np.float32], *, zeros: bool, exact: bool
) -> None:
    import numpy as np

    if not np.isfinite(held).all():
        raise StepError(
            f"GGUF type {kind} cannot carry {name}: {np.abs(wanted).max():.6g} is beyond what it holds",
            remedy="export it as type bf16 or f32",
        )
    if zeros and wanted.ndim > 1 and held[wanted == 0].any():
        raise StepError(
            f"GGUF type {kind} does not keep the zeros of {name}",
            remedy="export it as type q8_0, q4_0 or f16, which keep them",
        )
    if exact and (held != wanted).any():
        raise StepError(f"GGUF type {kind} does not hold the grid of {name} exactly", remedy=PLAIN_REMEDY)


def _bytes_of(weight: NDArray[np.float32], kind: str, number: int, name: str) -> NDArray[np.uint8]:
    import numpy as np
    import torch

    if not np.isfinite(weight).all():
        raise StepError(f"{name} holds numbers that are not finite", remedy="look at the steps before")
    if kind == "f32":
        return weight.view(np.uint8)
    if kind in PLAIN:
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        rounded: NDArray[np.uint8] = torch.from_numpy(weight).to(dtype).view(torch.uint8).numpy()
        return rounded
    return quantize(weight, number)


def exact_plain_type(stored: Sequence[str]) -> str:
    """The plain type that holds tensors stored in these dtypes (as safetensors names them) exactly."""
    kinds = {_STORED_AS.get(dtype, "f32") for dtype in stored}
    return kinds.pop() if len(kinds) == 1 else "f32"
