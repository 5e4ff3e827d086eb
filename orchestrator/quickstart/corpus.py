"""The quickstart's text: the Python standard library's own sources, in a training and a held-out part.

Which part a module is in depends on nothing but its top-level name, so every Python version draws the same line, and
a module that grew into a package or that moved behind an underscore between versions (``datetime`` and ``_pydatetime``,
``pathlib.py`` and ``pathlib/_local.py``) stays on its side. Siblings within a package share code and stay together.

Python's sources are under the PSF licence. Nothing of them is shipped; they are read from the running interpreter.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import PreflightError

DOCUMENT_END = "<|endoftext|>"
"""Follows every module in the files; a special token of the quickstart's tokenizer."""

TRAIN_LIMIT_BYTES = 12_000_000
VALID_LIMIT_BYTES = 600_000
TRAIN_FLOOR_BYTES = 1_000_000
VALID_FLOOR_BYTES = 100_000

_HELD_OUT_OF_256 = 26  # about a tenth of the names
_SALT = "quickstart-73:"  # holds out a tenth of the text, of a mixed kind, in Python 3.11 to 3.13 alike
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "lib-dynload"}
)
# Tables written by programs: nearly free to predict, so they would flatter the held-out perplexity.
_TABLES = frozenset({"encodings", "pydoc_data"})
# Not the library's: files of the machine's owner or of the interpreter's build.
_LOCAL_PREFIXES = ("sitecustomize", "usercustomize", "_sysconfigdata", "_sysconfig_vars", "config-")


@dataclass(frozen=True)
class CorpusFiles:
    """Where the text lies (UTF-8), and how many modules each file holds."""

    train: Path
    valid: Path
    train_modules: int
    valid_modules: int


def is_held_out(relative: str) -> bool:
    """Whether the module at this path, relative to the standard library and with ``/``, is in the held-out part."""
    top = relative.split("/", 1)[0].removesuffix(".py")
    name = top.removeprefix("_py") if top.startswith("_py") else top.lstrip("_")
    return hashlib.sha256((_SALT + (name or top)).encode()).digest()[0] < _HELD_OUT_OF_256


def library_modules(library: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every module of the library, in the order of the paths; undecodable ones are skipped."""
    paths = []
    for folder, subfolders, files in os.walk(library):
        top = Path(folder) == library
        excluded = _NOT_LIBRARY | _TABLES if top else _NOT_LIBRARY
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(_LOCAL_PREFIXES)]
        for name in files:
            if name.endswith(".py") and not (top and name.startswith(_LOCAL_PREFIXES)):
                paths.append(Path(folder, name).relative_to(library).as_posix())
    for relative in sorted(paths):
        try:
            text = (library / relative).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative, text


def write_corpus(folder: Path, library: Path | None = None) -> CorpusFiles:
    """Write ``train.txt`` and ``valid.txt`` (held out) into `folder`, the same bytes every time.

    library: the root of the standard library's sources; None for the running interpreter's.
    Modules are taken whole, the held-out ones in the order of their names' digests, so that the limit on their size
    leaves a sample from the whole alphabet. Raises PreflightError where the sources are missing.
    """
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    parts: dict[bool, list[tuple[str, bytes]]] = {False: [], True: []}
    for relative, text in library_modules(library):
        parts[is_held_out(relative)].append((relative, (text + DOCUMENT_END).encode()))
    train = _within(parts[False], TRAIN_LIMIT_BYTES)
    valid = _within(parts[True], VALID_LIMIT_BYTES)
    if sum(map(len, train)) < TRAIN_FLOOR_BYTES or sum(map(len, valid)) < VALID_FLOOR_BYTES:
        raise PreflightError(
            "this Python comes without the sources of its standard library, which are the quickstart's text",
            where=str(library),
            remedy="run it with a Python that keeps its .py files (python.org, pyenv, uv, conda or Debian's python3)",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return CorpusFiles(
        train=_write(folder / "train.txt", train),
        valid=_write(folder / "valid.txt", valid),
        train_modules=len(train),
        valid_modules=len(valid),
    )


def _within(modules: list[tuple[str, bytes]], limit: int) -> list[bytes]:
    """The texts that fit into `limit` bytes together, chosen by their paths' digests, in the order of the paths."""
    chosen, used = set(), 0
    for relative, text in sorted(modules, key=lambda module: hashlib.sha256(module[0].encode()).digest()):
        if used + len(text) <= limit:
            chosen.add(relative)
            used += len(text)
    return [text for relative, text in modules if relative in chosen]


def _write(path: Path, texts: list[bytes]) -> Path:
    """Replace `path` in one step: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(texts)
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink()
        raise
    return path
