"""Writing the resulting model as a Hugging Face folder: the same input gives the same bytes.

Weights go to their places in safetensors files as they arrive; quantized layers in the compressed-tensors layout of
`orchestrator.packing`. Tensors no step touched are copied from the source at the end, piece by piece, with the
tokenizer and the other companions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import StepError
from orchestrator.kv_scales import (
    DENSE_ENTRY,
    has_kv_scales,
    kv_scale_names,
    read_kv_scales,
    renumbered_scales,
    scale_tensors,
)
from orchestrator.layers import ignored_layers, is_embedding, renumbered
from orchestrator.packing import SCALE_SUFFIX, pack, packed_specs, unpack
from orchestrator.quantized import quantization_entries
from orchestrator.reader import FLOAT_DTYPES, TORCH_DTYPES, TensorReader, bytes_of
from orchestrator.scheme import QuantScheme
from orchestrator.shards import MAX_SHARD_BYTES, Shards, TensorSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.kv_scales import KVScales
    from orchestrator.method import ModelResult
    from orchestrator.scheme import QuantizedWeight

# How layers are quantized: all alike, by name, or not at all.
Schemes = QuantScheme | Mapping[str, QuantScheme] | None


class ModelWriter:
    """Writes the tensors of a model to their places as they come; `finish` makes the folder complete.

    checkpoint: the source, from which everything not added is copied.
    scheme: how added layers are quantized, all alike or by name; None for a dense result.
    skip: patterns (see `orchestrator.layers.is_skipped`) of the layers that stay dense in a quantized result.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        *,
        scheme: Schemes = None,
        skip: Sequence[str] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = Path(folder)
        self.layers = {layer.name: layer for layer in checkpoint.block_layers()}
        self.ignored = ignored_in(checkpoint, skip)
        self.schemes = schemes_by_layer(checkpoint, scheme, skip)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scale_dtype: str | None = None  # of quantized layers; known once the first one is there
        self._max_shard_bytes = max_shard_bytes
        self._shards: Shards | None = None
        self._opening = threading.Lock()  # layers are added from several threads
        self._replaced: set[str] = set()  # names of source tensors that have a successor

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Write a dense tensor by its full name, cast to the checkpoint's dtype; return a digest of its bytes."""
        stored = _cast(tensor, self.checkpoint).cpu().contiguous()
        self._open().write(name, stored)
        self._replaced.add(name)
        return _digest({name: stored})

    def add_quantized(self, layer: str, weight: QuantizedWeight) -> str:
        """Write the weight of a quantized layer; return a digest of its bytes.

        Raises `StepError` if it does not fit the scheme that was announced.
        """
        if layer not in self.schemes:
            raise StepError(f"{layer} is quantized, although it is to stay as it is")
        if weight.scheme != self.schemes[layer]:
            raise StepError(f"{layer} is quantized as {weight.scheme}, not as {self.schemes[layer]}")
        scale_dtype = str(weight.scale_OG.dtype).removeprefix("torch.")
        shards = self._open(scale_dtype)
        if scale_dtype != self.scale_dtype:
            raise StepError(f"{layer} has scales in {scale_dtype}, other layers in {self.scale_dtype}")
        tensors = {f"{layer}.{part}": tensor.cpu().contiguous() for part, tensor in pack(weight).items()}
        for name, tensor in tensors.items():
            shards.write(name, tensor)
        self._replaced.add(f"{layer}.weight")
        return _digest(tensors)

    def resume(self, written: str, digest: str, scale_dtype: str | None) -> bool:
        """Take what an earlier, killed run put into the folder for written; False if its bytes are others.

        written: a layer, or the full name of another tensor.
        """
        shards = self._open(scale_dtype)
        layer = self.layers.get(written)
        names = [written] if layer is None else [f"{written}.weight"]
        if layer is not None and written in self.schemes:
            parts = packed_specs(layer.out_features, layer.in_features, self.schemes[written])
            names = [f"{written}.{part}" for part in parts]
        if _digest({name: shards.read(name) for name in names}) != digest:
            return False
        self._replaced.add(written if layer is None else f"{written}.weight")
        return True

    def close(self) -> None:
        """Close the files of an unfinished result."""
        if self._shards is not None:
            self._shards.close()

    def finish(self) -> None:
        """Copy what was not added, write config.json and the companions. Raises `StepError` for a missing layer."""
        missing = [name for name in self.schemes if f"{name}.weight" not in self._replaced]
        if missing:
            raise StepError(f"{missing[0]} was not quantized ({len(missing)} layers in all)")
        shards = self._open()
        scales = kv_scale_names(self.checkpoint)
        with TensorReader(self.checkpoint) as read:
            for name in self.checkpoint.tensors:
                if name not in self._replaced:
                    for first, piece in read.chunks(name):
                        shards.write_part(name, first, piece if name in scales else _cast(piece, self.checkpoint))
        shards.close()
        _write_rest(self.checkpoint, self.folder, result_config(self.checkpoint, self.schemes, self.ignored))

    def _open(self, scale_dtype: str | None = None) -> Shards:
        """Make the files when the first tensor comes; in a quantized model it tells the dtype of the scales."""
        with self._opening:
            if self._shards is None:
                self.scale_dtype = scale_dtype
                specs = result_specs(self.checkpoint, self.schemes, scale_dtype)
                shards = Shards(self.folder, specs, max_bytes=self._max_shard_bytes)
                shards.create()
                self._shards = shards
            return self._shards


def result_config(checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme], ignored: Sequence[str]) -> dict[str, Any]:
    """Return the config.json of a result whose layers are quantized by these schemes. Imports no torch."""
    config = dict(checkpoint.config)
    if schemes:
        kv_scales = has_kv_scales(config)
        config.pop(DENSE_ENTRY, None)
        config |= quantization_entries(schemes, ignored, kv_scales=kv_scales)
    return config


def ignored_in(checkpoint: Checkpoint, skip: Sequence[str]) -> list[str]:
    """Return the linear layers that stay dense in a quantized result, sorted."""
    names = [layer.name for layer in checkpoint.block_layers()]
    return sorted({*ignored_layers(names, skip), *checkpoint.dense_layers()})


def schemes_by_layer(checkpoint: Checkpoint, scheme: Schemes, skip: Sequence[str]) -> dict[str, QuantScheme]:
    """Return the scheme of every layer that is to be quantized: of all that `skip` does not match, or those named."""
    if scheme is None or isinstance(scheme, Mapping):
        return dict(scheme or {})
    ignored = set(ignored_in(checkpoint, skip))
    return {layer.name: scheme for layer in checkpoint.block_layers() if layer.name not in ignored}


def result_specs(
    checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme], scale_dtype: str | None = None
) -> dict[str, TensorSpec]:
    """Return what will be stored, by name: plain tensors in the checkpoint's dtype, or packed ones. Imports no torch.

    schemes: of quantized layers, by name. scale_dtype: of their scales; None: the checkpoint's.
    """
    specs = {}
    scales = kv_scale_names(checkpoint)
    for name, info in checkpoint.tensors.items():
        floating = info.dtype in FLOAT_DTYPES and name not in scales
        specs[name] = TensorSpec(checkpoint.dtype_name if floating else TORCH_DTYPES[info.dtype], info.shape)
    for layer in checkpoint.block_layers():
        if layer.name in schemes:
            del specs[f"{layer.name}.weight"]
            packed = packed_specs(layer.out_features, layer.in_features, schemes[layer.name])
            for part, (dtype, shape) in packed.items():
                specs[f"{layer.name}.{part}"] = TensorSpec(dtype or scale_dtype or checkpoint.dtype_name, shape)
    return specs


def encodings_of(result: ModelResult, checkpoint: Checkpoint | None) -> Mapping[str, QuantizedWeight]:
    """Return how the linear layers of a result are stored on a grid, by name; {} for a dense result.

    checkpoint: the input of a method that keeps grids. If the method gives no encodings, its layers are stored as
    there, those of the decoder blocks that are left under their new numbers.
    """
    if result.encodings or checkpoint is None or not checkpoint.is_quantized:
        return result.encodings
    schemes = checkpoint.schemes()
    with TensorReader(checkpoint) as read:
        names = renumbered(schemes, result.blocks)
        return {new: unpack(read, old, schemes[old]) for new, old in names.items()}


def kv_scales_of(result: ModelResult, checkpoint: Checkpoint | None) -> KVScales:
    """Return the scales of an fp8 KV cache that are stored with a result, by name of the attention.

    checkpoint: the input of a method that keeps scales. If the method gives none, they are those of the input, in
    blocks that may have other numbers now.
    """
    if result.kv_scales or checkpoint is None:
        return result.kv_scales
    return renumbered_scales(read_kv_scales(checkpoint), result.blocks)


def save_model(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    encodings: Mapping[str, QuantizedWeight] | None = None,
    kv_scales: KVScales | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model in the checkpoint's dtype, with the companions of `checkpoint`.

    encodings: by name, the layers that are stored on a grid instead of as the model holds them.
    kv_scales: by name of the attention, scales of an fp8 KV cache, which are stored beside the weights.
    config.json is that of `checkpoint` with what the method changed in ``model.config``, and the quantization of
    `encodings`. Tied weights are written once. Raises `StepError` if the model holds packed weights, lacks a layer of
    `encodings` or a module of `kv_scales`, or holds numbers that are not finite.
    """
    from orchestrator.architectures import stored_state

    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }
    state = stored_state(model, {name: state[name] for name in state.keys() - tied}, _plain_names(checkpoint))
    linear = {name.removesuffix(".weight") for name, tensor in state.items() if tensor.ndim == 2}
    linear = {name for name in linear if f"{name}.weight" in state and not is_embedding(name)}
    for layer, weight in (encodings or {}).items():
        if state.pop(f"{layer}.weight", None) is None:
            raise StepError(f"{layer} is to be stored on a grid, but the model has no such layer")
        state |= {f"{layer}.{part}": tensor for part, tensor in pack(weight).items()}
    packed = {f"{layer}{SCALE_SUFFIX}" for layer in encodings or {}}
    specs = {}
    for name in sorted(state):
        if name.endswith(SCALE_SUFFIX) and name not in packed:
            raise StepError(f"{name.rpartition('.')[0]} is still packed; a dense model was expected")
        if not _is_packed(name, encodings):
            state[name] = _cast(state[name].detach(), checkpoint)
        specs[name] = _spec_of(state[name])
    for name, scale_1 in scale_tensors(kv_scales or {}).items():
        attention = name.rpartition(".")[0]
        if not any(other.startswith(f"{attention}.") for other in specs):
            raise StepError(f"{attention} is given scales of its KV cache, but the model has no such module")
        state[name], specs[name] = scale_1, _spec_of(scale_1)
    shards = Shards(folder, specs, max_bytes=max_shard_bytes)
    shards.create()
    for name in specs:
        tensor = state[name]
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise StepError(f"{name} holds numbers that are not finite")
        shards.write(name, tensor.contiguous())
    shards.close()
    config = _changed_config(model, checkpoint)
    schemes = {layer: weight.scheme for layer, weight in (encodings or {}).items()}
    config |= quantization_entries(schemes, {*(linear - schemes.keys()), "lm_head"}, kv_scales=bool(kv_scales))
    _write_rest(checkpoint, folder, config)


def _spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _is_packed(name: str, encodings: Mapping[str, QuantizedWeight] | None) -> bool:
    layer, _, part = name.rpartition(".")
    return layer in (encodings or {}) and part != "bias"


def _plain_names(checkpoint: Checkpoint) -> set[str]:
    """Names of the stored tensors, those of packed layers as if they were plain weights."""
    schemes = checkpoint.schemes() if checkpoint.is_quantized else {}
    return set(checkpoint.tensors) | {f"{layer}.weight" for layer in schemes}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(bytes_of(tensors[name]))
    return whole.hexdigest()


def _cast(tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    return tensor.to(checkpoint.torch_dtype) if tensor.is_floating_point() else tensor


def config_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """Return the config.json of a result, with the dtype of its weights. Imports no torch."""
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}  # the name before Transformers 5
    return json.dumps({**kept, "dtype": checkpoint.dtype_name}, indent=2, sort_keys=True) + "\n"


def _write_rest(checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, and copy the tokenizer and the other companions."""
    (folder / "config.json").write_text(config_text(checkpoint, config), encoding="utf-8")
    for name in checkpoint.companion_files():
        shutil.copyfile(checkpoint.path / name, folder / name)


def _changed_config(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's config.json with the entries that differ in ``model.config``; as JSON, so that types compare."""
    from orchestrator.model import load_config

    after = _plain(model.config)
    own = {"quantization_config", DENSE_ENTRY}
    config = {key: value for key, value in checkpoint.config.items() if key not in own}
    changes = _differing(after, _plain(load_config(checkpoint)))
    for other, name in model.config.attribute_map.items():  # another name of a changed entry would contradict it
        if name in changes:
            config.pop(other, None)
    if changes:
        # Where config.json leaves an entry out it follows from others: head_dim from the number of heads, which may be
        # among the changes. What would now follow otherwise than the model has it is written too.
        config |= changes
        config |= _differing(after, _plain(type(model.config).from_dict(deepcopy(config))))
    return config


def _plain(config: Any) -> dict[str, Any]:
    return dict(json.loads(json.dumps(config.to_dict(), default=str)))


def _differing(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `after` that are others in `before`, but those that say how and by what a model is stored."""
    kept = sorted(after.keys() - {"quantization_config", "dtype", "transformers_version"})
    return {key: after[key] for key in kept if not key.startswith("_") and after[key] != before.get(key)}
