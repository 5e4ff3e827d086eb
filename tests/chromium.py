"""A page in headless Chromium: a picture of it, what it measures, and what the browser complains of."""

from __future__ import annotations

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


def probed(html: str, width: int) -> str:
    """A page that holds another in a frame of so many pixels, and writes into its own title what that one measures.

    Chromium's own window is never narrower than 500 pixels. The frame's policy is loosened for a script of ours: only
    here, in a copy.
    """
    script = (
        "<script>addEventListener('load',()=>{const d=document.documentElement;"
        "const wide=[...document.querySelectorAll('body *')].filter(e=>!e.closest('.scroll')&&!e.closest('svg')&&"
        "e.getBoundingClientRect().right>innerWidth+1).map(e=>e.tagName+'.'+e.className);"
        "const boxes=[...document.querySelectorAll('.scroll')].filter(e=>e.scrollWidth>e.clientWidth).length;"
        "parent.postMessage([innerWidth,d.scrollWidth,boxes,d.scrollHeight,wide.slice(0,5).join(' ')].join('|'),'*')})"
        "</script>"
    )
    loosened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace(
        "</body>", script + "</body>"
    )
    inner = loosened.replace("&", "&amp;").replace('"', "&quot;")
    return (
        f'<!doctype html><title>none</title><iframe width="{width}" height="1500" style="border:0" srcdoc="{inner}">'
        "</iframe><script>addEventListener('message',e=>{document.title=e.data})</script>"
    )


def measured(seen: Seen) -> tuple[int, int, int, int, str]:
    """What `probed` wrote: width of the window, of the page, boxes that scroll, height, elements that stick out."""
    found = re.search(r"<title>(\d+)\|(\d+)\|(\d+)\|(\d+)\|([^<]*)</title>", seen.dom)
    assert found, seen.dom[:300]
    return int(found[1]), int(found[2]), int(found[3]), int(found[4]), found[5]
