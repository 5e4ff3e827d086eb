"""Where text comes from: a local file or a Hugging Face data set. Resolving, checking, hashing and reading it.

A source is written as a path, or as ``hub:OWNER/NAME[/CONFIG]:SPLIT[@REVISION]``; ``hub:/abs/folder:SPLIT`` reads a
data set that was downloaded to a folder. This module imports neither torch nor datasets.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orchestrator.addresses import without_password
from orchestrator.canonical import digest_of, file_sha256
from orchestrator.errors import PreflightError, SpecError, StepError

PREFIX = "hub:"
_HUB = re.compile(
    r"hub:(?:(?P<folder>(?:~|\.{1,2})?/[^:@]+)|(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w-][\w.-]*))?)"
    r":(?P<split>\w[\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROBE_BYTES = 65536  # how much of a text file `check_source` decodes


class InputFile:
    """Marks a method field that names a text source: the plan resolves it, checks it and hashes its content."""


class HeldOutFiles(InputFile):
    """Marks a field that maps names to text sources which must not be those of calibration or training."""


class CalibrationFiles(InputFile):
    """Marks an evaluator's field that maps names to text sources which variants of the model are calibrated on."""


class InputFolders:
    """Marks a field that maps names to local folders: the plan resolves each and hashes every file in it."""


class InputModels:
    """Marks a method field that maps models to numbers: the plan resolves each model and hashes its files."""


@dataclass(frozen=True)
class HubSource:
    """The parts of a ``hub:`` source. Either `folder` or `repo` is given."""

    folder: str | None
    repo: str | None
    config: str | None
    split: str
    revision: str | None

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Take ``hub:...`` apart. Raises `SpecError` if it does not have that form."""
        match = _HUB.fullmatch(source)
        if match is None or (match["folder"] and match["revision"]):
            raise SpecError(
                f"{source!r} does not name a data set",
                remedy="write hub:OWNER/NAME:SPLIT@REVISION, hub:OWNER/NAME/CONFIG:SPLIT@REVISION or hub:/FOLDER:SPLIT",
            )
        return cls(**match.groupdict())


def resolve_source(source: str, base: Path) -> str:
    """Return `source` with a relative local path made absolute below `base`; a data set on the hub is left as it is.

    Raises `SpecError` for an empty or malformed source.
    """
    if not source.strip():
        raise SpecError("the text source is empty", remedy="name a text file or hub:OWNER/NAME:SPLIT")
    if source.startswith(PREFIX):
        folder = HubSource.parse(source).folder
        return source if folder is None else source.replace(folder, _absolute(folder, base), 1)
    if "://" in source:  # what follows the path may be a signature: it is not repeated
        shown = without_password(source.partition("?")[0])
        raise SpecError(f"{shown} is an address, not a text file", remedy="download it, and name the file")
    return _absolute(source, base)


def _absolute(path: str, base: Path) -> str:
    try:
        return os.path.normpath(base.absolute() / Path(path).expanduser())
    except RuntimeError:
        raise SpecError(
            f"there is no home folder {_short(Path(path).parts[0])}", remedy="write the path of the text in full"
        ) from None


def _short(text: str) -> str:
    """Return `text` short enough for a message."""
    return text if len(text) <= 200 else f"{text[:120]}… ({len(text)} characters)"


def _mode(path: Path) -> int:
    """Return the file type bits of what is at `path`, 0 for nothing. `PreflightError` if that cannot be known."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # a name too long, a loop of links, no permission; a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise PreflightError(f"{_short(str(path))!r} cannot be read: {reason}", remedy="correct `source`") from None


def check_folder(folder: str) -> None:
    """Raise `PreflightError` if there is no such folder, or nothing in it."""
    if _mode(Path(folder)) != stat.S_IFDIR:
        raise PreflightError(f"there is no folder {_short(folder)}", remedy="correct the path")
    if not any(path.is_file() for path in Path(folder).rglob("*")):
        raise PreflightError(f"the folder {_short(folder)} is empty", remedy="correct the path")


def folder_digest(folder: str) -> str:
    """Return a sha256 (hex) that changes whenever a file of the folder does."""
    root = Path(folder)
    return digest_of({p.relative_to(root).as_posix(): file_sha256(p) for p in root.rglob("*") if p.is_file()})


def source_name(source: str) -> str:
    """A short name for records: the file's name without its folder, or the data set."""
    return source if source.startswith(PREFIX) else Path(source).name


def check_source(source: str) -> None:
    """Raise `PreflightError` if the source cannot be read: missing, empty, not text, or a library is missing."""
    if source.startswith(PREFIX):
        hub = HubSource.parse(source)
        if hub.folder is not None and _mode(Path(hub.folder)) != stat.S_IFDIR:
            raise PreflightError(f"there is no data set folder {_short(hub.folder)}", remedy="correct the path")
        if find_spec("datasets") is None:
            raise PreflightError(
                f"reading {source} needs the package `datasets`, which is not installed",
                remedy="run `pip install 'compression-orchestrator[hub]'`, or use a local text file",
            )
        return
    path = Path(source)
    mode = _mode(path)
    if mode != stat.S_IFREG:
        shown = _short(str(path))
        what = f"{shown} is a folder, not a text file" if mode == stat.S_IFDIR else f"there is no text file {shown}"
        raise PreflightError(what, remedy="correct `source`; a relative path starts at the specification's folder")
    try:
        with path.open("rb") as file:
            head = file.read(_PROBE_BYTES)
    except OSError as error:
        raise PreflightError(f"{path} cannot be read: {error.strerror}", remedy="allow reading the file") from None
    if not head:
        raise PreflightError(f"{path} is empty", remedy="name a file that holds text")
    if path.suffix == ".parquet":
        _open_parquet(path)
    elif b"\0" in head or not _is_utf8(head):
        raise PreflightError(f"{path} is not UTF-8 text", remedy="convert it to UTF-8, JSON lines or Parquet")


def check_text_size(source: str, windows: int, length: int) -> None:
    """Raise `PreflightError` for a text file with fewer bytes than tokens in `windows` windows of `length`."""
    path = Path(source)
    try:
        found = path.stat()
    except (OSError, ValueError):
        return
    # A token stands for at least a byte of text, but Parquet is compressed, and a hub's size is not known here.
    if path.suffix == ".parquet" or not stat.S_ISREG(found.st_mode):
        return
    if found.st_size < windows * length:
        raise PreflightError(
            f"{path} holds {found.st_size} bytes, too few for the {windows * length} tokens of {windows} windows",
            remedy="name a source with more text, or lower `sequences` or `length_tokens`",
        )


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) == _PROBE_BYTES and error.start > len(head) - 4  # a character cut by the probe's end
    return True


def source_digest(source: str) -> str:
    """Return a sha256 (hex) that changes whenever the text behind the source does.

    A file: of its bytes. A folder: of all files in it. A data set on the hub: of its name and commit; unless the
    source gives the full commit, the hub is asked for it. Raises `PreflightError` if that fails.
    """
    if not source.startswith(PREFIX):
        check_source(source)
        return file_sha256(Path(source))
    hub = HubSource.parse(source)
    if hub.folder is not None:
        check_source(source)
        folder = Path(hub.folder)
        files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in folder.rglob("*") if p.is_file()}
        return digest_of({"files": files, "split": hub.split})
    return digest_of({"repo": hub.repo, "config": hub.config, "split": hub.split, "commit": _commit(source, hub)})


def _commit(source: str, hub: HubSource) -> str:
    """The commit that the revision stands for now."""
    if hub.revision is not None and _COMMIT.fullmatch(hub.revision):
        return hub.revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(str(hub.repo), revision=hub.revision, timeout=20).sha
    except Exception as error:  # the client raises many kinds: its own, httpx, OSError, ValueError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PreflightError(
            f"the revision of {source} cannot be looked up: {reason}",
            remedy="give the full commit (…@40 hex digits), go online, or use a local file",
        ) from None
    if commit is None:
        raise PreflightError(f"the hub names no commit for {source}", remedy="give the full commit: …@40 hex digits")
    return commit


def read_documents(source: str, *, field: str = "text") -> Iterator[str]:
    """Yield the documents of a source in their order, skipping empty ones.

    .jsonl: `field` of the object on each line; .parquet: the column `field`; any other file: all of it, as one
    document; ``hub:``: `field` of each row, streamed. Raises `PreflightError` for an unusable source, `StepError`
    for text that turns out broken.
    """
    check_source(source)
    path = Path(source)
    if source.startswith(PREFIX):
        documents = _read_hub(source, field)
    elif path.suffix == ".jsonl":
        documents = _read_json_lines(path, field)
    elif path.suffix == ".parquet":
        documents = _read_parquet(path, field)
    else:
        documents = iter(["".join(read_blocks(path, 1 << 20))])
    return (document for document in documents if document)


def read_blocks(path: Path, num_characters: int) -> Iterator[str]:
    """Yield a plain text file in blocks. Raises `StepError` if it is not UTF-8."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            while block := file.read(num_characters):
                yield block
        except UnicodeDecodeError as error:
            raise StepError(f"{path} is not UTF-8 text: {error.reason}", remedy="convert it to UTF-8") from None


def _require_text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise StepError(f"{where}: {field!r} holds {type(value).__name__}, not text", remedy="name another `field`")
    return value


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise StepError(f"{where}: this line is not JSON: {error}", remedy="correct the line") from None
            if not isinstance(row, dict) or field not in row:
                found = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
                raise StepError(f"{where}: the line has no key {field!r}, but {found}", remedy="set `field`")
            yield _require_text(row[field], where, field)


def _open_parquet(path: Path) -> Any:
    from pyarrow import parquet
    from pyarrow.lib import ArrowException

    open_file: Any = parquet.ParquetFile
    try:
        return open_file(path)
    except (ArrowException, OSError) as error:
        raise PreflightError(f"{path} is not a Parquet file: {error}", remedy="copy the file again") from None


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    if field not in names:
        raise PreflightError(f"{path} has no column {field!r}, but {names}", remedy="set `field`")
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for value in batch.column(0).to_pylist():
            yield _require_text(value, str(path), field)


def _read_hub(source: str, field: str) -> Iterator[str]:
    import datasets

    hub = HubSource.parse(source)
    try:
        if hub.folder is not None:
            rows = datasets.load_dataset(hub.folder, split=hub.split, streaming=True)
        else:
            commit = _commit(source, hub)
            rows = datasets.load_dataset(hub.repo, hub.config, split=hub.split, revision=commit, streaming=True)
        for row in rows:
            if field not in row:
                raise StepError(f"{source} has no column {field!r}, but {sorted(row)}", remedy="set `field`")
            yield _require_text(row[field], source, field)
    except (PreflightError, StepError):
        raise
    except Exception as error:  # whatever the loader, the network or a file format raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StepError(f"{source} cannot be read: {reason}", remedy="check name, split and connection") from None
