"""Addresses as they may be shown."""

from __future__ import annotations

import re


def without_password(text: str) -> str:
    """Return `text` with the user and password of any address in it removed, also where they are not quoted."""
    text = re.sub(r"(?<=://)(?:[^/\s:@]*:\S*|[^/\s]+)@", "", text)
    return re.sub(r"(?<=[?&]password=)[^&\s]+", "…", text)
