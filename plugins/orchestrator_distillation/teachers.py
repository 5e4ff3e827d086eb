"""How the teacher is reached: in memory, or through a cache of what it said about the training windows.

An `Ensemble` is one or more models; its distribution is the weighted mean of theirs, and they score any text. A
`TeacherCache` holds, for every position of given windows, the logarithms of the K largest probabilities and of the
tail. The teacher runs once, before the student is loaded, and then takes neither memory nor time. The cache lies in
the home and serves all steps and runs with the same teacher, windows, K and temperature.

Its files are named by what they were made from, and say so inside; each ends with a digest. One that is torn, damaged
or was made from something else is set aside and made anew.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, P = positions, C = positions of a chunk,
V = vocabulary, K = tokens named at each position, K1 = K + 1, the tail being last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.api import Checkpoint, StepError
from orchestrator_distillation.objective import TeacherChunk, top_and_tail
from orchestrator_distillation.outputs import Compute, Scorer

if TYPE_CHECKING:
    import torch

_WINDOWS_PER_FILE = 64
_FORMAT = "1"
_LEAST = -1e4  # of a log-probability: exp of it is 0


class Said(Protocol):
    """What the teacher says at the positions of one batch."""

    def at(self, rows_C: torch.Tensor) -> TeacherChunk:
        """Return its distribution at some positions of the batch."""


class Ensemble:
    """Models with their weights, which sum up to 1."""

    def __init__(self, members: Sequence[tuple[float, Scorer]], temperature: float = 1.0) -> None:
        total = math.fsum(weight for weight, _ in members)
        self.members = [(weight / total, scorer) for weight, scorer in members]
        self.temperature = temperature

    @classmethod
    def load(
        cls, models: Sequence[tuple[Checkpoint, float]], temperature: float, compute: Compute, device: Any = "cpu"
    ) -> Ensemble:
        """Load every model in float32."""
        members = []
        for checkpoint, weight in models:
            model: Any = checkpoint.load()
            members.append((weight, Scorer(model.float().eval().requires_grad_(False).to(device), compute)))
        return cls(members, temperature)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that are scored."""
        return self.members[0][1].vocabulary

    def listen(self, tokens_BT: torch.Tensor) -> _Heard:
        """Run over a batch; what is said at a position is worked out when it is asked for."""
        import torch

        with torch.no_grad():
            return _Heard(self, [scorer.states(tokens_BT) for _, scorer in self.members])


@dataclass(frozen=True)
class _Heard:
    ensemble: Ensemble
    states: Sequence[torch.Tensor]

    def at(self, rows_C: torch.Tensor) -> TeacherChunk:
        import torch

        parts, temperature = [], self.ensemble.temperature
        with torch.no_grad():
            for (weight, scorer), states_PX in zip(self.ensemble.members, self.states, strict=True):
                logits_CV = scorer.logits(states_PX[rows_C]).float()
                log_p_CV = (logits_CV if temperature == 1 else logits_CV / temperature).log_softmax(-1)
                parts.append(log_p_CV if len(self.states) == 1 else log_p_CV + math.log(weight))
            log_p_CV = parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)
            # Some models rule tokens out with logits of -inf, and 0 ln 0 is 0.
            return TeacherChunk(log_p_CV.clamp_min_(_LEAST))


@dataclass(frozen=True)
class Remembered:
    """What a cache holds about the windows of one batch: [P, K1] and [P, K]."""

    log_p_PK1: torch.Tensor
    ids_PK: torch.Tensor

    def at(self, rows_C: torch.Tensor) -> TeacherChunk:
        """Look it up."""
        return TeacherChunk(self.log_p_PK1[rows_C], self.ids_PK[rows_C].long())


class TeacherCache:
    """The files of one teacher, set of windows, K and temperature in a folder.

    identity: JSON-able facts that decide what the teacher says, all of them.
    """

    def __init__(self, folder: Path, tokens_NT: torch.Tensor, top: int, identity: Mapping[str, Any]) -> None:
        self._tokens_NT = tokens_NT
        self._top = top
        facts = {**identity, "tokens": _digest(tokens_NT), "top": top, "format": _FORMAT}
        self._identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = folder / f"teacher-{self._identity[:32]}"
        self._open: dict[int, Any] = {}  # files, mapped: what is not asked for takes no memory
        self.set_aside = 0  # files that could not be used
        self.made = 0  # files that were

    def fill(self, load: Callable[[], Ensemble], progress: Callable[[float, str], None]) -> None:
        """Make the files that are missing. `load` is called if there are any; the teacher is let go at the end."""
        try:
            if self.folder.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "is a link", str(self.folder))
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # of another user: it may be swept away, then it is made anew
                os.utime(self.folder)  # what is in use is not swept away
            missing = [number for number in range(self._count()) if not self._is_whole(number)]
        except OSError as error:
            raise StepError(
                f"the teacher's cache {self.folder} cannot be used: {error.strerror}", remedy="remove it, and run again"
            ) from error
        if not missing:
            return
        teacher = load()
        for done, number in enumerate(missing):
            part = slice(number * _WINDOWS_PER_FILE, (number + 1) * _WINDOWS_PER_FILE)
            self._write(number, *self._ask(teacher, self._tokens_NT[part]))
            self.made += 1
            progress((done + 1) / len(missing), f"teacher: {min(part.stop, len(self._tokens_NT))} windows in the cache")

    def listen(self, windows_B: torch.Tensor) -> Remembered:
        """Return what is said about the windows of these numbers. Raises `StepError` if a file has gone bad."""
        import torch

        log_p, ids = [], []
        for window in windows_B.tolist():
            number, row = divmod(window, _WINDOWS_PER_FILE)
            if number not in self._open:
                if not self._is_whole(number):
                    raise StepError(
                        f"{self._path(number)} was damaged or removed while it was in use", remedy="run again"
                    )
                self._open[number] = _mapped(self._path(number))
            log_p.append(self._open[number].get_slice("log_p")[row])
            ids.append(self._open[number].get_slice("ids")[row])
        return Remembered(torch.cat(log_p), torch.cat(ids))

    def _count(self) -> int:
        return -(-len(self._tokens_NT) // _WINDOWS_PER_FILE)

    def _path(self, number: int) -> Path:
        return self.folder / f"windows-{number:06d}.safetensors"

    def _ask(self, teacher: Ensemble, tokens_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        shape = (*tokens_NT.shape, self._top)
        log_p_NTK1 = torch.empty(*shape[:2], self._top + 1)
        ids_NTK = torch.empty(shape, dtype=torch.int32)
        for window, tokens_T in enumerate(tokens_NT):
            heard = teacher.listen(tokens_T.unsqueeze(0).to(teacher.members[0][1].model.device))
            for rows_C in torch.split(torch.arange(len(tokens_T)), teacher.members[0][1].chunk_size()):
                chunk = top_and_tail(heard.at(rows_C).log_p, self._top)
                if not bool(chunk.log_p.isfinite().all()):
                    raise StepError("the teacher gives probabilities that are not finite", remedy="check its weights")
                assert chunk.ids_CK is not None
                log_p_NTK1[window, rows_C] = chunk.log_p.cpu()
                ids_NTK[window, rows_C] = chunk.ids_CK.int().cpu()
        return log_p_NTK1, ids_NTK

    def _write(self, number: int, log_p_NTK1: torch.Tensor, ids_NTK: torch.Tensor) -> None:
        from safetensors.torch import save_file

        facts = {"identity": self._identity, "number": str(number), "sha256": _digest(log_p_NTK1, ids_NTK)}
        path = self._path(number)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        save_file({"log_p": log_p_NTK1, "ids": ids_NTK}, unfinished, facts)
        unfinished.replace(path)

    def _is_whole(self, number: int) -> bool:
        """Whether a file is there. One that is not what it should be is set aside."""
        from safetensors import SafetensorError, safe_open

        path = self._path(number)
        if not os.path.lexists(path):
            return False
        if path.is_symlink() or not path.is_file():
            raise FileExistsError(errno.EEXIST, f"{path.name} is no plain file", str(path))
        try:
            with safe_open(path, "pt") as file:
                facts, log_p, ids = file.metadata() or {}, file.get_tensor("log_p"), file.get_tensor("ids")
            expected = {"identity": self._identity, "number": str(number), "sha256": _digest(log_p, ids)}
            if facts == expected and log_p.shape[:-1] == ids.shape[:-1]:
                return True
        except (SafetensorError, OSError):
            pass
        self.set_aside += 1
        path.replace(path.with_suffix(".unusable"))
        return False


def _mapped(path: Path) -> Any:
    from safetensors import safe_open

    opening: Any = safe_open(path, "pt")
    return opening.__enter__()


def _digest(*tensors: torch.Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        whole.update(tensor.contiguous().view(-1).numpy().tobytes())
    return whole.hexdigest()


def windows_of(tokens_NT: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield the numbers of the windows, `size` at a time."""
    import torch

    yield from torch.split(torch.arange(len(tokens_NT)), size)
