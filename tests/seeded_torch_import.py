"""A plugin module that imports torch when it is imported: its only bug."""

from __future__ import annotations

import torch

from tests.seeded_bugs import Halve

DEVICE = torch.device("cpu")


class ImportsTorch(Halve):
    """Right in itself."""
