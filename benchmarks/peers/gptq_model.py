"""Runner of GPTQModel, in its own environment."""

from __future__ import annotations

import os

from benchmarks.cases import DAMPING, GROUP_SIZE
from benchmarks.peers.job import Job, execute

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Its default for two cores crashes: "Virtual pool model_loader:cpu requests 2 workers".
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig


def load(job: Job):
    """Return its model. Options are those that all others here have too, where its defaults differ."""
    config = QuantizeConfig(
        bits=job.case.num_bits,
        group_size=GROUP_SIZE,
        sym=True,
        desc_act=False,
        act_group_aware=False,
        true_sequential=False,
        damp_percent=DAMPING,
        device="cpu",
    )
    return GPTQModel.load(str(job.model), config, dtype=torch.float32 if job.dtype == "float32" else "auto")


def compress(job: Job, model) -> None:
    """Calibrate on exactly the windows given, in their order; one at a time, as is its default, takes least memory."""
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.tokens_NT().tolist()]
    model.quantize(rows, calibration_sort=None)
    model.save(str(job.out))


if __name__ == "__main__":
    execute(load, compress, "gptqmodel")
