"""The sections of the page about what came out: serving plans, the release, and the versions that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from orchestrator.html_report.facts import Missing, RunView, StepView, kv_plans, release_of
from orchestrator.html_report.markup import Child, Html, element, join
from orchestrator.html_report.tables import absent, digest, facts, folded, missing, more, number, section, table
from orchestrator.report import size_text

_PLUGIN = "plugin "
MOST_FILES = 400  # rows of files: a release of thousands of shards is listed by its own release.json


def serving_section(run: RunView) -> Html:
    """The KV plan of each engine in the release."""
    releases = [(step, release_of(step)) for step in run.steps if step.stage == "register"]
    if not releases:
        return section("serving", missing("Nothing was to be released."))
    parts: list[Html] = []
    for step, release in releases:
        if isinstance(release, Missing):
            parts.append(missing(f"No release: {release.why}."))
            continue
        plans = kv_plans(step, release)
        found = {engine: plan for engine, plan in plans.items() if not isinstance(plan, Missing)}
        if found:
            headings = (
                "engine",
                "tokens #",
                "sequences #",
                "of tokens #",
                "element type",
                "bytes a token #",
                "blocks #",
                "weights #",
                "memory #",
            )
            parts.append(
                table(
                    "What fits on one accelerator beside the weights", headings, [_plan_row(*p) for p in found.items()]
                )
            )
        parts += [missing(f"{engine}: {plan.why}.") for engine, plan in plans.items() if isinstance(plan, Missing)]
        parts += [_arithmetic(engine, plan) for engine, plan in found.items()]
        if not plans:
            parts.append(missing("The release names no engine, so no KV cache was planned."))
    return section("serving", parts)


def _plan_row(engine: str, plan: Mapping[str, Any]) -> list[Child]:
    def cell(name: str) -> Html | str:
        value = plan.get(name)
        return number(name, value) if isinstance(value, int | float) else absent()

    version = plan.get("engine_version")
    return [
        element("span", engine, element("span", f" ({version})", class_="quiet") if version else None),
        cell("kv_tokens"),
        cell("max_concurrency"),
        cell("max_model_len"),
        str(plan.get("element_dtype", "-")),
        cell("bytes_per_token"),
        cell("num_blocks"),
        cell("weight_bytes"),
        cell("memory_bytes"),
    ]


def _arithmetic(engine: str, plan: Mapping[str, Any]) -> Html:
    steps = [element("li", str(step)) for step in plan.get("steps", ())]
    others = [
        (
            name,
            number("kv_tokens", facts_.get("kv_tokens")) if "refused" not in facts_ else absent(),
            number("max_concurrency", facts_.get("max_concurrency")) if "refused" not in facts_ else absent(),
            element("span", str(facts_.get("refused", "")), class_="prose"),
        )
        for key, what in (("other_dtypes", ""), ("tensor_parallel", " devices"))
        for name, facts_ in ((f"{name}{what}", values) for name, values in plan.get(key, {}).items())
    ]
    headings = ("instead", "tokens #", "sequences #", "refused because")
    return folded(
        f"{engine}: arithmetic and alternatives",
        element("ol", steps) if steps else None,
        table("With another element type, or on more devices", headings, others) if others else None,
    )


def release_section(run: RunView) -> Html:
    """Where the release is, and the digest of every file."""
    releases = [(step, release_of(step)) for step in run.steps if step.stage == "register"]
    if not releases:
        return section("release", missing("Nothing was to be released."))
    parts: list[Html] = []
    for step, release in releases:
        if isinstance(release, Missing):
            parts.append(missing(f"{step.label}: {release.why}."))
            continue
        files = release.get("files", [])
        total = sum(int(entry["bytes"]) for entry in files)
        parts.append(
            facts(
                (
                    ("address", element("code", release.get("uri", "-"))),
                    ("digest", element("code", release.get("digest", "-"))),
                    ("registry", f"models:/{release.get('model_name')}/{release.get('model_version')}"),
                    ("alias when released", str(release.get("alias") or "none")),
                    ("signed by", str(release.get("signed_by") or "nobody")),
                    ("size", join([number("bytes", total), f" in {len(files):,} files"])),
                )
            )
        )
        rows = [
            (element("code", entry["key"]), number("bytes", entry["bytes"]), element("code", entry["sha256"]))
            for entry in files[:MOST_FILES]
        ]
        listed = table("Files", ("file", "size #", "sha256"), rows)
        rest = len(files) - MOST_FILES
        parts.append(folded(f"{len(files):,} files with digests", listed, more(rest) if rest > 0 else None))
    return section("release", parts)


def environment_section(run: RunView) -> Html:
    """Versions of everything that computed."""
    made = [step for step in run.steps if step.identity]
    said = run.facts.get("machine")
    machine = said if isinstance(said, dict) else {}
    parts: list[Html] = []
    if machine:
        parts.append(facts((name.replace("_", " "), _machine(name, value)) for name, value in sorted(machine.items())))
    else:
        parts.append(missing("On which machine this ran is not recorded."))
    used: dict[tuple[str, str, str], list[StepView]] = {}
    for step in made:
        identity, plugin = step.identity, step.identity.get("plugin", {})
        entries = [(str(name), str(version), "") for name, version in identity.get("environment", {}).items()]
        entries.append(
            (f"{_PLUGIN}{plugin.get('distribution')}", str(plugin.get("version")), str(plugin.get("source")))
        )
        entries.append(("core", "", str(identity.get("core"))))
        for entry in entries:
            used.setdefault(entry, []).append(step)
    rows = [
        (_part(name, steps), version, digest(source), _ranges([step.index + 1 for step in steps]))
        for (name, version, source), steps in sorted(used.items())
    ]
    if rows:
        parts.append(
            table(
                "Libraries and plugins that the steps were computed with", ("what", "version", "source", "steps"), rows
            )
        )
    return section("environment", parts)


def _part(name: str, steps: Sequence[StepView]) -> Html | str:
    """What was used; of a plugin, for which methods: a distribution may hold several plugins, each with its source."""
    if not name.startswith(_PLUGIN):
        return name
    labels = ", ".join(dict.fromkeys(step.label for step in steps))
    return element("span", name, " ", element("span", labels, class_="quiet of"))


def _machine(name: str, value: Any) -> str:
    return size_text(value) if "bytes" in name and isinstance(value, int) else str(value)


def _ranges(steps: Sequence[int]) -> str:
    """Numbers of steps, runs of them joined: "1-4, 6"."""
    parts: list[str] = []
    for _, group in groupby(enumerate(steps), lambda pair: pair[1] - pair[0]):
        members = [step for _, step in group]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(parts)
