"""Record the flags of an engine from its own parser, as the schema with which our files are checked.

    .peers/engines/bin/python -m benchmarks.engines.record_schemas vllm FILE --older 0.30.0=FOLDER 0.32.0=FOLDER

Runs in the engines' environment. FOLDER: of an older version, unpacked; from these come the versions since which flags
exist, and since which others are gone. Nothing is written by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_PLUGINS", "")

TYPES = {"int": "int", "float": "float", "str": "str", "loads": "json", "parse_dataclass": "json"}
TYPES |= {"human_readable_int": "int", "parse_reasoning_parser": "str", "nullable_str": "str"}
NOT_SETTINGS = {"help", "config"}


def vllm_parser() -> argparse.ArgumentParser:
    """The parser of `vllm serve`."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # before 0.33
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


def sglang_parser() -> argparse.ArgumentParser:
    """The parser of `python -m sglang.launch_server`."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def vllm_values() -> dict[str, list[str]]:
    """Values that the parser takes as any text, and the configuration behind it does not."""
    from vllm.config.cache import CacheDType

    return {"kv-cache-dtype": list(typing.get_args(CacheDType))}


PARSERS = {"vllm": vllm_parser, "sglang": sglang_parser}


def type_of(action: argparse.Action) -> str:
    """bool, int, float, str, json; "any" for a conversion that is the engine's own."""
    if action.nargs == 0:
        return "bool"
    convert: Any = action.type
    while getattr(convert, "__name__", "") in ("_optional_type", "_parse_type"):
        convert = next(cell.cell_contents for cell in convert.__closure__)
    return "str" if convert is None else TYPES.get(getattr(convert, "__name__", ""), "any")


def flags_of(engine: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The flags by their first long name, and their other names."""
    parser = PARSERS[engine]()
    flags: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    for action in parser._actions:
        names = [option[2:].replace("_", "-") for option in action.option_strings if option.startswith("--")]
        if not names or names[0] in NOT_SETTINGS:
            continue
        entry: dict[str, Any] = {"type": type_of(action)}
        if action.choices:
            entry["choices"] = sorted((c for c in action.choices if c is not None), key=str)
        if isinstance(action.nargs, str):
            entry["nargs"] = action.nargs
        if isinstance(action, argparse._StoreTrueAction):
            entry["only_true"] = True  # a file cannot set it to false
        if isinstance(action.default, bool | int | float | str) and len(str(action.default)) <= 60:
            entry["default"] = action.default
        flags[names[0]] = entry
        aliases |= {name: names[0] for name in names[1:] if entry["type"] != "bool"}
    for name, values in (vllm_values() if engine == "vllm" else {}).items():
        flags[name]["choices"] = values
    return dict(sorted(flags.items())), dict(sorted(aliases.items()))


def older_flags(engine: str, folder: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The same of an older version, from its own process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((folder, str(Path(__file__).parents[2])))}
    command = [sys.executable, "-m", "benchmarks.engines.record_schemas", engine, "-"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    flags, aliases = json.loads(done.stdout.splitlines()[-1])
    return flags, aliases


def schema(engine: str, version: str, older: dict[str, str]) -> dict[str, Any]:
    """Everything that is known of the flags. older: folders by version."""
    versions = sorted(older, key=lambda text: [int(part) for part in text.split(".")])
    recorded = [*(older_flags(engine, older[text]) for text in versions), flags_of(engine)]
    versions.append(version)
    names = [{*flags, *aliases} for flags, aliases in recorded]
    flags, aliases = recorded[-1]
    choices_since = {}
    for name, entry in flags.items():
        before = [set(old.get(name, {}).get("choices", ())) for old, _ in recorded]
        newer = {
            value: versions[next(index for index, values in enumerate(before) if value in values)]
            for value in entry.get("choices", ())
            if before[0] and value not in before[0]
        }
        if newer:
            choices_since[name] = newer
    return {
        "engine": engine,
        "version": version,
        "recorded": versions,
        "flags": flags,
        "aliases": aliases,
        "since": {
            name: versions[next(index for index, found in enumerate(names) if name in found)]
            for name in sorted(names[-1] - names[0])
        },
        "removed": {
            name: versions[max(index for index, found in enumerate(names) if name in found) + 1]
            for name in sorted(set.union(*names) - names[-1])
        },
        "choices_since": choices_since,
    }


def main() -> None:
    """Write a schema, or print the flags of this version alone ("-")."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=sorted(PARSERS))
    parser.add_argument("file")
    parser.add_argument("--version", default="")
    parser.add_argument("--older", nargs="*", default=[], metavar="VERSION=FOLDER")
    arguments = parser.parse_args()
    if arguments.file == "-":
        print(json.dumps(flags_of(arguments.engine)))
        return
    found = schema(arguments.engine, arguments.version, dict(text.split("=", 1) for text in arguments.older))
    parts = []
    for key, value in found.items():
        if key == "flags":
            rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f'"flags": {{\n{rows}\n}}')
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    Path(arguments.file).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
