"""Reading stored tensors by name, so that nothing but the tensors asked for is ever in memory.

Bytes are read into the tensor itself instead of being mapped: pages of a mapped file count as memory of the process
for as long as they are cached, and then no bound could be kept or shown. The kernel's page cache still does its part;
`prefetch` tells it what comes next.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from orchestrator.errors import PreflightError

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint import Checkpoint, TensorInfo

# Names of dtypes in safetensors and in torch.
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class TensorReader:
    """Reads stored tensors; files stay open until `close`. May be used from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files = {
            name: os.open(checkpoint.path / name, os.O_RDONLY | os.O_CLOEXEC) for name in checkpoint.weight_files
        }

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor as stored. Raises `PreflightError` if the file has become shorter meanwhile."""
        info = self._checkpoint.tensors[name]
        tensor = _empty(name, info)
        self._fill(tensor, info, info.start)
        return tensor

    def rows(self, name: str, indices: Iterable[int]) -> torch.Tensor:
        """Return some rows of a matrix, without reading the others."""
        info = self._checkpoint.tensors[name]
        width = info.num_bytes // info.shape[0]
        rows = list(indices)
        part = type(info)(info.file, info.dtype, (len(rows), *info.shape[1:]), 0, width * len(rows))
        tensor = _empty(name, part)
        for place, index in enumerate(rows):
            self._fill(tensor[place], info, info.start + index * width)
        return tensor

    def chunks(self, name: str, max_bytes: int = 1 << 26) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index of the first element, elements) of a tensor of any size, flat, a piece at a time."""
        info = self._checkpoint.tensors[name]
        count = math.prod(info.shape)
        item = info.num_bytes // max(count, 1)
        step = max(1, max_bytes // max(item, 1))
        for first in range(0, count, step):
            size = min(step, count - first)
            piece = type(info)(info.file, info.dtype, (size,), info.start + first * item, size * item)
            tensor = _empty(name, piece)
            self._fill(tensor, piece, piece.start)
            yield first, tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the kernel to read these tensors into its cache, in the background."""
        for name in names:
            info = self._checkpoint.tensors[name]
            os.posix_fadvise(self._files[info.file], info.start, info.num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _fill(self, tensor: torch.Tensor, info: TensorInfo, offset: int) -> None:
        if tensor.numel() and not read_into(self._files[info.file], tensor, offset):
            raise PreflightError(
                f"{self._checkpoint.path / info.file} has become shorter while it was read",
                remedy="copy the model again, and leave it alone while a run reads it",
            )


def read_into(descriptor: int, tensor: torch.Tensor, offset: int) -> bool:
    """Fill a contiguous tensor with the bytes of a file from `offset` on; False if there are too few."""
    view = bytes_of(tensor)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_from(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """Write the bytes of a contiguous tensor into a file at `offset`."""
    view = bytes_of(tensor)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _empty(name: str, info: TensorInfo) -> torch.Tensor:
    import torch

    if info.dtype not in TORCH_DTYPES:
        raise PreflightError(f"{name} is stored as {info.dtype}, which torch does not have", remedy="convert the model")
    return torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
