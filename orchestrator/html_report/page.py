"""The page of one run: one file with everything in it, made by a function of the facts alone.

A Content-Security-Policy forbids it scripts, fonts and requests; its pictures are SVG in the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from orchestrator.html_report import layer_sections, release_sections, sections
from orchestrator.html_report.facts import RunView
from orchestrator.html_report.findings import Gate, Measured, Verdict, gates_of, measured_of, verdict_of
from orchestrator.html_report.markup import Child, Html, element, trusted
from orchestrator.html_report.palette import LEVELS, variables
from orchestrator.html_report.sections import share_text
from orchestrator.html_report.tables import TITLES, facts, folded, number, seconds_text, verdict
from orchestrator.report import shown

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MOST_TILES = 4
# What a reader wants to know first, the first three that were measured; and which ratio is the worst of several tiers.
_HEADLINES: tuple[tuple[str, Callable[..., Measured]], ...] = (
    ("perplexity", max),
    ("bytes_on_disk", max),
    ("tokens_per_second", min),
    ("kl_mean", max),
    ("stream_perplexity", max),
    ("peak_memory_bytes", max),
)


def run_page(run: RunView) -> str:
    """Return the page of a run."""
    gates = gates_of(run)
    outcome = verdict_of(run, gates)
    parts = [
        sections.gate_section(run, gates),
        sections.measured_section(run),
        sections.curve_section(run),
        layer_sections.layer_section(run),
        layer_sections.trouble_section(run),
        sections.lineage_section(run),
        release_sections.serving_section(run),
        release_sections.release_section(run),
        release_sections.environment_section(run),
    ]
    names = ("gates", "measured", "curves", "layers", "troubles", "lineage", "serving", "release", "environment")
    head = [
        element("h1", run.title),
        element("p", _whence(run), class_="quiet"),
        banner(outcome),
        _error(run, gates),
        tiles(measured_of(run), gates),
        _header_facts(run),
        contents(names),
    ]
    return document(f"{run.title}: {outcome.word}", head, parts)


def _error(run: RunView, gates: Sequence[Gate]) -> Html | None:
    """What ended the run; folded where the table of gates says the same."""
    if not run.error:
        return None
    said = element("p", run.error, class_="error")
    return folded("What the run ended with", said) if any(gate.passed is False for gate in gates) else said


def _whence(run: RunView) -> str:
    if run.run is None:
        return "Read from the artifacts in the store: no run that made them is known."
    return f"run {run.run}"


def banner(outcome: Verdict) -> Html:
    """The verdict in a box."""
    good = outcome.good if outcome.word in ("passed", "refused", "failed") else None
    kind = "pass" if good else "fail" if good is False else "none"
    words = {
        "passed": "Gates passed",
        "refused": "Refused by a gate",
        "failed": "Failed",
        "unfinished": "Unfinished",
        "no gates": "No gates",
    }
    return element(
        "div", verdict(words[outcome.word], good), element("span", outcome.sentence), class_=f"banner {kind}"
    )


def tiles(measured: Sequence[Measured], gates: Sequence[Gate]) -> Html | None:
    """The few numbers that one would ask for first."""
    items: list[Html] = []
    for name, worst in _HEADLINES:
        tiers = [one for one in measured if one.row.name.partition(".")[0] == name]
        if not tiers or len(items) == MOST_TILES - 1:
            continue
        row = worst(tiers, key=lambda one: one.row.compressed if one.row.ratio is None else one.row.ratio).row
        before = "" if row.dense is None else f"dense {shown(row.name, row.dense)}"
        ratio = "" if row.ratio is None else f", ratio {shown('ratio', row.ratio)}"
        of = f", the worst of {len(tiers)}" if len(tiers) > 1 else ""
        items.append(
            element(
                "li",
                element("span", row.name.replace("_", " ") + of),
                element("strong", number(row.name, row.compressed)),
                element("span", before + ratio or "compressed model"),
            )
        )
    if gates:
        met, missed, open_ = (sum(gate.passed is passed for gate in gates) for passed in (True, False, None))
        closest = _closest(gates)
        counts = [f"{missed} not met"] * (missed > 0) + [f"{open_} not measured"] * (open_ > 0)
        items.append(
            element(
                "li",
                element("span", "gates met"),
                element("strong", f"{met} of {len(gates)}"),
                element("span", ", ".join(counts)) if counts else None,
                element("span", closest) if closest else None,
            )
        )
    return element("ul", items, class_="tiles") if items else None


def _closest(gates: Sequence[Gate]) -> str | None:
    """The gate with the least room, as a share of its bound; the one that is missed by most, if any is."""
    shares = [(gate.share, gate.metric) for gate in gates if gate.share is not None]
    if not shares:
        return None
    share, metric = min(shares)
    word, where = ("closest", "inside") if share >= 0 else ("worst", "beyond")
    return f"{word}: {metric}, {share_text(abs(share)).lstrip('+')} {where} its bound"


def _header_facts(run: RunView) -> Html:
    pairs: list[tuple[str, Child]] = []
    if run.started is not None:
        pairs.append(("started", utc(run.started)))
    if run.started is not None and run.ended is not None:
        pairs.append(("took", seconds_text(max(0.0, run.ended - run.started))))
    for name, key in (("engine", "engine"), ("specification", "spec"), ("source model", "model"), ("seed", "seed")):
        if key in run.facts:
            pairs.append((name, str(run.facts[key])))
    if "model_digest" in run.facts:
        pairs.append(("digest of the source model", element("code", str(run.facts["model_digest"])[:16])))
    if code := run.facts.get("trust_remote_code"):
        files = ", ".join(f"{name} {str(sha256)[:16]}" for name, sha256 in sorted(code.items()))
        pairs.append(("code of the model that ran", element("code", files)))
    states = [step.state for step in run.steps]
    counts = [
        f"{states.count(state)} {state}"
        for state in ("computed", "cached", "failed", "unfinished", "not run")
        if state in states
    ]
    pairs.append(("steps", ", ".join(counts) or "none"))
    return facts(pairs)


def utc(seconds: float) -> Html:
    """A point in time, in UTC."""
    moment = time.gmtime(seconds)
    return element(
        "time", time.strftime("%Y-%m-%d %H:%M:%S UTC", moment), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
    )


def contents(anchors: Iterable[str]) -> Html:
    """Links to the sections."""
    items = [element("li", element("a", TITLES[anchor], href=f"#{anchor}")) for anchor in anchors]
    return element("nav", element("ul", items), aria_label="Sections")


def document(title: str, head: Sequence[Child], parts: Sequence[Child]) -> str:
    """The whole file around a page's parts."""
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name_="referrer", content="no-referrer"),
            element("title", title),
            element("style", trusted(style())),
        ),
        element(
            "body",
            _definitions(),
            element("header", head),
            element("main", parts),
            element("footer", "Written by the compression orchestrator from the journal and the artifacts of the run."),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


@cache
def style() -> str:
    """The style sheet with its colours."""
    fixed = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    heat = "".join(
        f".h{level}{{fill:var(--heat-{level})}}.m{level}{{stroke:var(--mark-{level})}}" for level in range(LEVELS)
    )
    return f"{variables()}{fixed}{heat}"


def _definitions() -> Html:
    """The hatching of bars, which all drawings of the page share."""
    pattern = element(
        "pattern",
        element("path", d="M-1 1l2-2M0 6l6-6M5 7l2-2", class_="hatch"),
        id="hatch",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
    )
    return element("svg", element("defs", pattern), class_="definitions", aria_hidden="true")
