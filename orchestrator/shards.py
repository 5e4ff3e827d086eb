"""Safetensors files whose places are all known before the first tensor is there.

Names, dtypes and shapes of a result follow from its source and its scheme, so the files are made at their full size at
once, with their headers, and each tensor is written to its place as soon as it is finished: nothing is collected in
memory, a disk that is too small is found before any compute, and what a killed run has written stays where it is.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.canonical import canonical_json, digest_of
from orchestrator.checkpoint import SINGLE_WEIGHT_FILE, WEIGHT_INDEX
from orchestrator.errors import PreflightError
from orchestrator.reader import TORCH_DTYPES, read_into, write_from

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 2_000_000_000
STORED_DTYPES = {name: stored for stored, name in TORCH_DTYPES.items()}
_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor will be: its dtype as torch names it ("bfloat16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES.get(self.dtype, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_bytes


class Shards:
    """The weight files of a folder.

    specs: every tensor, by name. Tensors go to shards of at most `max_bytes` in the order of their names (numbers by
    value, so that blocks stay together); within a shard, wider elements come first, so that all are aligned.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], *, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._specs = dict(specs)
        groups: list[list[str]] = [[]]
        size = 0
        for name in sorted(specs, key=_natural):
            if groups[-1] and size + specs[name].num_bytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += specs[name].num_bytes
        count = len(groups)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.files = [SINGLE_WEIGHT_FILE] if count == 1 else files
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._place: dict[str, tuple[str, int]] = {}  # file and offset of each tensor
        for file, names in zip(self.files, groups, strict=True):
            self._lay_out(file, names)
        self._descriptors: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    @property
    def index_bytes(self) -> int:
        """Bytes of the index, which there is if there are several files."""
        return len(self._index().encode()) if len(self.files) > 1 else 0

    @property
    def digest(self) -> str:
        """Sha256 over names, dtypes, shapes and places: equal for two layouts that are the same byte for byte."""
        return digest_of({file: header.decode() for file, header in self._headers.items()})

    def create(self) -> None:
        """Make the files at full size, with headers and index; files already there at that size are kept as they are.

        Raises `PreflightError` if the disk has no room for them.
        """
        for file, header in self._headers.items():
            descriptor = os.open(self._folder / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._descriptors[file] = descriptor
            if os.fstat(descriptor).st_size != self._sizes[file]:
                try:
                    os.posix_fallocate(descriptor, 0, self._sizes[file])
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    raise PreflightError(
                        f"the disk that holds {self._folder} has no room for the result,"
                        f" {self.num_bytes / 2**30:.2f} GiB",
                        remedy="free space there, or set ORCHESTRATOR_HOME to a folder on a larger disk",
                    ) from None
                os.ftruncate(descriptor, self._sizes[file])
            os.pwrite(descriptor, header, 0)
        if len(self.files) > 1:
            (self._folder / WEIGHT_INDEX).write_text(self._index(), encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place. Raises `ValueError` for one of another dtype or shape than was announced."""
        spec = self._specs[name]
        found = TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != spec:
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {spec.dtype} {list(spec.shape)}")
        self.write_part(name, 0, tensor)

    def write_part(self, name: str, first: int, tensor: torch.Tensor) -> None:
        """Put some elements of a tensor in their place, from the one with index `first` (of all, flat) on."""
        file, offset = self._place[name]
        if tensor.numel():
            offset += first * tensor.element_size()
            write_from(self._descriptors[file], tensor.cpu().contiguous(), offset)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that was written."""
        import torch

        spec, (file, offset) = self._specs[name], self._place[name]
        tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        if tensor.numel():
            read_into(self._descriptors[file], tensor, offset)
        return tensor

    def close(self) -> None:
        """Close the files; they are not flushed to disk."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def _index(self) -> str:
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in self._specs.values())},
            "weight_map": {name: self._place[name][0] for name in sorted(self._place)},
        }
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _lay_out(self, file: str, names: list[str]) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda n: (-self._specs[n].item_bytes, _natural(n))):
            spec = self._specs[name]
            start, end = end, end + spec.num_bytes
            shape = list(spec.shape)
            entries[name] = {"dtype": STORED_DTYPES[spec.dtype], "shape": shape, "data_offsets": [start, end]}
            self._place[name] = (file, start)
        text = canonical_json(entries)
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        self._sizes[file] = base + end
        for name in names:
            self._place[name] = (file, base + self._place[name][1])


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which layers.10 comes after layers.9."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in name.split(".")]
