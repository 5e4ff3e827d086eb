"""Install the peers, each into its own virtual environment, at pinned versions.

    python -m benchmarks.peers.environments [NAME ...]

They lie under `ORCHESTRATOR_PEERS` (default `.peers/` in the repository), because no two of them agree on a version of
Transformers, and none with this project's. What is installed already is left alone.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# torch first and pinned: any other request pulls gigabytes of CUDA packages.
TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers==5.17.0"),
    "gptqmodel": ("gptqmodel==7.6.0", "transformers==5.23.0"),
    "trl": ("trl==1.16.0", "transformers==5.23.0"),
}
STAMP = "installed.txt"


class PeerError(Exception):
    """A peer cannot be installed or does not run; says why."""


def root() -> Path:
    """The folder that holds the environments."""
    return Path(os.environ.get("ORCHESTRATOR_PEERS") or REPOSITORY / ".peers").resolve()


@functools.cache
def _install(name: str) -> str | None:
    """Make a peer's environment if need be; return why that failed. Remembered, so that it is tried once."""
    folder = root() / name
    wanted = "\n".join((TORCH, *REQUIREMENTS[name])) + "\n"
    stamp = folder / STAMP
    try:
        # The stamp is written last, so that an interrupted installation is not taken for a whole one.
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return None
        print(f"installing {name} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        for requirements in ((TORCH,), (TORCH, *REQUIREMENTS[name])):
            command = [str(_python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*command, *requirements], capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                return f"pip install {' '.join(requirements)}: {lines[-1] if lines else done.returncode}"
        stamp.write_text(wanted, encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _python(name: str) -> Path:
    return root() / name / "bin" / "python"


def python_of(name: str) -> Path:
    """Return the interpreter of a peer's environment, which is made if need be. Raises `PeerError`."""
    reason = _install(name)
    if reason is not None:
        raise PeerError(reason)
    return _python(name)


def main() -> None:
    """Install the peers that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(REQUIREMENTS)}")
    failed = False
    for name in parser.parse_args().names or REQUIREMENTS:
        try:
            print(name, python_of(name))
        except PeerError as error:
            failed = True
            print(f"{name} failed: {error}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
