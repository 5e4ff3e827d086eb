"""``llama-server`` as the wheel of xllamacpp has it: the same parser of arguments, the same server, another main().

    python -m tests.llama_server ARGUMENTS OF llama-server

The wheel brings no program, but exports `common_params_parse`, which fills the structure that its Python class wraps.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

import xllamacpp

_PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
_SERVER = 12  # LLAMA_EXAMPLE_SERVER in common.h


def parsed(arguments: list[str]) -> xllamacpp.CommonParams | None:
    """What llama.cpp makes of arguments; None if it refuses them (it says why on stderr)."""
    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    parse = getattr(ctypes.CDLL(str(library)), _PARSE)
    parse.restype = ctypes.c_bool
    params = xllamacpp.CommonParams()
    argv = (ctypes.c_char_p * (len(arguments) + 2))(b"llama-server", *(text.encode() for text in arguments), None)
    behind_header = ctypes.c_void_p(id(params) + object.__basicsize__)  # where Cython has the structure
    good = parse(len(arguments) + 1, argv, behind_header, _SERVER, None)
    return params if good else None


if __name__ == "__main__":
    params = parsed(sys.argv[1:])
    if params is None:
        raise SystemExit(1)
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server
