"""A model on disk: its configuration, tensor shapes and digests, read without torch; and loading it with stock
Transformers. Only safetensors are accepted: a pickle is refused before anything is read from it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.addresses import without_password
from orchestrator.canonical import digest_of, file_sha256
from orchestrator.errors import PreflightError
from orchestrator.foreign import leads_outside, read_plain
from orchestrator.layers import is_embedding, is_router, stores_transposed
from orchestrator.quantized import quantizes_weights, schemes_of
from orchestrator.remote_code import ModelCode, check_code, read_code, with_verified_code
from orchestrator.scheme import QuantScheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_INDEX = "model.safetensors.index.json"
SINGLE_WEIGHT_FILE = "model.safetensors"
_ADAPTER = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What travels with a model beside its weights and config.json.
COMPANION_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "LICENSE*",
)
_BLOCK_LINEAR = re.compile(r"^(?P<block>(?:.+\.)?(?:layers|h|blocks)\.(?P<index>\d+))\.(?P<inner>.+)\.weight$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# Bytes of one element, for the dtypes that have whole ones.
_ELEMENT_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ELEMENT_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_RANK = 64  # torch's own limit
_MAX_NAME = 1000  # characters; what the numbers in it stand for is calculated with
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


@dataclass(frozen=True)
class LayerShape:
    """A linear layer as the plan sees it, before any weight is read."""

    name: str  # e.g. model.layers.0.mlp.up_proj
    out_features: int
    in_features: int


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, dtype as safetensors names it ("BF16"), shape, first byte in the file, and bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Checkpoint:
    """A Hugging Face folder with safetensors weights.

    Raises `PreflightError` when the folder is missing, holds no readable config.json or no safetensors weights, or
    when a weight file is truncated.

    code: what comes with the model and is trusted; None where no code of a model may run, and none is expected.
    """

    def __init__(self, path: Path, *, dtype: str = "auto", code: ModelCode | None = None) -> None:
        self.path = Path(path)
        self.code = code
        self.dtype = dtype  # "auto" (as stored), or a torch dtype name to load in
        if not _is_folder(self.path):
            raise PreflightError(
                f"there is no model folder {self.path}", remedy="give a hub id or a folder with config.json"
            )

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, dtype={self.dtype!r})"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        path = self.path / "config.json"
        try:
            config = json.loads(read_plain(path))
        except FileNotFoundError:
            raise PreflightError(
                f"{self.path} has no config.json", remedy="give a folder in Hugging Face layout"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise PreflightError(f"{path} cannot be read: {error}", remedy="copy the model again") from None
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise PreflightError(f"{path} names no model_type", remedy="give a folder in Hugging Face layout")
        for entry in ("quantization_config", "compression_config"):
            if not isinstance(config.get(entry, {}), dict | None):
                raise PreflightError(f"{path} gives {entry} as no mapping", remedy="copy the model again")
        check_code(self.path, config, self.code)
        if (self.path / _ADAPTER).exists():  # Transformers would load what it names in place of this model
            raise PreflightError(
                f"{self.path} is an adapter, not a model: it holds {_ADAPTER}",
                remedy="merge it into its model (PEFT's `merge_and_unload`), or remove its files",
            )
        return config

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the safetensors files, sorted."""
        index = self.path / WEIGHT_INDEX
        if index.is_file():
            try:
                files = list(json.loads(read_plain(index))["weight_map"].values())
                if not all(isinstance(name, str) for name in files):
                    raise ValueError("weight_map must give a file name for each tensor")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise PreflightError(f"{index} cannot be read: {reason}", remedy="copy the model again") from None
            names = sorted(set(files))
            present = {entry.name for entry in self.path.iterdir() if entry.is_file()}
            for name in names:
                if name not in present:
                    raise PreflightError(
                        f"{index} names {name!r}, which is not in the folder", remedy="copy the model again"
                    )
            return tuple(names)
        if (self.path / SINGLE_WEIGHT_FILE).is_file():
            return (SINGLE_WEIGHT_FILE,)
        pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise PreflightError(
                f"{self.path} holds its weights as a pickle ({pickles[0]}), which can run code when it is loaded",
                remedy="convert it with `model.save_pretrained(FOLDER)`, which writes safetensors",
            )
        raise PreflightError(
            f"{self.path} has no {SINGLE_WEIGHT_FILE} and no {WEIGHT_INDEX}", remedy="give a folder with safetensors"
        )

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All stored tensors by name, read from the safetensors headers only."""
        found: dict[str, TensorInfo] = {}
        for name in self.weight_files:
            found.update(_read_header(self.path / name))
        return dict(sorted(found.items()))

    def block_layers(self) -> list[LayerShape]:
        """The linear layers inside decoder blocks, in the order of the blocks; those of experts are among them.

        Embeddings, norms, lm_head and what routes tokens to experts are not: they stay as they are.
        """
        layers = []
        for name, info in self.tensors.items():
            match = _BLOCK_LINEAR.match(name)
            layer = name.removesuffix(".weight")
            if match and len(info.shape) == 2 and not is_router(layer):
                num_out, num_in = reversed(info.shape) if self.stores_transposed else info.shape
                layers.append((int(match["index"]), LayerShape(layer, num_out, num_in)))
        return [layer for _, layer in sorted(layers, key=lambda item: (item[0], item[1].name))]

    def layers_by_block(self) -> dict[str, list[str]]:
        """Names of the layers of `block_layers` by the name of their block."""
        found: dict[str, list[str]] = {}
        for layer in self.block_layers():
            match = _BLOCK_LINEAR.match(f"{layer.name}.weight")
            assert match is not None
            found.setdefault(match["block"], []).append(layer.name)
        return found

    def dense_layers(self) -> list[str]:
        """Names of the linear layers that no step compresses: routers, the output head, projections beside blocks."""
        compressed = {layer.name for layer in self.block_layers()}
        matrices = [n for n, info in self.tensors.items() if n.endswith(".weight") and len(info.shape) == 2]
        names = [name.removesuffix(".weight") for name in matrices]
        return [name for name in names if name not in compressed and not is_embedding(name)]

    @property
    def positions(self) -> int | None:
        """How many positions the model was made for, if its configuration says so plainly."""
        positions = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        scaling = self.config.get("rope_parameters") or self.config.get("rope_scaling")
        scaling = scaling if isinstance(scaling, dict) else {}
        # These reach farther than max_position_embeddings, by a factor that not all of them apply at every length.
        stretched = scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic", "yarn")
        return positions if isinstance(positions, int) and not stretched else None

    @property
    def stores_transposed(self) -> bool:
        """Whether the layers of `block_layers` are stored as [in features, out features]."""
        return stores_transposed(self.config)

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are stored as packed integers."""
        return quantizes_weights(self.config)

    def schemes(self) -> dict[str, QuantScheme]:
        """Return the scheme of every quantized layer; {} for a dense model.

        Raises `PreflightError` for a quantization other than those that this project writes.
        """
        found = schemes_of(self.config, self.tensors)
        if found is None:
            entry = self.config.get("quantization_config") or {}
            raise PreflightError(
                f"the model is quantized in a way this version does not read: {entry.get('quant_method')!r},"
                f" format {entry.get('format')!r}",
                remedy="start from the model before quantization",
            )
        return found

    @cached_property
    def stored_dtype(self) -> str:
        """The torch name of the dtype that most stored parameters have, e.g. "bfloat16"."""
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        count: dict[str, int] = {}
        for info in self.tensors.values():
            if info.dtype in names:
                elements = 1
                for size in info.shape:
                    elements *= size
                count[names[info.dtype]] = count.get(names[info.dtype], 0) + elements
        return max(sorted(count), key=lambda name: count[name], default="float32")

    def companion_files(self) -> list[str]:
        """Names of the tokenizer, generation, licence and code files, sorted. They travel with the model, as they are.

        Raises `PreflightError` for a link to a file that is not the model's: it would be published with it.
        """
        found = {p.name for pattern in COMPANION_PATTERNS for p in self.path.glob(pattern) if p.is_file()}
        for name in sorted(found):
            if leads_outside(self.path / name, self.path):
                raise PreflightError(
                    f"{self.path / name} is a link to a file outside of the model's folder",
                    remedy="copy the file into the folder if it belongs to the model, else remove the link",
                )
        found |= set(self.code.files) if self.code else set()
        return sorted(name for name in found if Path(name).suffix not in PICKLE_SUFFIXES)

    def model_files(self) -> list[str]:
        """Names of all files that make up the model, sorted."""
        index = [WEIGHT_INDEX] if (self.path / WEIGHT_INDEX).is_file() else []
        return sorted(["config.json", *index, *self.weight_files, *self.companion_files()])

    def weight_bytes(self) -> int:
        """Bytes of all weight files on disk."""
        return sum((self.path / name).stat().st_size for name in self.weight_files)

    def digest(self, sha256: Callable[[Path], str] = file_sha256) -> str:
        """Return a sha256 over the names and sha256 of all model files."""
        return digest_of({name: sha256(self.path / name) for name in self.model_files()})

    @property
    def dtype_name(self) -> str:
        """The torch name of the dtype in which the model is loaded and plain weights are written."""
        return self.stored_dtype if self.dtype == "auto" else self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as torch knows it."""
        import torch

        return getattr(torch, self.dtype_name)  # type: ignore[no-any-return]

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load with stock Transformers, in eval mode. `dtype` defaults to the checkpoint's own.

        A quantized checkpoint is decompressed on loading: exactly what an engine computes, at plain-weight speed.
        """
        from orchestrator.model import load_model

        return load_model(self, dtype or self.torch_dtype)

    def loadable(self, scratch: Path) -> Path:
        """Return a folder that another process can load: this one, or one below `scratch` if code comes with it."""
        return self.path if self.code is None else with_verified_code(self, scratch)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer. Raises `PreflightError` if the folder has none that Transformers can read."""
        from orchestrator.model import load_tokenizer

        return load_tokenizer(self)


def locate_model(
    model_id: str, revision: str, base: Path, dtype: str = "auto", *, trust_remote_code: bool = False
) -> Checkpoint:
    """Return the checkpoint for a local folder (relative to `base`) or a hub id.

    A hub id is taken from the local hub cache, or downloaded: safetensors, configuration and tokenizer only.
    trust_remote_code: let code in a local folder run. Raises `PreflightError` when the model cannot be had.
    """
    if "://" in model_id:  # what follows the path may be a signature: it is not repeated
        raise PreflightError(
            f"{without_password(model_id.partition('?')[0])} is an address, not a model",
            remedy="name a model of the hub as OWNER/NAME, or download it into a folder and name that",
        )
    folder = base / expand_home(model_id)
    if _is_folder(folder) or model_id.startswith((".", "/", "~")) or not _HUB_ID.match(model_id):
        found = Checkpoint(folder, dtype=dtype)
        found.code = read_code(folder, may_run=True) if trust_remote_code else None
        return found
    if trust_remote_code:
        raise PreflightError(
            f"code of {model_id!r} on the hub is not downloaded, and not run",
            remedy="download the model into a folder, read its code, and name the folder",
        )
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=["config.json", "*.safetensors", WEIGHT_INDEX, *COMPANION_PATTERNS],
        )
    except Exception as error:  # the hub's client raises some twenty kinds, and all mean the same to the user
        raise PreflightError(
            f"{model_id!r} is neither a folder below {base} nor to be had from the hub: {type(error).__name__}",
            remedy="check the name and the network, or give a local folder",
        ) from error
    return Checkpoint(Path(path), dtype=dtype)


def expand_home(path: str) -> Path:
    """Return a path with ~ and ~user written out. Raises `PreflightError` if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = path.partition("/")[0]
        raise PreflightError(f"{user} is nobody's home folder here", remedy="write the whole path") from None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes, or a folder above that may not be read
        return False


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Read a safetensors header and check that the file is as long as the header says."""
    remedy = "copy the model again"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError("this is not a safetensors file")
            header = json.loads(file.read(length))
        infos, end = {}, 0
        for name, entry in header.items():
            if name != "__metadata__":
                infos[name] = _tensor_info(path.name, name, entry, 8 + length)
                end = max(end, entry["data_offsets"][1])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PreflightError(f"{path} cannot be read: {error}", remedy=remedy) from None
    expected = 8 + length + end
    actual = path.stat().st_size
    if actual != expected:
        raise PreflightError(f"{path} is damaged: {actual} bytes instead of {expected}", remedy=remedy)
    return infos


def _tensor_info(file: str, name: str, entry: Any, base: int) -> TensorInfo:
    """Check one entry of a header, whose data begin at `base`.

    Raises `ValueError`, or `KeyError` and `TypeError` for one of another form.
    """
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError(f"the header gives no dtype and shape for {name!r}")
    if len(name) > _MAX_NAME:
        raise ValueError(f"the header has a name of {len(name)} characters")
    sizes = (*shape, start, end)
    if len(shape) > _MAX_RANK or not all(type(size) is int and 0 <= size < 2**63 for size in sizes) or end < start:
        raise ValueError(f"the header gives {name!r} the shape {shape} at {entry['data_offsets']}")
    element = _ELEMENT_BYTES.get(dtype)
    if element is not None and math.prod(shape) * element != end - start:
        raise ValueError(f"the header gives {name!r} {end - start} bytes for {dtype} {shape}")
    return TensorInfo(file, dtype, tuple(shape), base + start, end - start)
