"""Settings of an engine against the flags of its own parser.

The schemas are recorded from the parsers (benchmarks/engines/record_schemas.py), with the version since which a flag or
a choice exists, where it is younger than the oldest version recorded, and since which others are gone.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from packaging.version import InvalidVersion, Version

from orchestrator.api import SpecError

NEWEST: Mapping[str, str] = {"vllm": "0.33.0", "sglang": "0.5.23"}
_TAKES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "json": (str, dict),
    "any": (str, int, float, dict),
}
# Flags that were gone before the oldest version that is recorded, and what to do instead.
_LONG_GONE: Mapping[str, Mapping[str, str]] = {
    "vllm": {
        "calculate-kv-scales": "scales come from the checkpoint: add `quantize: kv_scales`",
        "swap-space": "sequences are computed again instead: remove it",
        "rope-scaling": "it is read from config.json: remove it",
        "rope-theta": "it is read from config.json: remove it",
        "max-seq-len-to-capture": "use cudagraph-capture-sizes",
        "max-num-partial-prefills": "chunked prefill needs no such number: remove it",
        "num-scheduler-steps": "remove it; scheduling is asynchronous",
        "use-v2-block-manager": "remove it; there is one only",
        "quantization-param-path": "scales come from the checkpoint: add `quantize: kv_scales`",
        "preemption-mode": "sequences are computed again: remove it",
    }
}
_NAMES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "json": "JSON"}


def check_flags(engine: str, version: str, settings: Mapping[str, Any]) -> None:
    """Check settings as a configuration file gives them: flag, without dashes at the front, to value.

    Raises `SpecError` for a flag that this version does not have, a value of another type or outside the choices, and
    for a version whose flags are not recorded.
    """
    schema = _schema(engine)
    wanted = _version(engine, version, schema)
    for name, value in settings.items():
        # A name may go on, after a dot, with a key of the flag's JSON value (vLLM).
        flag, dot, _ = name.replace("_", "-").partition(".")
        entry = schema["flags"].get(schema["aliases"].get(flag, flag))
        removed = schema["removed"].get(flag)
        if entry is None and flag in _LONG_GONE.get(engine, {}):
            raise SpecError(f"{engine} has no --{flag} any more", remedy=_LONG_GONE[engine][flag])
        if entry is None and not (removed and wanted < Version(removed)):
            _refuse_name(engine, version, name, flag, removed, schema)
        since = schema["since"].get(flag)
        if since is not None and wanted < Version(since):
            raise SpecError(
                f"{engine} has --{flag} since {since} only, not in {version}",
                remedy=f"remove it, or serve with {since}",
            )
        if dot and entry is not None and entry["type"] not in ("json", "any"):
            raise SpecError(f"--{flag} of {engine} has no keys", remedy=f"write {flag}: and its value")
        if entry is not None and not dot:
            _check_value(engine, version, flag, value, entry, schema["choices_since"].get(flag, {}))


@functools.cache
def _schema(engine: str) -> dict[str, Any]:
    if engine not in NEWEST:
        raise SpecError(f"no flags are recorded of {engine}", remedy=f"one of {', '.join(NEWEST)}")
    path = files("orchestrator_serving") / "schemas" / f"{engine}-{NEWEST[engine]}.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def _version(engine: str, text: str, schema: Mapping[str, Any]) -> Version:
    oldest, newest = schema["recorded"][0], schema["recorded"][-1]
    try:
        version = Version(text)
    except InvalidVersion:
        raise SpecError(f"{text!r} is no version of {engine}", remedy=f"write it as {newest}") from None
    # A patch release has the flags of its minor version (vLLM); SGLang's minor versions are the third number.
    if not Version(oldest) <= version or version.release[: 2 + (engine == "sglang")] > Version(newest).release[:3]:
        raise SpecError(
            f"the flags of {engine} {text} are not recorded", remedy=f"serve with a version of {oldest} to {newest}"
        )
    return version


def _refuse_name(
    engine: str, version: str, name: str, flag: str, removed: str | None, schema: Mapping[str, Any]
) -> None:
    if removed is not None:
        raise SpecError(
            f"{engine} has no --{flag} any more: it is gone since {removed}", remedy="remove it from the settings"
        )
    close = difflib.get_close_matches(flag, [*schema["flags"], *schema["aliases"]], n=1)
    raise SpecError(
        f"{engine} {version} has no flag --{name[:60]}",
        remedy=f"did you mean {close[0]}?" if close else f"`{engine}` lists its flags with --help",
    )


def _check_value(
    engine: str, version: str, flag: str, value: Any, entry: Mapping[str, Any], since: Mapping[str, str]
) -> None:
    kind = entry["type"]
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and entry.get("nargs") not in ("+", "*"):
        raise SpecError(f"--{flag} of {engine} takes one value, not a list", remedy="give one value")
    for item in values:
        # In Python a truth value is a number, for a parser it is not.
        if not isinstance(item, _TAKES[kind]) or (isinstance(item, bool) and kind != "bool"):
            raise SpecError(
                f"--{flag} of {engine} takes {_NAMES.get(kind, 'text, a number or JSON')}, not {_shown(item)}",
                remedy=f"write {_NAMES.get(kind, 'such a value')}",
            )
        if kind == "json" and isinstance(item, str):
            _check_json(engine, flag, item)
        if isinstance(item, float) and not math.isfinite(item):
            raise SpecError(f"--{flag} of {engine} takes a finite number, not {item}", remedy="give a number")
        choices = entry.get("choices")
        if choices and item not in choices:
            close = difflib.get_close_matches(str(item), [str(choice) for choice in choices], n=1)
            raise SpecError(
                f"--{flag} of {engine} {version} cannot be {_shown(item)}",
                remedy=(f"did you mean {close[0]}? " if close else "")
                + f"One of {', '.join(str(choice) for choice in choices)}",
            )
        if isinstance(item, str) and item in since and Version(version) < Version(since[item]):
            raise SpecError(
                f"--{flag} {item} is known to {engine} since {since[item]} only, not to {version}",
                remedy=f"choose another value, or serve with {since[item]}",
            )
    if entry.get("only_true") and value is False:
        raise SpecError(f"--{flag} of {engine} can only be switched on", remedy="leave it out")


def _check_json(engine: str, flag: str, text: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise SpecError(
            f"--{flag} of {engine} takes JSON, which {_shown(text)} is not: {error}",
            remedy=f'write {{"key": value}}, or {flag}.key: value',
        ) from None


def _shown(value: Any) -> str:
    return repr(value)[:60]
