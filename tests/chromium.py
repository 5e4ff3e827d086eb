"""A page in headless Chromium: a picture of it, what it measures, and what the browser complains of."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian package chromium)")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1")
_DARK = "--blink-settings=preferredColorScheme=0"


@dataclass(frozen=True)
class Seen:
    """complaints: lines of the page's console. dom: the document after loading."""

    complaints: list[str]
    dom: str


def look(page: Path, width: int, *, dark: bool = False, picture: Path | None = None) -> Seen:
    """Open a page in a window of so many CSS pixels; with `picture`, save what is seen instead of the document."""
    assert PROGRAM is not None
    task = "--dump-dom" if picture is None else f"--screenshot={picture}"
    command = [PROGRAM, *_FLAGS, "--enable-logging=stderr", f"--window-size={width},2000", task, page.as_uri()]
    profile = page.with_name(f"profile-{page.stem}-{width}-{dark}-{picture is None}")
    command[1:1] = [f"--user-data-dir={profile}", *([_DARK] if dark else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Seen([line for line in done.stderr.splitlines() if ":CONSOLE" in line], done.stdout)


@dataclass(frozen=True)
class Measures:
    """What a page measures in a frame, in CSS pixels.

    window, page, height: widths of the frame and of the page, its height. boxes: tables that scroll. beyond: elements
    outside of such boxes that stick out on the right. cells: squares of maps; seen: those that are wholly in sight.
    roles: how often a map's rows are named. cut: cells of gates and cards of which a part is out of sight.
    fonts: selector -> size.
    """

    window: int
    page: int
    height: int
    boxes: int
    beyond: list[str]
    cells: int
    seen: int
    roles: int
    cut: int
    fonts: dict[str, float]


_SCRIPT = """
addEventListener('load', () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const box = (one) => one.getBoundingClientRect();
  const inside = (one) => {
    const scrolled = one.closest('.scroll'), edge = scrolled ? Math.min(innerWidth, box(scrolled).right) : innerWidth;
    return box(one).left >= 0 && box(one).right <= edge + 1 && box(one).height > 0;
  };
  const beyond = all('body *').filter((one) => !one.closest('.scroll, svg') && box(one).right > innerWidth + 1);
  const shown = (one) => getComputedStyle(one).display !== 'none';
  const fonts = ['body', 'h2', 'caption', 'thead th', 'code'].map(
    (selector) => [selector, parseFloat(getComputedStyle(document.querySelector(selector)).fontSize)]);
  const measures = {
    window: innerWidth, page: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    boxes: all('.scroll').filter((one) => one.scrollWidth > one.clientWidth).length,
    beyond: beyond.slice(0, 5).map((one) => one.tagName + '.' + one.className),
    cells: all('.heat rect').length, seen: all('.heat rect').filter(inside).length,
    roles: all('.roles').filter(shown).length,
    cut: all('#gates td, #gates tbody th, .card td, .card tbody th').filter((one) => shown(one) &&
      !one.closest('details:not([open])') && (!inside(one) || one.scrollWidth > one.clientWidth + 1)).length,
    fonts: Object.fromEntries(fonts),
  };
  parent.postMessage(JSON.stringify(measures), '*');
});
"""


def probed(page: str, width: int, *, paper: bool = False) -> str:
    """A page that holds another in a frame of so many pixels, and writes into its own title what that one measures.

    Chromium's own window is never narrower than 500 pixels. The frame's policy is loosened for a script of ours: only
    here, in a copy. paper: with the style of a print.
    """
    if paper:
        page = page.replace("@media screen", "@media braille").replace("@media print", "@media all")
    loosened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace(
        "</body>", f"<script>{_SCRIPT}</script></body>"
    )
    return (
        f'<!doctype html><title>none</title><iframe width="{width}" height="1500" style="border:0" '
        f'srcdoc="{html.escape(loosened)}"></iframe>'
        "<script>addEventListener('message',e=>{document.title=e.data})</script>"
    )


def measured(seen: Seen) -> Measures:
    """What `probed` wrote."""
    found = re.search(r"<title>(\{.*?\})</title>", seen.dom)
    assert found, seen.dom[:300]
    return Measures(**json.loads(html.unescape(found[1])))
