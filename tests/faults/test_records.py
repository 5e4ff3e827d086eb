"""Records of calibration are found again by those alone who would measure the same, and at no price in disk space."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.calibration import CalibrationSet
from orchestrator.capture import Stream
from orchestrator.checkpoint import Checkpoint
from orchestrator.export import ModelWriter
from orchestrator.job import WalkSettings
from orchestrator.records import RecordStore
from orchestrator.skeleton import Block
from orchestrator.walk import walk
from tests.layer_methods import ScaleByInput
from tests.tiny import make_model, make_tokens


def _weights(checkpoint: Checkpoint, tokens_NT: torch.Tensor, folder: Path, records: Path) -> bytes:
    writer = ModelWriter(checkpoint, folder)
    settings = WalkSettings(inputs="dense", workers=1, records=RecordStore(records, 1 << 30), state=folder / "state")
    walk(checkpoint, ScaleByInput(), CalibrationSet(tokens_NT, {}), writer, settings=settings)
    writer.finish()
    return (folder / "model.safetensors").read_bytes()


def test_the_same_tokens_in_other_windows_are_other_data(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=2))
    tokens_NT = make_tokens(4, 24)
    short = _weights(checkpoint, tokens_NT.reshape(8, 12), tmp_path / "short", tmp_path / "records")
    long = _weights(checkpoint, tokens_NT, tmp_path / "long", tmp_path / "records")
    assert long != short
    assert long == _weights(checkpoint, tokens_NT, tmp_path / "fresh", tmp_path / "others")


def test_tokens_on_their_way_to_a_late_block_do_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record but the last block's is there, so the tokens pass all blocks before they are measured."""
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=8))
    tokens_NT, found = make_tokens(4, 24), []
    first = _weights(checkpoint, tokens_NT, tmp_path / "first", tmp_path / "records")
    newest = max((tmp_path / "records").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    real = Stream.forward

    def forward(stream: Stream, block: Block) -> None:
        real(stream, block)
        found.append(len(list((tmp_path / "again" / "state").glob("hidden-*"))))

    monkeypatch.setattr(Stream, "forward", forward)
    assert _weights(checkpoint, tokens_NT, tmp_path / "again", tmp_path / "records") == first
    assert len(found) == 7 and max(found) <= 3
