"""HTML and SVG by construction: every text and every attribute is escaped, unless it is markup of ours already.

Names of layers, files and metrics come from models and specifications; none of them can become markup here, because
nothing but `element` makes `Html`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

_VOID = frozenset({"meta", "br", "rect", "line", "polyline", "circle", "path", "wbr"})
# Characters that HTML forbids, and those that turn text around on the screen.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is markup. Made by `element`, `join` and `trusted` only."""

    __slots__ = ()


Child: TypeAlias = "str | float | Iterable[Child] | None"


def element(name: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """Return an element. Strings are escaped, `Html` is not, None is nothing, lists are their parts.

    attributes: a name ends in ``_`` where Python has a word of that name, and has ``_`` for ``-``. None and False
    leave the attribute out, True gives it no value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        words.append(label if value is True else f'{label}="{text(value)}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID and not children:
        return Html(opening[:-1] + "/>")
    return Html(f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Put parts together, escaping what is no markup."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(text(child))
        elif child is not None:
            parts.append(join(child))
    return Html("".join(parts))


def text(value: str | float) -> Html:
    """Escape a text, for content and for attributes in double quotes."""
    return Html(escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True))


def trusted(source: str) -> Html:
    """Take a text of this package, such as its style sheet, as it is. Never for anything read from a run."""
    return Html(source)
