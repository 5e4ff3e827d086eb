"""Small parts that every section of the page is built of: tables that scroll, numbers, digests, what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from orchestrator.html_report.markup import Child, Html, element, join
from orchestrator.report import shown

TITLES = {
    "gates": "Gates",
    "measured": "Dense and compressed",
    "curves": "Curves",
    "layers": "Error of each layer",
    "troubles": "Damped, dead, fell back",
    "lineage": "Lineage",
    "serving": "Serving plans",
    "release": "Release",
    "environment": "Environment",
    "differences": "What differs",
    "steps": "What the steps took",
}


def section(anchor: str, *children: Child) -> Html:
    """A part of the page with a heading of the second level, which the list of contents names as well."""
    heading = element("h2", TITLES[anchor], id=f"{anchor}-heading")
    return element("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-heading")


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Child]], cards: str | None = None) -> Html:
    """A table in a box of its own, so that a narrow screen scrolls the box and not the page.

    The first cell of a row names it. A heading that ends in " #" is that of a column of numbers. cards: "card" makes
    every row a card on a phone, with the headings beside the cells; "card pair" sets columns that end in A and B, or
    begin with them, side by side in it.
    """
    right = [heading.endswith(" #") for heading in headings]
    kinds = ["number" if number else None for number in right]
    names = [heading.removesuffix(" #") for heading in headings]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(names, kinds, strict=True)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [
                element("td", cell, class_=kind, data_name=name if cards else None)
                for cell, kind, name in zip(row[1:], kinds[1:], names[1:], strict=True)
            ],
        )
        for row in rows
    ]
    whole = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", head)),
        element("tbody", body),
    )
    kind = f"scroll {cards}" if cards else "scroll"
    return element("div", whole, class_=kind, tabindex=0, role="region", aria_label=caption)


def slim(box: Html) -> Html:
    """A table as wide as its text, not as its place."""
    return element("div", box, class_="slim")


def number(name: str, value: float | None, text: str | None = None) -> Html | str:
    """A number as people read it, with its whole value where machines look; a dash where there is none."""
    if value is None:
        return absent()
    return element("data", shown(name, value) if text is None else text, value=repr(value), title=repr(value))


def seconds_text(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def interval(bounds: tuple[float, float] | None, name: str) -> Html | str:
    """A confidence interval."""
    if bounds is None:
        return absent()
    return element("span", number(name, bounds[0]), " to ", number(name, bounds[1]))


def breakable(name: str) -> Html:
    """A name that a narrow screen may break after a dot or a dash below."""
    return join(part if at % 2 == 0 else [part, element("wbr")] for at, part in enumerate(re.split("([._])", name)))


def absent() -> Html:
    """What stands where there is nothing."""
    return element("span", "-", class_="quiet absent", title="not there")


def digest(value: str | None) -> Html:
    """The beginning of a digest; the whole of it in the title."""
    return element("code", value[:12], title=value) if value else absent()


def missing(why: str) -> Html:
    """A sentence in place of a part that cannot be shown."""
    return element("p", why, class_="missing")


def folded(title: str, *children: Child, open_: bool = False) -> Html:
    """A part that the reader opens; printed open or closed as it is."""
    return element("details", element("summary", title), *children, open=open_)


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Names and what they are."""
    return element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in pairs])


def verdict(word: str, good: bool | None) -> Html:
    """A word with a shape: a tick in a circle, a cross in a square, or a dash; colour comes to it."""
    kind = "none" if good is None else "pass" if good else "fail"
    shapes = {
        "pass": [element("circle", cx=8, cy=8, r=7), element("path", d="M4.5 8.2l2.4 2.5 4.6-5")],
        "fail": [element("rect", x=1, y=1, width=14, height=14), element("path", d="M5 5l6 6m0-6l-6 6")],
        "none": [element("circle", cx=8, cy=8, r=7), element("path", d="M4.5 8h7")],
    }[kind]
    shape = element("svg", shapes, viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")
    return element("span", shape, word, class_=f"verdict {kind}")


def more(count: int) -> str:
    """The end of a list that was cut."""
    return f" and {count} more" if count > 0 else ""
