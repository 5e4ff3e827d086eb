"""What a model costs: bytes on disk, time to load, speed of writing, peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.api import Checkpoint, Context, Evaluator, ModelFacts, Stage, StepError, Work

_MEASURED = {
    "bytes_on_disk": "bytes of all files of the model folder, tokenizer included",
    "weight_bytes": "bytes of the weight files",
    "load_seconds": "seconds that `from_pretrained` takes in a fresh process, libraries already imported",
    "tokens_per_second": "new tokens per second of greedy decoding, batch 1, after the prompt (median of the rounds)",
    "peak_memory_bytes": "largest resident memory of the process, bytes; Python and the libraries included",
}
_OF_A_BATCH = {
    "tokens_per_second": "new tokens per second of greedy decoding after the prompts, all sequences together (median)",
    "first_token_seconds": "seconds from the prompts to the first new token of all sequences (median)",
    "peak_memory_bytes": "largest resident memory of the process up to then, bytes; smaller batches came before",
}
_SPREAD = "_spread"  # of what is timed in every round
_TIMED = ("tokens_per_second", "first_token_seconds")
_OF_ROUNDS = "(largest - smallest) / median of {} over the rounds: how far this machine can be trusted"
_PROCESS_BYTES = 600 << 20  # of a process that has imported Transformers


class Footprint(Evaluator):
    """Both models measured the way a user of stock Transformers meets them, each in a process of its own.

    They are loaded one after the other, and then decode in turns, so that what else the machine does meets both alike.
    """

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "footprint"
    paper: ClassVar = "No paper: file sizes, wall-clock time and the kernel's high-water mark of resident memory."
    metrics: ClassVar[Mapping[str, str]] = {
        **{name: f"{what}; compressed model" for name, what in _MEASURED.items()},
        **{f"dense_{name}": f"{what}; dense model" for name, what in _MEASURED.items()},
        **{f"{name}_ratio": f"{name} / dense_{name}" for name in _MEASURED},
        "tokens_per_second_ratio": "compressed / dense speed in the same round (median of the rounds)",
        f"tokens_per_second{_SPREAD}": f"{_OF_ROUNDS.format('tokens_per_second')}; compressed model",
        f"dense_tokens_per_second{_SPREAD}": f"{_OF_ROUNDS.format('tokens_per_second')}; dense model",
    }

    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        **dict.fromkeys(_MEASURED, "lower"),
        "first_token_seconds": "lower",
        "tokens_per_second": "higher",
    }
    quality: ClassVar[bool] = False

    new_tokens: int = Field(64, ge=1, le=100_000, description="Tokens decoded in each timed run.")
    repeats: int = Field(5, ge=1, le=100, description="Rounds in which both models decode; medians count.")
    batches: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (),
        max_length=20,
        description="Numbers of sequences to decode at once; speed, time to the first token and memory of each are "
        "called METRIC.batch-N.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="dtype to load in; 'auto' is what config.json says, as a user would get it."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="Threads to compute with. Default: PyTorch's choice.")
    timeout_seconds: float = Field(3600.0, gt=0, description="Longest time for the whole measurement, seconds.")

    def declared(self) -> Mapping[str, str]:
        """The metrics of one sequence, and of every batch."""
        return (
            dict(self.metrics)
            | {
                f"{form.format(name)}.{_tier(batch)}": text.format(what, name)
                for batch in self.batches
                for name, what in _OF_A_BATCH.items()
                for form, text in (
                    ("{}", f"{{0}}; compressed model, {batch} at once"),
                    ("dense_{}", f"{{0}}; dense model, {batch} at once"),
                    ("{}_ratio", f"{{1}} compressed / dense, {batch} at once"),
                )
            }
            | {
                f"{side}{name}{_SPREAD}.{_tier(batch)}": f"{_OF_ROUNDS.format(name)}; {model} model, {batch} at once"
                for batch in self.batches
                for name in _TIMED
                for side, model in (("", "compressed"), ("dense_", "dense"))
            }
        )

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Nothing in this process; two others with a model each, which write token by token."""
        written = 2 * self.repeats * (self.new_tokens + 20) * (1 + sum(set(self.batches)))
        held = sum(facts.load_bytes(as_float32=self.dtype == "float32") for facts in (model, dense))
        decoding = dense.forward(written, 64, 1, head=True)
        # Every weight is read for every token.
        moved = float(written * dense.parameters * dense.item_bytes)
        return replace(decoding, child_memory_bytes=held + 2 * _PROCESS_BYTES, moved_bytes=moved)

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        """Measure both models. Raises `StepError` if a process fails or the time is up."""
        result: dict[str, float] = {}
        for prefix, checkpoint in (("dense_", baseline), ("", candidate)):
            files = [checkpoint.path / name for name in checkpoint.model_files()]
            result[f"{prefix}bytes_on_disk"] = float(sum(file.stat().st_size for file in files))
            result[f"{prefix}weight_bytes"] = float(checkpoint.weight_bytes())
        with ExitStack() as stack:
            deadline, scratch = time.monotonic() + self.timeout_seconds, context.scratch
            context.progress(0.0, "loading the dense model")
            dense = stack.enter_context(Probe(self._command(baseline, scratch), baseline.path, deadline, scratch))
            result["dense_load_seconds"] = dense.read("load_seconds")
            context.progress(0.3, "loading the compressed model")
            compressed = stack.enter_context(
                Probe(self._command(candidate, scratch), candidate.path, deadline, scratch)
            )
            result["load_seconds"] = compressed.read("load_seconds")
            rounds = []
            for number in range(self.repeats):
                context.progress(0.6 + 0.4 * number / self.repeats, f"decoding, round {number + 1} of {self.repeats}")
                rounds.append((dense.decode()["tokens_per_second"], compressed.decode()["tokens_per_second"]))
            for batch in sorted(set(self.batches)):  # rising, so that the memory is that of the largest so far
                context.progress(1.0, f"decoding {batch} sequences at once")
                pairs = [(dense.decode(batch), compressed.decode(batch)) for _ in range(self.repeats)]
                result |= _of_a_batch(batch, pairs)
            result["dense_peak_memory_bytes"] = dense.finish()
            result["peak_memory_bytes"] = compressed.finish()
        result["dense_tokens_per_second"] = statistics.median(rate for rate, _ in rounds)
        result["tokens_per_second"] = statistics.median(rate for _, rate in rounds)
        for prefix, rates in zip(("dense_", ""), zip(*rounds, strict=True), strict=True):
            result[f"{prefix}tokens_per_second{_SPREAD}"] = _spread(rates)
        for name in _MEASURED:
            result[f"{name}_ratio"] = result[name] / result[f"dense_{name}"]
        result["tokens_per_second_ratio"] = statistics.median(after / before for before, after in rounds)
        context.progress(1.0, "both models measured")
        return result

    def _command(self, checkpoint: Checkpoint, scratch: Path) -> list[str]:
        dtype = checkpoint.dtype if self.dtype == "auto" else self.dtype
        probe = Path(__file__).with_name("footprint_probe.py")
        # -P: the probe's folder must not become a place to import from; its modules have common names.
        command = [sys.executable, "-P", str(probe), str(checkpoint.loadable(scratch)), "--dtype", dtype]
        command += ["--new-tokens", str(self.new_tokens)]
        if self.threads is not None:
            command += ["--threads", str(self.threads)]
        if checkpoint.code is not None:
            command += ["--trust-remote-code"]
        return command


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def _tier(batch: int) -> str:
    return f"batch-{batch}"


def _of_a_batch(batch: int, pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, float]:
    """The metrics of a batch from the rounds of (dense, compressed): medians, the last of memory."""
    result = {}
    for name in _OF_A_BATCH:
        dense, compressed = ([side[name] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = [after / before for before, after in zip(dense, compressed, strict=True)]
        for form, values in (("dense_{}", dense), ("{}", compressed), ("{}_ratio", ratios)):
            value = values[-1] if name == "peak_memory_bytes" else statistics.median(values)
            result[f"{form.format(name)}.{_tier(batch)}"] = value
        if name in _TIMED:
            result[f"dense_{name}{_SPREAD}.{_tier(batch)}"] = _spread(dense)
            result[f"{name}{_SPREAD}.{_tier(batch)}"] = _spread(compressed)
    return result


class Probe:
    """A process that holds one model. Ends with the block that opened it, whatever happens.

    scratch: where Transformers may copy trusted code of the model to.
    Raises `StepError` when the process dies or the deadline (of `time.monotonic`) passes.
    """

    def __init__(self, command: Sequence[str], model: Path, deadline: float, scratch: Path) -> None:
        self._model = model
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._late = False
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_MODULES_CACHE": str(scratch / "modules")},
        )
        self._timer = threading.Timer(max(deadline - time.monotonic(), 0.0), self._stop)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def decode(self, batch: int | None = None) -> dict[str, float]:
        """Let the model write, one sequence or a batch of them; return what the process measured."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading says so
            self._process.stdin.write("decode\n" if batch is None else f"decode {batch}\n")
            self._process.stdin.flush()
        return self._answer("tokens_per_second")

    def finish(self) -> float:
        """End the process; return its peak memory in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = self.read("peak_memory_bytes")
        self._process.stdin = None  # closed above; __exit__ must not flush it
        return peak

    def read(self, name: str) -> float:
        """Return the number called `name` from the next line that the process prints."""
        return self._answer(name)[name]

    def _answer(self, name: str) -> dict[str, float]:
        """The numbers of the next line that holds one called `name`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                found = {key: float(value) for key, value in json.loads(line).items()}
            except (ValueError, AttributeError, TypeError):
                continue  # something a library prints
            if name in found:
                return found
        if self._late:
            raise StepError(
                f"loading and running {self._model} took too long",
                remedy="raise `timeout_seconds`, or lower `new_tokens`, `repeats` or `batches`",
            )
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["it wrote nothing"]
        died = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise StepError(
            f"stock Transformers could not load and run {self._model} ({died}): {lines[-1]}",
            remedy="free memory if the process was killed (signal 9); otherwise the model folder is damaged",
        )

    def _stop(self) -> None:
        self._late = True
        self._process.kill()
