"""Statistics as artifacts: one file for each distinct input of each block, found again by what it was made from.

``$ORCHESTRATOR_HOME/statistics/<key>.safetensors`` holds {H (lower triangle), n, sum x, sum |x|, max |x|}. The key is
sha256 over the bytes of the model and of the calibration tokens, the dtype, the code and libraries that compute, the
machine's instruction set, and the compressed blocks that the tokens passed before (none of them for dense inputs). So
every method, bit-width and candidate of a sweep that asks for the same record reads it, and nothing else ever does.
The Cholesky factors of a record lie beside it, by damping and order.

The folder is a cache of bounded size: what has not been used for longest goes first, but nothing that the walk at
work has used itself. A file is believed only if its content has the digest that it names.

Shape legend: I = in features, K = kinds of sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.canonical import canonical_json, digest_of, write_atomically
from orchestrator.errors import PreflightError
from orchestrator.factor import HessianFactor, Order
from orchestrator.reader import bytes_of
from orchestrator.statistics import FactorMemo, InputMoment, mirror_lower_

if TYPE_CHECKING:
    import torch

LIMIT_VARIABLE = "ORCHESTRATOR_STATISTICS_GIB"
DEFAULT_LIMIT_GIB = 20.0
_PART_SECONDS = 3600  # no file takes as long to be written
_STRIP = 128  # rows of a triangle that are stored together, so that no index of single entries is needed


class RecordStore:
    """The records below one folder. May be used from several threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._in_use: set[str] = set()

    def index(self, key: str) -> Mapping[str, str] | None:
        """Return which layer's input stands for each layer of a block, in their order; None if it is not known yet."""
        try:
            found = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            return dict(found["leader_of"]) if found["sha256"] == digest_of(found["leader_of"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def save_index(self, key: str, leader_of: Mapping[str, str]) -> None:
        """Remember which layers of a block share an input."""
        pairs = [list(pair) for pair in leader_of.items()]  # canonical JSON would sort a mapping
        content = {"leader_of": pairs, "sha256": digest_of(pairs)}
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{key}.json", canonical_json(content))

    def has(self, key: str, *, with_hessian: bool) -> bool:
        """Whether there is such a record, whole or not."""
        return any((self._folder / f"{name}.safetensors").is_file() for name in _names(key, with_hessian))

    def load(self, key: str, *, with_hessian: bool) -> InputMoment | None:
        """Return a record, its bytes verified; None if there is none or it is damaged."""
        for name in _names(key, with_hessian):
            tensors = self._read(name)
            if tensors is None:
                continue
            squares_I, sum_I, sum_abs_I, max_abs_I = tensors["sums"].clone().unbind()
            hessian_II = None
            if "lower" in tensors and with_hessian:
                hessian_II = _unpacked(tensors.pop("lower"), len(sum_I))
                mirror_lower_(hessian_II)
            moment = InputMoment(int(tensors["num_tokens"]), squares_I, sum_I, sum_abs_I, max_abs_I, hessian_II)
            moment.share_factors(self.factors(key))
            return moment
        return None

    def save(self, key: str, moment: InputMoment) -> None:
        """Keep a record, if there is room for it."""
        import torch

        sums_KI = torch.stack([moment.sum_squares_I, moment.sum_I, moment.sum_abs_I, moment.max_abs_I]).cpu()
        tensors = {"num_tokens": torch.tensor(moment.num_tokens), "sums": sums_KI}
        if moment.hessian_II is not None:
            tensors["lower"] = _packed(moment.hessian_II)
        self._write(_names(key, moment.hessian_II is not None)[0], tensors)
        moment.share_factors(self.factors(key))

    def load_costs(self, key: str, names: Sequence[str]) -> dict[str, list[float]] | None:
        """Return what `save_costs` kept for these layers, its bytes verified; None if it is not there."""
        tensors = self._read(f"{key}.costs")
        return dict(zip(names, tensors["costs"].tolist(), strict=True)) if tensors else None

    def save_costs(self, key: str, table: Mapping[str, Sequence[float]]) -> None:
        """Keep numbers of each layer, if there is room for them."""
        import torch

        self._write(f"{key}.costs", {"costs": torch.tensor(list(table.values()), dtype=torch.float64)})

    def factors(self, key: str) -> FactorMemo:
        """Remember the factors of one record: in memory while it is in use, and on disk."""
        known: dict[tuple[float, Order], HessianFactor | None] = {}

        def find(damping: float, order: Order, make: Callable[[], HessianFactor | None]) -> HessianFactor | None:
            if (damping, order) not in known:
                name = f"{key}.{order}-{damping!r}.factor"
                tensors = self._read(name)
                if tensors is None:
                    factor = make()
                    if factor is not None:
                        self._write(name, _factor_tensors(factor))
                else:
                    factor = _factor_of(tensors, order)
                known[damping, order] = factor
            return known[damping, order]

        return find

    def _read(self, name: str) -> dict[str, torch.Tensor] | None:
        from safetensors import SafetensorError, safe_open

        path = self._folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {part: file.get_tensor(part) for part in sorted(file.keys())}
                expected = (file.metadata() or {}).get("sha256")
            if _digest(tensors) != expected:
                raise SafetensorError("the content has changed")
            os.utime(path)
        except (OSError, SafetensorError, ValueError):
            with suppress(OSError):  # it may be a folder, or its folder no folder: then it is measured all the same
                path.unlink(missing_ok=True)
            return None
        self._in_use.add(path.name)
        return tensors

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store tensors if there is room for them: on a full disk the walk goes on without."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        path = self._folder / f"{name}.safetensors"
        part = self._folder / f".{name}.{os.getpid()}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._make_room(size):
                return
            save_file(dict(tensors), part, {"sha256": _digest(tensors)})
            part.replace(path)
        except (OSError, SafetensorError):  # safetensors has an error of its own for a full disk
            return
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        self._in_use.add(path.name)

    def _make_room(self, size: int) -> bool:
        """Remove what was used longest ago until `size` more bytes keep the limit; False if that is not possible."""
        for part in self._folder.glob(".*.part"):  # of killed runs
            with suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > _PART_SECONDS:
                    part.unlink()
        found = []
        for path in self._folder.glob("*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another run has removed it
                continue
            found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(bytes_ for _, bytes_, _ in found) + size
        for _, bytes_, path in sorted(found):
            if total <= self._limit:
                break
            if path.name not in self._in_use:
                path.unlink(missing_ok=True)
                total -= bytes_
        return total <= self._limit


def limit_from(environment: Mapping[str, str]) -> int:
    """Bytes that records may take, from `ORCHESTRATOR_STATISTICS_GIB`. Raises `PreflightError` for no such number."""
    text = environment.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GIB)
    try:
        gib = float(text)
        if not 0 <= gib <= 1_000_000:
            raise ValueError(text)
    except ValueError:
        raise PreflightError(f"{LIMIT_VARIABLE} is {text!r}, not a number of GiB", remedy="write 20, or 0.5") from None
    return int(gib * 2**30)


def _names(key: str, with_hessian: bool) -> list[str]:
    """Files that can answer: a record with H also holds all that one without it does."""
    return [f"{key}.moment"] if with_hessian else [f"{key}.norms", f"{key}.moment"]


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} ".encode())
        whole.update(bytes_of(tensors[name]))
    return whole.hexdigest()


def _packed(matrix_II: torch.Tensor) -> torch.Tensor:
    """The lower triangle by strips of rows, each up to the end of its square on the diagonal."""
    import torch

    ends = range(_STRIP, len(matrix_II) + _STRIP, _STRIP)
    return torch.cat([matrix_II[end - _STRIP : end, :end].reshape(-1) for end in ends]).cpu()


def _unpacked(lower: torch.Tensor, num: int) -> torch.Tensor:
    """Undo `_packed`; what lies above the squares on the diagonal is zero."""
    import torch

    matrix_II = torch.zeros(num, num)
    first = 0
    for start in range(0, num, _STRIP):
        end = min(start + _STRIP, num)
        count = (end - start) * end
        matrix_II[start:end, :end] = lower[first : first + count].view(end - start, end)
        first += count
    return matrix_II


def _factor_tensors(factor: HessianFactor) -> dict[str, torch.Tensor]:
    import torch

    tensors = {
        "lower": _packed(factor.unit_lower_II),
        "pivots": factor.pivots_I.cpu(),
        "dead": factor.dead_I.cpu(),
        "numbers": torch.tensor([factor.mean, factor.damping, factor.num_raised], dtype=torch.float64),
    }
    if factor.order_I is not None:
        tensors["order"] = factor.order_I.cpu()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _factor_of(tensors: Mapping[str, torch.Tensor], order: Order) -> HessianFactor:
    mean, damping, num_raised = tensors["numbers"].tolist()
    unit_lower_II = _unpacked(tensors["lower"], len(tensors["pivots"]))
    pivots_I, dead_I = tensors["pivots"].clone(), tensors["dead"].clone()
    order_I = tensors["order"].clone() if order == "falling" else None
    return HessianFactor(unit_lower_II, pivots_I, order_I, dead_I, mean, damping, int(num_raised))
