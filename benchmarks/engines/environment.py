"""vLLM and SGLang in an environment of their own, with what their parsers and vLLM's planner import, and without CUDA.

Both are installed without their dependencies, gigabytes of CUDA: what they import here is in requirements.txt.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers.environments import STAMP, TORCH, PeerError, root

VLLM, SGLANG = "0.33.0", "0.5.23"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
WITHOUT_DEPENDENCIES = (
    f"vllm=={VLLM}",
    f"sglang=={SGLANG}",
    "openai-harmony",
    "xgrammar==0.2.8",
    "llguidance<1.8",
    "compressed-tensors==0.17.0",
    "apache-tvm-ffi==0.1.11",
    "loguru",
    "triton",
)


def python() -> Path:
    """The interpreter of the environment, which is made if need be. Raises `PeerError`."""
    folder = root() / "engines"
    interpreter, stamp = folder / "bin" / "python", folder / STAMP
    wanted = "\n".join((TORCH, REQUIREMENTS.read_text(encoding="utf-8"), *WITHOUT_DEPENDENCIES)) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return interpreter
    print(f"installing vllm {VLLM} and sglang {SGLANG} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    for arguments in ((TORCH,), (TORCH, "-r", str(REQUIREMENTS)), ("--no-deps", *WITHOUT_DEPENDENCIES)):
        command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise PeerError(f"pip install {' '.join(arguments)}: {lines[-1] if lines else done.returncode}")
    stamp.write_text(wanted, encoding="utf-8")
    return interpreter


if __name__ == "__main__":
    print(python())
