"""llama.cpp through the C interface of the library inside the `xllamacpp` wheel.

xllamacpp's own Python classes offer a server, but neither the quantizer nor logits; the library they are built into
exports llama.cpp's C functions, of which these are called (llama.h and ggml.h of llama.cpp, MIT):

* ``ggml_quantize_chunk``: llama.cpp's quantizer for one tensor, in this process.
* ``llama_decode`` and ``llama_tokenize``: a file loaded and run as its users do, in a process of its own, because
  llama.cpp ends the process where it finds a file it cannot use.

        python -m orchestrator_export.llama_cpp logits|tokenize MODEL INPUT OUTPUT THREADS

Parameter structures grow from version to version. They are passed through as the library's own defaults, of which only
the first three fields of the context's (n_ctx, n_batch, n_ubatch) are set, after their defaults have been recognized.

Shape legend: R = rows, I = in features, N = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api import PreflightError, StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

INSTALL = "pip install 'compression-orchestrator[gguf]'"
_USED = ("ggml_quantize_chunk", "ggml_row_size", "llama_model_load_from_file", "llama_decode", "llama_tokenize")
_DEFAULTS = (512, 2048, 512)  # of n_ctx, n_batch and n_ubatch in every version so far
_STRUCT_BYTES = 1024  # more than any of the parameter structures has
_MIN_CONTEXT = 256  # llama.cpp pads the KV cache to a multiple of this
_PIPE_SECONDS = 3600


class _Opaque(ctypes.Structure):
    """A parameter structure of the library, with room to spare."""

    _fields_ = [("words", c_uint32 * (_STRUCT_BYTES // 4))]


class _Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def check_installed() -> None:
    """Raise `PreflightError` if gguf or xllamacpp is missing, or the wheel's library lacks a function used here."""
    missing = [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise PreflightError(f"GGUF export needs the package {' and '.join(missing)}", remedy=INSTALL)
    _library_path()


def version() -> str:
    """The version of the wheel."""
    return importlib.metadata.version("xllamacpp")


def _library_path() -> Path:
    found = importlib.util.find_spec("xllamacpp")
    folder = Path(str(found.origin)).parent if found and found.origin else None
    libraries = sorted(folder.glob("xllamacpp*.so")) if folder else []
    if not libraries:
        raise PreflightError("the installed xllamacpp holds no shared library", remedy=INSTALL)
    return libraries[0]


@cache
def _library() -> Any:
    """The loaded library. Raises `PreflightError` if it lacks what is used here."""
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
        absent = [name for name in _USED if not hasattr(library, name)]
    except OSError as error:
        raise PreflightError(f"{path} cannot be loaded: {error}", remedy=INSTALL) from None
    if absent:
        raise PreflightError(
            f"the llama.cpp in xllamacpp {version()} does not export {', '.join(absent)}",
            remedy="install another version of xllamacpp; 2026.10.11549 does",
        )
    library.ggml_row_size.restype = c_size_t
    library.ggml_row_size.argtypes = [c_int32, c_int64]
    library.ggml_quantize_chunk.restype = c_size_t
    library.ggml_quantize_chunk.argtypes = [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    return library


def quantize(weight_RI: NDArray[np.float32], ggml_type: int) -> NDArray[np.uint8]:
    """Return the bytes [R, bytes of a row] of llama.cpp's quantization of a matrix, without an importance matrix.

    weight_RI: finite float32; I a multiple of the type's block. Raises `StepError` if llama.cpp makes other bytes than
    it should.
    """
    import numpy as np

    library = _library()
    weight_RI = np.ascontiguousarray(weight_RI, dtype=np.float32)
    num_rows, num_in = weight_RI.shape
    packed = np.empty((num_rows, library.ggml_row_size(ggml_type, num_in)), dtype=np.uint8)
    written = library.ggml_quantize_chunk(
        ggml_type, weight_RI.ctypes.data, packed.ctypes.data, 0, num_rows, num_in, None
    )
    if written != packed.nbytes:
        raise StepError(f"llama.cpp quantized {weight_RI.shape} into {written} bytes instead of {packed.nbytes}")
    return packed


def logits(model: Path, tokens_NT: NDArray[np.int32], scratch: Path) -> NDArray[np.float32]:
    """Return the logits [N, T, V] that llama.cpp computes, as a map of a file in `scratch`. Raises `StepError`."""
    import numpy as np

    given, result = scratch / "tokens.npy", scratch / "logits.npy"
    np.save(given, np.ascontiguousarray(tokens_NT, dtype=np.int32))
    _call("logits", model, given, result)
    values: NDArray[np.float32] = np.load(result, mmap_mode="r")
    return values


def tokenize(model: Path, texts: Sequence[str], scratch: Path) -> list[list[int]] | None:
    """Return what llama.cpp makes of texts, special tokens added and parsed; None if it refuses the file."""
    given, result = scratch / "texts.json", scratch / "tokens.json"
    given.write_text(json.dumps(list(texts)), encoding="utf-8")
    try:
        _call("tokenize", model, given, result)
    except StepError:
        return None
    tokens: list[list[int]] = json.loads(result.read_text(encoding="utf-8"))
    return tokens


def _call(verb: str, model: Path, given: Path, result: Path) -> None:
    import torch

    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", __name__, verb, str(model), str(given), str(result), threads]
    paths = os.pathsep.join(path for path in sys.path if path)  # also where this package itself was found
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, timeout=_PIPE_SECONDS, check=False, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in said if "error" in line.lower() or "assert" in line.lower()] or said
        raise StepError(
            f"llama.cpp (xllamacpp {version()}) cannot use {model.name}: {' '.join(telling[:2])[:500]}",
            remedy="tell this plugin's authors; no file is released",
        )


# From here on: the process that runs llama.cpp.


class _Runner:
    """A loaded file."""

    def __init__(self, model: Path) -> None:
        library = _library()
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Opaque
        for name in (
            "llama_model_load_from_file",
            "llama_init_from_model",
            "llama_get_memory",
            "llama_model_get_vocab",
        ):
            getattr(library, name).restype = c_void_p
        library.llama_model_load_from_file.argtypes = [c_char_p, _Opaque]
        library.llama_init_from_model.argtypes = [c_void_p, _Opaque]
        library.llama_model_get_vocab.argtypes = [c_void_p]
        library.llama_get_memory.argtypes = [c_void_p]
        library.llama_memory_clear.argtypes = [c_void_p, c_bool]
        library.llama_batch_init.restype = _Batch
        library.llama_batch_init.argtypes = [c_int32, c_int32, c_int32]
        library.llama_decode.argtypes = [c_void_p, _Batch]
        library.llama_get_logits_ith.restype = POINTER(c_float)
        library.llama_get_logits_ith.argtypes = [c_void_p, c_int32]
        library.llama_vocab_n_tokens.argtypes = [c_void_p]
        library.llama_set_n_threads.argtypes = [c_void_p, c_int32, c_int32]
        library.llama_tokenize.argtypes = [
            c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool
        ]  # fmt: skip
        self.library = library
        library.llama_backend_init()
        self.model = library.llama_model_load_from_file(str(model).encode(), library.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"error: llama.cpp does not load {model}")
        self.vocab = library.llama_model_get_vocab(self.model)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = (c_int32 * (len(data) + 16))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), room, len(room), True, True)
        if count < 0:
            raise SystemExit(f"error: {-count} tokens for {len(data)} bytes")
        return list(room[:count])

    def logits(self, given: Path, result: Path, threads: int) -> None:
        import numpy as np

        tokens_NT = np.load(given)
        num_sequences, length = tokens_NT.shape
        num_vocab = self.library.llama_vocab_n_tokens(self.vocab)
        params = self.library.llama_context_default_params()
        if tuple(params.words[:3]) != _DEFAULTS:
            raise SystemExit(f"error: the context parameters of this llama.cpp begin with {params.words[:3]}")
        params.words[0] = max(_MIN_CONTEXT, -(-length // _MIN_CONTEXT) * _MIN_CONTEXT)
        params.words[1] = params.words[2] = length
        context = self.library.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit("error: llama.cpp makes no context")
        self.library.llama_set_n_threads(context, threads, threads)
        batch = self.library.llama_batch_init(length, 0, 1)
        out_NTV = np.lib.format.open_memmap(
            result, mode="w+", dtype=np.float32, shape=(num_sequences, length, num_vocab)
        )
        for number, tokens_T in enumerate(tokens_NT.tolist()):
            self.library.llama_memory_clear(self.library.llama_get_memory(context), True)
            batch.n_tokens = length
            for place, token in enumerate(tokens_T):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.logits[place] = 1, 1
                batch.seq_id[place][0] = 0
            if self.library.llama_decode(context, batch):
                raise SystemExit("error: llama_decode failed")
            for place in range(length):
                found = self.library.llama_get_logits_ith(context, place)
                out_NTV[number, place] = np.ctypeslib.as_array(found, (num_vocab,))
        out_NTV.flush()


def main() -> int:
    """Do what the command line says; llama.cpp's own log goes to stderr."""
    verb, model, given, result, threads = sys.argv[1:]
    runner = _Runner(Path(model))
    if verb == "logits":
        runner.logits(Path(given), Path(result), int(threads))
    else:
        texts = json.loads(Path(given).read_text(encoding="utf-8"))
        Path(result).write_text(json.dumps([runner.tokenize(text) for text in texts]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
