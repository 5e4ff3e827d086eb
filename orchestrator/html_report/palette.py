"""The colours of the page, light and dark, as CSS variables.

Series have the hues of Okabe and Ito (2008, "Color universal design"), darkened or lightened until they stand out from
their ground; heat is viridis (van der Walt and Smith 2015), whose lightness alone orders it. That they survive colour
blindness and keep their contrast is computed in the tests. No colour stands alone: there is a word or a shape with it.
"""

from __future__ import annotations

from collections.abc import Mapping

_VIRIDIS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
LEVELS = len(_VIRIDIS)

LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "panel": "#f5f6f8",
    "rule": "#d5d9df",
    "shade": "#b4bac3",  # at an edge beyond which a box scrolls
    "ink": "#16191d",
    "quiet": "#535b66",
    "link": "#0b5394",
    "pass": "#00609a",
    "fail": "#b03a00",
    "series-0": "#0072b2",
    "series-1": "#d55e00",
    "series-2": "#00805e",
    "series-3": "#a0468a",
    **{f"heat-{level}": colour for level, colour in enumerate(reversed(_VIRIDIS))},  # the worst is the darkest
    **{f"mark-{level}": "#16191d" if level < LEVELS // 2 else "#ffffff" for level in range(LEVELS)},
}
DARK: Mapping[str, str] = {
    "ground": "#14171b",
    "panel": "#1d2127",
    "rule": "#3b424c",
    "shade": "#59626e",
    "ink": "#e9ecf0",
    "quiet": "#a8b0bb",
    "link": "#8ec7f4",
    "pass": "#6cbdf0",
    "fail": "#ff9d66",
    "series-0": "#56b4e9",
    "series-1": "#e69f00",
    "series-2": "#2bbf8e",
    "series-3": "#d98cba",
    **{f"heat-{level}": colour for level, colour in enumerate(_VIRIDIS)},  # the worst is the brightest
    **{f"mark-{level}": "#ffffff" if level < LEVELS // 2 else "#16191d" for level in range(LEVELS)},
}
SERIES = 4  # lines that one chart holds
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # so that lines are told apart without any colour


def variables() -> str:
    """Return the style sheet's variables: light, dark where the reader prefers it, light on paper."""

    def block(colours: Mapping[str, str]) -> str:
        return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"

    return f"{block(LIGHT)}\n@media screen and (prefers-color-scheme: dark){{{block(DARK)}}}\n"
