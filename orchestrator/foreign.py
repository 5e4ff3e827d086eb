"""Reading what somebody else may have written: from plain files alone, up to a size, and nothing but data comes out.

A pipe would let us wait for ever and a device give bytes without end, so neither is opened as a file. PyYAML's safe
loader makes no objects, but raises whatever its constructors happen to; here it is one kind of error.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # of a file that is read as a whole


def read_plain(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the bytes of a plain file; links to one are followed.

    Raises `OSError` as opening does, `ValueError` for a pipe or device, and for more than `most_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe does not wait either
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not stat.S_ISREG(mode):
            raise ValueError("it is no plain file")
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return data


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is a link out of it: what it leads to is nothing that came with the folder.

    The cache of the Hugging Face hub keeps the files of `snapshots/REVISION` in `blobs` beside it.
    """
    if not path.is_symlink():
        return False
    target, home = path.resolve(), folder.resolve()
    cached = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return not (target.is_relative_to(home) or target.is_relative_to(cached))


def load_yaml(text: str) -> Any:
    """Return what a YAML document says, without objects of any kind. Raises `ValueError` for what is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # PyYAML's own, on odd tags
        raise ValueError(" ".join(str(error).split())) from None


def shown(text: str, most: int = 2000) -> str:
    """A text as a terminal or a page can show it: line breaks stay, what would steer a terminal is written out."""
    text = text if len(text) <= most else f"{text[: most - 200]} … ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
