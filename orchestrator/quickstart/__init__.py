"""The quickstart: a small trained model, text that every machine has, and a specification over both."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from orchestrator.canonical import file_sha256, write_atomically
from orchestrator.quickstart.corpus import write_corpus

SPEC_NAME = "quickstart.yaml"


def prepare(folder: Path) -> Path:
    """Lay out model, text and specification in `folder`; return the path of the specification.

    What is there and unchanged is left alone, so that a second run finds the same files. Raises `PreflightError` if
    this Python came without the sources of its standard library.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder)
    with as_file(files("orchestrator.quickstart") / "model") as model:
        for source in sorted(model.iterdir()):
            _copy_if_changed(source, folder / "model" / source.name)
    with as_file(files("orchestrator.quickstart") / SPEC_NAME) as spec:
        _copy_if_changed(spec, folder / SPEC_NAME)
    return folder / SPEC_NAME


def _copy_if_changed(source: Path, target: Path) -> None:
    if target.is_file() and file_sha256(target) == file_sha256(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, source.read_bytes())
    shutil.copymode(source, target)
