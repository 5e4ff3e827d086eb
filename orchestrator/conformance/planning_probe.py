"""Run in a process of its own: what planning does with a method, and which heavy packages that imports.

Reads {"module", "class", "parameters", "model"} from stdin; writes {"imported", "error"} as the last line of stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers")


def main() -> None:
    """Import, make and preflight the method; ask it what the planner asks."""
    request = json.load(sys.stdin)
    error = None
    try:
        _plan(request)
    except (Exception, SystemExit) as raised:  # told to the plugin's author by the process that started this one
        error = f"{type(raised).__name__}: {raised}"
    imported = [name for name in HEAVY if name in sys.modules]
    print(f"\n{json.dumps({'imported': imported, 'error': error})}")  # noqa: T201


def _plan(request: dict[str, Any]) -> None:
    from orchestrator.cache_policy import CachePolicy
    from orchestrator.checkpoint import Checkpoint, LayerShape
    from orchestrator.errors import OrchestratorError, SpecError
    from orchestrator.export_format import ExportFacts, ExportFormat
    from orchestrator.layer_method import LayerMethod
    from orchestrator.method import ModelMethod
    from orchestrator.serving import ModelShape
    from orchestrator.serving_engine import ServingEngine
    from orchestrator.spec import validate_strictly

    found: Any = importlib.import_module(request["module"])
    if "<locals>" in request["class"]:
        return  # a class inside a function cannot be reached from here; its module was imported at least
    for name in request["class"].split("."):
        found = getattr(found, name)
    method = validate_strictly(found, request["parameters"])
    method.preflight()
    model = Checkpoint(Path(request["model"]))
    if isinstance(method, LayerMethod):
        with contextlib.suppress(SpecError):  # it may refuse this dtype; what matters is what it imports
            method.for_dtype("bfloat16")
        method.scheme()
        method.sparsity_pattern()
        method.check_layer(LayerShape("model.layers.0.mlp.up_proj", 128, 64))
    elif isinstance(method, ModelMethod):
        method.needs_calibration()
        method.blocks_removed()
        with contextlib.suppress(OrchestratorError):  # it may refuse this model
            method.config_after(model.config)
    elif isinstance(method, ServingEngine):
        shape = ModelShape.from_config(model.config)
        method.render(shape, method.plan(shape, 0))
    elif isinstance(method, CachePolicy):
        method.reach_tokens()
        method.planned_bytes(ModelShape.from_config(model.config), 100)
        with contextlib.suppress(OrchestratorError):  # it may refuse this model
            method.check_model(model.config)
    elif isinstance(method, ExportFormat):
        method.check(ExportFacts(model, frozenset(), {}))


if __name__ == "__main__":
    main()
