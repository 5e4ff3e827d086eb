"""The model card of a release: README.md as the Hugging Face hub reads it (hf.co/docs/hub/model-cards).

Speed and memory are not in it: they belong to a machine, and MLflow has them.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.bootstrap import CONFIDENCE
from orchestrator.canonical import digest_of
from orchestrator.foreign import leads_outside
from orchestrator.foreign import shown as printable
from orchestrator.provenance import CARD, Evidence, Provenance
from orchestrator.remote_code import KEY
from orchestrator.report import RATIO, Row, metric_rows, shown

SOURCE_CARD = "README.source.md"
_LICENCE = re.compile(r"[A-Za-z0-9 .+()-]{1,80}")  # an identifier, or an expression of SPDX
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9./-]*")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
_SURE = f"{100 * CONFIDENCE:g} %"
_DEMANDS = {
    "min": "at least {}",
    "max": "at most {}",
    "retain": "at least {} of the dense model's retained",
    "must_not_fall": "not worse than dense beyond chance (difference)",
}


def write_card(folder: Path, source: Path, config: Mapping[str, Any], provenance: Provenance) -> None:
    """Write README.md into `folder`, and the card that the model in `source` came with, if any, beside it."""
    if (source / CARD).is_file() and not leads_outside(source / CARD, source):
        shutil.copyfile(source / CARD, folder / SOURCE_CARD)
    head = yaml.safe_dump(_front_matter(config, provenance), sort_keys=False, allow_unicode=True)
    body = "\n".join(_lines(folder, config, provenance))
    (folder / CARD).write_text(f"---\n{head}---\n\n{body}", encoding="utf-8")


def _front_matter(config: Mapping[str, Any], provenance: Provenance) -> dict[str, Any]:
    scheme = config.get("quantization_config") or {}
    hub_id = provenance.hub_id if provenance.hub_id and _HUB_ID.fullmatch(provenance.hub_id) else None
    stages = sorted({entry["stage"] for entry in provenance.lineage} & {"prune", "distill", "quantize"})
    return {
        **({"license": _licence(provenance.licence) or "other"} if provenance.licence else {}),
        **({"base_model": hub_id} if hub_id else {}),
        **({"base_model_relation": "quantized"} if hub_id and scheme else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compression-orchestrator", *stages, *([str(scheme["quant_method"])] if scheme else [])],
    }


def _lines(folder: Path, config: Mapping[str, Any], provenance: Provenance) -> Iterator[str]:
    source = _foreign(provenance.hub_id) if provenance.hub_id else "a local model"
    steps = [entry for entry in provenance.lineage if entry["stage"] != "calibrate"]
    made = ", then ".join(f"{entry['stage']} `{entry['method']}`" for entry in steps) or "left unchanged"
    yield f"# {provenance.name}"
    yield ""
    yield f"{source} ({_foreign(provenance.architecture)}), compressed: {made}."
    yield ""
    if provenance.code:
        yield "**Warning: this model runs code of its own when it is loaded. Read it first.**"
        yield "It came with the source model, and ran where this release was made:"
        yield ""
        yield from (f"- {_code(name)}, sha256 `{digest}`" for name, digest in sorted(provenance.code.items()))
        yield ""
    yield "## Quality"
    yield ""
    yield from _metrics(provenance)
    yield "## Gates"
    yield ""
    yield from _gates(provenance)
    yield ""
    yield "## How it was made"
    yield ""
    yield "| step | method | parameters | plugin |"
    yield "|---|---|---|---|"
    for entry in provenance.lineage:
        plugin = entry["plugin"]
        given = "; ".join(
            f"{name}: {_plain(value)}" for name, value in entry["parameters"].items() if value is not None
        )
        yield f"| {entry['stage']} | `{entry['method']}` | {given} | {plugin['distribution']} {plugin['version']} |"
    yield ""
    yield f"Source model: sha256 over its files `{provenance.source_digest}`."
    for digest, stages in provenance.data_sets().items():
        yield f"Text read by {', '.join(stages)}: sha256 `{digest}`."
    yield f"Libraries: {', '.join(f'{name} {version}' for name, version in sorted(provenance.libraries.items()))}."
    yield ""
    yield "## Limits"
    yield ""
    yield from (f"- {limit}" for limit in _limits(folder, config, provenance))
    yield ""
    yield "## Serving"
    yield ""
    for engine in sorted(provenance.engines):
        yield f"- `serving/{engine}/`: settings for {engine}, with what they assume."
    for form in sorted(provenance.formats):
        yield f"- `formats/{form}/`: the same model as {form}."
    trust = f", {KEY}=True" if provenance.code else ""
    yield f"- Transformers: `AutoModelForCausalLM.from_pretrained(FOLDER{trust})`."
    yield ""
    yield "## Verifying"
    yield ""
    yield "`release.json` lists every file with its sha256, `bom.cdx.json` is the bill of materials (CycloneDX 1.6)."
    if provenance.signed_by:
        yield f"The release is signed by the key with the fingerprint `{provenance.signed_by}`:"
    yield ""
    yield "```sh"
    flag = " --verify-key signing.pub" if provenance.signed_by else ""
    yield f"orchestrator pull URI FOLDER{flag}          # downloads and verifies everything"
    if provenance.signed_by:
        yield "model_signing verify key --signature FOLDER/model.sig --public_key signing.pub FOLDER"
    yield "```"
    yield ""


def _metrics(provenance: Provenance) -> Iterator[str]:
    measured = [(entry.method, entry.intervals, row) for entry in provenance.evidence for row in _rows(entry)]
    if not measured:
        yield "Not measured in the pipeline that made this release."
        yield ""
        return
    yield f"| measured by | metric | dense | compressed | ratio | {_SURE} interval |"
    yield "|---|---|---:|---:|---:|---|"
    for method, intervals, row in measured:
        cells = (_plain(row.name), shown(row.name, row.dense), shown(row.name, row.compressed), shown(RATIO, row.ratio))
        yield f"| `{method}` | {' | '.join(cells)} | {_interval(row.name, intervals.get(row.name))} |"
    yield ""
    yield "Ratios are compressed / dense, on held-out text of the pipeline; intervals are of what is compressed."
    yield ""


def _rows(evidence: Evidence) -> list[Row]:
    return metric_rows([{"stage": "validate", "metrics": evidence.metrics}])


def _gates(provenance: Provenance) -> Iterator[str]:
    """What was demanded, and what it was held against."""
    gates = [(entry.method, gate) for entry in provenance.evidence for gate in entry.gates]
    if not gates:
        yield "The pipeline demanded nothing of this model."
        return
    yield "| measured by | metric | demanded | found | interval | met |"
    yield "|---|---|---|---:|---|---|"
    for method, gate in gates:
        sure = f", {100 * gate['confidence']:.6g} % confidence" if gate["confidence"] else ""
        unit = RATIO if gate["bound"] == "retain" else gate["metric"]
        demanded = _DEMANDS[gate["bound"]].format(shown(unit, gate["limit"])) + sure
        cells = (_plain(gate["metric"]), demanded, shown(unit, gate["value"]), _interval(unit, gate["interval"]))
        yield f"| `{method}` | {' | '.join(cells)} | {'yes' if gate['passed'] else 'no'} |"
    yield ""
    yield "With a confidence, the worse end of the interval had to keep the bound."
    yield "Bounds on speed and memory, which depend on the machine, are not listed."


def _interval(name: str, ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{shown(name, ends[0])} to {shown(name, ends[1])}"


def _limits(folder: Path, config: Mapping[str, Any], provenance: Provenance) -> Iterator[str]:
    if provenance.licence:
        licence = _licence(provenance.licence) or "a licence of its own, see its card"
        yield f"Licence of the source model: {licence}; it holds for this one too."
    else:
        yield "The source model came without a statement of its licence: see its publisher before using this one."
    if not any(entry["stage"] == "quantize" for entry in provenance.lineage):
        yield "Weights are not quantized."
    if config.get("quantization_config"):
        yield "Engines without kernels for this format unpack the weights: they save disk and transfer, not memory."
    if provenance.zeros:
        yield f"{provenance.zeros[0].upper()}{provenance.zeros[1:]}"
    length = config.get("max_position_embeddings")
    if isinstance(length, int) and length:
        yield f"Trained for up to {length:,} positions."
    yield "What the source model was not meant for, or says wrongly, this one does too; compression can add to it."
    if (folder / SOURCE_CARD).is_file():
        yield f"The source's own card is `{SOURCE_CARD}`."


def _licence(text: str) -> str | None:
    """The licence, if the source model names one and does not tell a story instead."""
    return text if _LICENCE.fullmatch(text) else None


def _foreign(text: str) -> str:
    """What the source model says of itself: text on one line, whatever Markdown, HTML or a terminal would make of it.

    The name of a class, a model or a file stays as it is.
    """
    if len(text) <= 200 and all(_PLAIN_NAME.fullmatch(part) for part in text.split("_")):
        return text  # an underscore inside of a word is none of Markdown's
    line = " ".join(printable(text[:200]).split())
    return _MARKUP.sub(r"\\\1", html.escape(line, quote=False))


def _code(name: str) -> str:
    """The name of a file that came with the source model, as code."""
    return f"`{' '.join(printable(name).replace('`', chr(39)).split())}`"


def _plain(value: Any) -> str:
    """A parameter in a table cell: short, and without what Markdown would take for a column."""
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= 80 else f"(sha256 {digest_of(value)[:16]})"
