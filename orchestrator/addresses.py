"""Addresses as they may be shown."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)(?:[^/\s:@]*:\S*|[^/\s]+)@")
# What follows the question mark of an address; elsewhere in a text, also of a path, only what has the form NAME=VALUE.
# What closes a bracket or a sentence after it is no part of it.
_QUERY = re.compile(r"(://[^\s?#]*\?|[?#&](?=[^\s?#&=]+=))(\S+?)(?=[)'\"\].,:;>]*(?:\s|$))")


def without_password(text: str) -> str:
    """Return `text` without the secrets of any address in it: no user and password, also where they are not quoted,
    and of a query or a fragment only the names, as any of its values can be a secret."""
    return _QUERY.sub(_names_alone, _USER.sub("", text))


def _names_alone(match: re.Match[str]) -> str:
    parts = (part.partition("=") for part in match[2].split("&"))
    return match[1] + "&".join(f"{name}=…" if equals else "…" for name, equals, _ in parts)
