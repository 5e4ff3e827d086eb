"""Runner of trl's GKD trainer, in its own environment.

    python -m benchmarks.peers.trl_gkd JOB.json

Set to what `benchmarks.distillation` has this project do: no text of the student (lmbda 0), forward KL (beta 0: its
`generalized_jsd_loss` is then `F.kl_div(student, teacher)`) at temperature 1, no gradient checkpointing, given windows
in the given order. Its loss is the sum over all positions but the last of each window, divided by their number, so
gradients have the size of ours, which have one position more in each window.

Shape legend: B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.peak import peak_bytes


class Clock(TrainerCallback):
    """When the first update began and the last one ended."""

    began = ended = 0.0

    def on_step_begin(self, args, state, control, **more) -> None:
        """Note the first."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args, state, control, **more) -> None:
        """Note the last."""
        self.ended = time.perf_counter()


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """All tokens count; nothing is padded. Its own collator takes chats only."""
    tokens_BT = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "labels": tokens_BT.clone()}


def rate(update: int, updates: int, warmup_fraction: float) -> float:
    """Ours: of the two only trl's warm-up starts with an update at rate 0."""
    rising = math.ceil(warmup_fraction * updates)
    if update < rising:
        return (update + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (update - rising) / max(1, updates - rising)))


def trainer_of(job: dict) -> GKDTrainer:
    """Load both models and return the trainer."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32) for name in ("student", "teacher")
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=job["learning_rate"], betas=tuple(job["betas"]), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: rate(update, job["updates"], job["warmup_fraction"])
    )
    config = GKDConfig(
        output_dir=job["folder"],
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        seq_kd=False,
        max_length=None,
        max_steps=job["updates"],
        per_device_train_batch_size=job["batch"],
        train_sampling_strategy="sequential",
        max_grad_norm=job["clip"],
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=job["compute"] == "bfloat16",
        fp16=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in load_file(job["taught"])["tokens_NT"].tolist()]),
        processing_class=AutoTokenizer.from_pretrained(job["tokenizer"]),
        optimizers=(optimizer, schedule),
    )


def main() -> None:
    """Train, report, and save the student in float32."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    trainer, clock = trainer_of(job), Clock()
    trainer.add_callback(clock)
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    report = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "update_seconds": clock.ended - clock.began,
        "peak_bytes": peak_bytes(),
        "first_loss": next(row["loss"] for row in trainer.state.log_history if "loss" in row),
        "last_loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")},
    }
    trainer.model.save_pretrained(job["out"])
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
