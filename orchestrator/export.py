"""Writing the resulting model as a Hugging Face folder: the same input gives the same bytes.

Weights go to safetensors shards as they arrive, so that at most one shard is in memory; quantized layers in the
compressed-tensors layout of `orchestrator.packing`. Tensors no step touched are copied from the source at the end,
with the tokenizer and the other companions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint import SINGLE_WEIGHT_FILE, WEIGHT_INDEX, Checkpoint
from orchestrator.errors import StepError
from orchestrator.layers import ignored_layers
from orchestrator.packing import pack, quantization_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.scheme import QuantizedWeight, QuantScheme

MAX_SHARD_BYTES = 2_000_000_000
# One key only: with two or more the order of the keys, hence the bytes, changes from run to run.
_METADATA = {"format": "pt"}


class ModelWriter:
    """Collects the tensors of a model and writes the folder; `finish` makes it complete.

    checkpoint: the source, from which everything not added is copied.
    scheme: how added layers are quantized; None for a dense result.
    skip: patterns (see `orchestrator.layers.is_skipped`) of the layers that stay dense in a quantized result.
    max_shard_bytes: tensors are held in memory until they fill a shard of this size.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        *,
        scheme: QuantScheme | None = None,
        skip: Sequence[str] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = Path(folder)
        self.scheme = scheme
        skipped = ignored_layers((layer.name for layer in checkpoint.block_layers()), skip)
        self.ignored = sorted({*skipped, *checkpoint.dense_layers()})
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards = _ShardWriter(self.folder, max_shard_bytes)
        self._replaced: set[str] = set()  # names of source tensors that have a successor

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a dense tensor by its full name, cast to the checkpoint's dtype."""
        self._replaced.add(name)
        self._shards.add(name, _cast(tensor, self.checkpoint))

    def add_quantized(self, layer: str, weight: QuantizedWeight) -> None:
        """Take the weight of a quantized layer. Raises `StepError` if it does not fit the scheme of the result."""
        if weight.scheme != self.scheme:
            raise StepError(f"{layer} is quantized as {weight.scheme}, the model as {self.scheme}")
        if layer in self.ignored:
            raise StepError(f"{layer} is quantized, although it is to stay as it is")
        self._replaced.add(f"{layer}.weight")
        for part, tensor in sorted(pack(weight).items()):
            self._shards.add(f"{layer}.{part}", tensor)

    def finish(self) -> None:
        """Copy what was not added, write config.json and the companions. Raises `StepError` for a missing layer."""
        if self.scheme is not None:
            names = [layer.name for layer in self.checkpoint.block_layers()]
            missing = [n for n in names if f"{n}.weight" not in self._replaced and n not in self.ignored]
            if missing:
                raise StepError(f"{missing[0]} was not quantized ({len(missing)} layers in all)")
        from orchestrator.skeleton import TensorReader

        with TensorReader(self.checkpoint) as read:
            for name in self.checkpoint.tensors:
                if name not in self._replaced:
                    self._shards.add(name, _cast(read(name), self.checkpoint))
        self._shards.finish()
        config = dict(self.checkpoint.config)
        if self.scheme is not None:
            config["quantization_config"] = quantization_config(self.scheme, self.ignored)
        _write_rest(self.checkpoint, self.folder, config)


def save_model(
    model: PreTrainedModel, checkpoint: Checkpoint, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a dense model in the checkpoint's dtype, with the companions of `checkpoint`.

    config.json is that of `checkpoint` with what the method changed in ``model.config``, without a quantization.
    Tied weights are written once. Raises `StepError` if the model holds packed weights or numbers that are not finite.
    """
    from orchestrator.architectures import stored_state

    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }
    shards = _ShardWriter(folder, max_shard_bytes)
    state = stored_state(model, {name: state[name] for name in state.keys() - tied}, checkpoint.tensors.keys())
    for name in sorted(state):
        if name.endswith((".weight_packed", ".weight_scale")):
            raise StepError(f"{name.rpartition('.')[0]} is still packed; a dense model was expected")
        tensor = _cast(state[name].detach().cpu(), checkpoint)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise StepError(f"{name} holds numbers that are not finite")
        shards.add(name, tensor)
    shards.finish()
    _write_rest(checkpoint, folder, _changed_config(model, checkpoint))


class _ShardWriter:
    """Writes tensors to files of at most `max_bytes` each, in the order in which they come."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []  # names of the tensors of each finished shard
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        if name in self._pending or any(name in names for names in self._written):
            raise ValueError(f"{name} was added twice")
        # safetensors refuses tensors that share memory, and views would keep more alive than they show.
        self._pending[name] = tensor.contiguous().clone()
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Write what is pending and give the shards their final names, with an index if there are several."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE_WEIGHT_FILE)
            return
        weight_map = {}
        for index, names in enumerate(self._written):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        _write_json(
            self._folder / WEIGHT_INDEX,
            {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._pending:
            save_file(dict(sorted(self._pending.items())), self._part(len(self._written)), _METADATA)
            self._written.append(sorted(self._pending))
            self._pending = {}
            self._pending_bytes = 0

    def _part(self, index: int) -> Path:
        """A shard's name until the number of shards is known."""
        return self._folder / f".shard-{index + 1:05d}.part"


def _cast(tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    return tensor.to(checkpoint.torch_dtype) if tensor.is_floating_point() else tensor


def _write_rest(checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json with the dtype of the weights, and copy the tokenizer and the other companions."""
    dtype = str(checkpoint.torch_dtype).removeprefix("torch.")
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}  # the name before Transformers 5
    _write_json(folder / "config.json", {**kept, "dtype": dtype})
    for name in checkpoint.companion_files():
        shutil.copyfile(checkpoint.path / name, folder / name)


def _changed_config(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's config.json with the entries that differ in ``model.config``; as JSON, so that types compare."""
    from orchestrator.model import load_config

    before = json.loads(json.dumps(load_config(checkpoint).to_dict(), default=str))
    after = json.loads(json.dumps(model.config.to_dict(), default=str))
    config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    for key in sorted(after.keys() - {"quantization_config", "dtype", "transformers_version"}):
        if not key.startswith("_") and after[key] != before.get(key):
            config[key] = after[key]
    return config


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
