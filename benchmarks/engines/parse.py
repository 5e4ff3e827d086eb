"""Give files of ours to the engines' own parsers, and to vLLM's planner. Runs in the engines' environment.

    .peers/engines/bin/python -m benchmarks.engines.parse vllm|sglang RESULT FOLDER...

FOLDER holds vllm.yaml or sglang.yaml, config.json, and available.txt: the bytes of the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def with_vllm(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Parse, make the whole engine configuration, build the model on the meta device, and plan."""
    from benchmarks.engines.record_vllm_kv import plan, prepare
    from benchmarks.engines.without_gpu import pretend

    pretend()
    prepare()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from benchmarks.engines.record_schemas import vllm_parser

    parser, found = vllm_parser(), {}
    for folder in folders:
        os.chdir(folder)
        try:
            arguments = parser.parse_args(["--config", "vllm.yaml"])
            arguments.skip_tokenizer_init = True
            engine = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
            found[folder.name] = plan(engine, int(Path("available.txt").read_text(encoding="utf-8")))
        except (SystemExit, Exception) as error:  # whatever it is, the engine would not start
            found[folder.name] = {"refused": f"{type(error).__name__}: {error}"[:400]}
    return found


def with_sglang(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Merge the file into the command line and parse, as the launcher does before it looks for a device."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    found = {}
    for folder in folders:
        os.chdir(folder)
        try:
            parser = argparse.ArgumentParser()
            ServerArgs.add_cli_args(parser)
            line = ConfigArgumentMerger(parser).merge_config_with_args(["--config", "sglang.yaml"])
            arguments = ServerArgs.from_cli_args(parser.parse_args(line))
            found[folder.name] = {"max_total_tokens": arguments.max_total_tokens, "page_size": arguments.page_size}
        except (SystemExit, Exception) as error:
            found[folder.name] = {"refused": f"{type(error).__name__}: {error}"[:400]}
    return found


def main() -> None:
    """Write what the engine said of each folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("result", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    result, folders = arguments.result.resolve(), [folder.resolve() for folder in arguments.folders]
    os.chdir(tempfile.gettempdir())
    found = with_vllm(folders) if arguments.engine == "vllm" else with_sglang(folders)
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
