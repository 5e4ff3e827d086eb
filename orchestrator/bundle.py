"""What a release holds: the model's files at its root, the serving configuration in ``serving/<engine>/``, and other
file formats in ``formats/<format>/`` (`orchestrator.formats`); and its papers: the card and the bill of materials.

A bundle is a pure function of the model artifact and the parameters of engines and formats, so releasing the same
model twice gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator.bill import write_bill
from orchestrator.canonical import digest_of, file_sha256
from orchestrator.card import write_card
from orchestrator.checkpoint import Checkpoint
from orchestrator.deployment import serving_files
from orchestrator.provenance import Provenance
from orchestrator.serving import ModelShape
from orchestrator.serving_engine import ServingEngine


def write_bundle(model: Checkpoint, engines: Sequence[ServingEngine], folder: Path) -> None:
    """Fill `folder` with the model and the serving configuration.

    Raises `SpecError` or `PreflightError` for a model that does not fit an engine's budget.
    """
    for name in model.model_files():
        _link_or_copy(model.path / name, folder / name)
    if engines:
        shape = ModelShape.from_config(model.config)
        for engine in engines:
            target = folder / "serving" / engine.name
            target.mkdir(parents=True)
            for name, text in serving_files(engine, shape, model.weight_bytes()).items():
                (target / name).write_text(text, encoding="utf-8")


def document_bundle(folder: Path, source: Checkpoint, model: Checkpoint, provenance: Provenance) -> None:
    """Write the papers of what is in `folder`: the model card, and last the bill of materials, which lists the rest.

    source: the dense model that `model` was made from.
    """
    write_card(folder, source.path, model.config, provenance)
    write_bill(folder, _hashes(folder), provenance)


def bundle_digest(folder: Path) -> str:
    """Return a digest of everything in the folder."""
    return digest_of(_hashes(folder))


def _hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # the bytes of a model are not copied where the file system allows it
    except OSError:
        shutil.copyfile(source, target)
