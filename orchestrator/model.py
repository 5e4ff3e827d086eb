"""Loading a whole model or tokenizer with stock Transformers: quietly, offline, from safetensors. Code that comes
with a model is run only where `orchestrator.remote_code` gives its classes.

For access block by block see `orchestrator.skeleton`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import PreflightError
from orchestrator.interrupts import interrupts_later
from orchestrator.kv_scales import kv_scale_names
from orchestrator.packing import unpack
from orchestrator.quantized import schemes_of
from orchestrator.reader import TensorReader
from orchestrator.remote_code import CONFIG, MODEL, TOKENIZER, own_class
from orchestrator.usage import reuse_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.checkpoint import Checkpoint
    from orchestrator.scheme import InputScheme, QuantScheme

COPY_AGAIN = "copy the model again, config.json and weights together"


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, config: Any = None) -> PreTrainedModel:
    """Load for inference, in eval mode, without gradients turned off.

    config: the Transformers configuration, where it is to be another than that of the checkpoint (fewer blocks).

    A model that this project quantized, or others in a layout that it reads, is decompressed here, in the dtype of its
    scales, and cast to `dtype`; where its scheme says so, its linear layers quantize their inputs, with scales in
    float32 as in kernels (compressed-tensors: in the model's dtype). In the dtype of the scales the logits are
    otherwise those of ``AutoModelForCausalLM.from_pretrained(folder)``. Other quantizations are left to Transformers.
    Scales of a KV cache are for engines; they do not change the model.

    Raises `PreflightError` for an architecture Transformers does not know, for missing or misshapen tensors (which
    Transformers would fill with random numbers) and for unreadable files.
    """
    from transformers import AutoModelForCausalLM

    weights = checkpoint.weight_files  # refuses pickles and missing files before Transformers looks for them
    options: dict[str, Any] = {} if config is None else {"config": config}
    folder: Path | None = checkpoint.path
    schemes = None
    if checkpoint.config.get("quantization_config") is not None:
        schemes = schemes_of(checkpoint.config, checkpoint.tensors)
    try:
        with quiet():
            own = own_class(checkpoint, MODEL)
            kind: Any = own or AutoModelForCausalLM
            if own:  # such a class would not find the class of its configuration
                options.setdefault("config", load_config(checkpoint))
            if schemes is not None:  # which the automatic class does not take without a folder
                folder, options = None, {"config": _dense_config(checkpoint, config)}
                options["state_dict"] = _decompressed(checkpoint, schemes)
                kind = own or AutoModelForCausalLM._model_mapping[type(options["config"])]
            model, loading = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=bool(weights),
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise _unloadable(checkpoint, error) from error
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading.get(fault):
            names = sorted(str(entry) for entry in loading[fault])
            raise PreflightError(
                f"{checkpoint.path} does not fit its config.json: {fault.replace('_', ' ')}"
                f" {', '.join(names[:3])}{' …' if len(names) > 3 else ''}",
                remedy=COPY_AGAIN,
            )
    if schemes is not None:
        _quantize_inputs(model, checkpoint, schemes)
    model.eval()
    return model


def _dense_config(checkpoint: Checkpoint, config: Any) -> Any:
    config = deepcopy(config) if config is not None else load_config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _decompressed(checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme]) -> dict[str, torch.Tensor]:
    """Return all stored tensors, with plain weights for packed ones, but for the scales of an engine's cache."""
    state: dict[str, torch.Tensor] = {}
    scales = kv_scale_names(checkpoint)
    with TensorReader(checkpoint) as read:
        for name in checkpoint.tensors:
            layer, _, part = name.rpartition(".")
            if name not in scales and (layer not in schemes or part == "bias"):
                state[name] = read(name)
        for layer, scheme in schemes.items():
            quantized = unpack(read, layer, scheme)
            state[f"{layer}.weight"] = quantized.dequantize(quantized.scale_OG.dtype)
    return state


def _quantize_inputs(model: PreTrainedModel, checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme]) -> None:
    """Let linear layers see their inputs as an engine does that multiplies in eight bits."""
    with TensorReader(checkpoint) as read:
        for layer, scheme in schemes.items():
            inputs = scheme.input_activations
            if inputs is not None:
                scale_1 = None if inputs.dynamic else read(f"{layer}.input_scale")

                def quantize(
                    module: Any, args: tuple[Any, ...], inputs: InputScheme = inputs, scale: Any = scale_1
                ) -> tuple[Any, ...]:
                    rounded = inputs.fake_quantize(args[0].detach(), scale)
                    if args[0].requires_grad:  # rounding has no gradient; it passes straight through
                        rounded = args[0] + (rounded - args[0]).detach()
                    return (rounded, *args[1:])

                model.get_submodule(layer).register_forward_pre_hook(quantize)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Raises `PreflightError` if the folder has none that Transformers can read."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            kind: Any = own_class(checkpoint, TOKENIZER) or AutoTokenizer
            return kind.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except PreflightError:
        raise
    except Exception as error:  # the Rust tokenizer raises bare Exception
        raise PreflightError(
            f"{checkpoint.path} has no tokenizer that Transformers can read: {_first_line(error)}",
            remedy="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def load_config(checkpoint: Checkpoint) -> Any:
    """Return the Transformers configuration object. Raises `PreflightError` for an unknown architecture."""
    from transformers import AutoConfig

    _ = checkpoint.config  # refuses a folder that asks for code which is not trusted
    try:
        with quiet():
            kind = own_class(checkpoint, CONFIG) or AutoConfig
            return kind.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except PreflightError:
        raise
    except Exception as error:  # strict configuration classes raise their own validation errors
        raise _unloadable(checkpoint, error) from error


def import_libraries(checkpoint: Checkpoint) -> float:
    """Import torch and the model's class, so that memory and time of what follows are its own; return the seconds."""
    started = time.perf_counter()
    reuse_memory()
    with interrupts_later():
        from transformers import AutoModelForCausalLM

        with suppress(PreflightError, KeyError, ImportError):  # who loads the model says what is wrong with it
            _ = own_class(checkpoint, MODEL) or AutoModelForCausalLM._model_mapping[type(load_config(checkpoint))]
    return time.perf_counter() - started


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers and compressed-tensors from writing to stderr; what matters becomes an error of ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), _no_foreign_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """Silence tqdm bars that have no switch of their own (compressed-tensors)."""
    from functools import partialmethod

    from tqdm import tqdm

    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


def _unloadable(checkpoint: Checkpoint, error: Exception) -> PreflightError:
    kind = checkpoint.config["model_type"]
    return PreflightError(
        f"{checkpoint.path} cannot be loaded as a causal language model (model_type {kind!r}): {_first_line(error)}",
        remedy="use a text model of an architecture that the installed Transformers has",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
