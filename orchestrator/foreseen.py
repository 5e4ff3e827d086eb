"""The models that the steps of a plan will read, as far as they are known before: config.json and shapes, no numbers.

A `ModelMethod` says what it makes of config.json (`config_after`) and how many decoder blocks it removes. The shapes
follow from that: they are those of the modules that Transformers builds from the configuration. Later steps are held
against them, and what they will take is reckoned with them. After the step the stored layers are compared with what
was foreseen, so that planning is never quietly wrong.

Building modules needs torch, which takes seconds to import: where it is not imported already, a process of its own is
asked, once for each model and method. What it answered is kept in the home; what it refuses is asked again.

    python -m orchestrator.foreseen    reads a question as JSON; prints the answer, or the problems and their exit code
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.canonical import canonical_json, digest_of, write_atomically
from orchestrator.checkpoint import Checkpoint, LayerShape, TensorInfo
from orchestrator.checks import Draft, Note, PluginFaultError, plugin_fault
from orchestrator.errors import OrchestratorError, PreflightError, Problem, SpecError, StepError
from orchestrator.method import ModelMethod
from orchestrator.packing import unpack
from orchestrator.plugins import discover, library_versions, package_digest
from orchestrator.remote_code import KEY, ModelCode, recorded_code
from orchestrator.usage import has_torch

_FILE = "foreseen.json"
_KEPT = 16  # answers
_BLOCK = re.compile(r"((?:.+\.)?(?:layers|h|blocks)\.)(\d+)(?=\.)")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Shapes = dict[str, tuple[int, ...]]
Find = Callable[[Mapping[str, Any]], Shapes]


class Foreseen(Checkpoint):
    """A model that is not there yet: the configuration and the shapes of its tensors; the companions of its source.

    whole: the same before decoder blocks were removed, if that was the last that happened to it.
    """

    def __init__(self, source: Checkpoint, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(source.path, dtype=source.dtype, code=source.code)
        self.whole: Checkpoint | None = None
        stored = _STORED.get(source.dtype_name, "F32")
        kept = {name: info.dtype for name, info in source.tensors.items() if info.dtype not in _ITEM_BYTES}
        self.config = dict(config)
        self.tensors = {
            name: TensorInfo("", kept.get(name, stored), tuple(shape), 0, math.prod(shape) * _ITEM_BYTES[stored])
            for name, shape in sorted(shapes.items())
        }

    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


def shapes_of(model: Checkpoint) -> Shapes:
    """The shape of every stored tensor, by name."""
    return {name: info.shape for name, info in model.tensors.items()}


def with_blocks(model: Checkpoint, kept: Sequence[int]) -> Foreseen:
    """Return the model with the decoder blocks `kept` alone, numbered anew."""
    places = {old: new for new, old in enumerate(kept)}
    shapes: Shapes = {}
    for name, shape in shapes_of(model).items():
        match = _BLOCK.match(name)
        if match is None:
            shapes[name] = shape
        elif int(match[2]) in places:
            shapes[f"{match[1]}{places[int(match[2])]}{name[match.end() :]}"] = shape
    depth = len(model.layers_by_block())
    config: dict[str, Any] = {}
    for key, value in model.config.items():
        of_layers = isinstance(value, list) and len(value) == depth and "layer" in key
        config[key] = [value[index] for index in kept] if of_layers else value
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            config[key] = len(kept)
    left = Foreseen(model, config, shapes)
    left.whole = model
    return left


def foresee_model(
    method: ModelMethod,
    model: Checkpoint,
    find: Find,
    calling: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
) -> Checkpoint:
    """Return what the method will make of `model`. Raises what the method raises, and `SpecError` if no block is left.

    find: called with the configuration of the result for the shapes, if the method has a say in them.
    calling: open while a function of the method's, of that name, is at work.
    """
    depth = len(model.layers_by_block())
    with calling("blocks_removed"):
        removed = method.blocks_removed()
        if type(removed) is not int or removed < 0:
            raise TypeError(f"it returned {removed!r}, not a number of blocks")
    if 0 < depth <= removed:  # what has no known blocks is told of when the step looks for them
        what = f"{method.stage} {method.name} would remove {removed} decoder layers of a model that has {depth}"
        raise SpecError(f"{what} at this point", remedy=f"remove at most {depth - 1}")
    with calling("config_after"):
        config = dict(method.config_after(model.config))
    if config != model.config or type(method).check_model is not ModelMethod.check_model:
        with calling("check_model"):
            shapes = find(config)
        model = Foreseen(model, config, shapes) if config != model.config else model
    return with_blocks(model, _largest(model, removed)) if removed and depth else model


def check_foreseen(foreseen: Checkpoint, made: Checkpoint, blocks: Sequence[int] | None) -> None:
    """Raise `StepError` unless the layers that a step has made are those that planning has reckoned with.

    blocks: the decoder blocks that are left, if some were removed; planning did not know which.
    """
    actual = _stored_layers(made)
    wanted = len(foreseen.layers_by_block())
    found = len({match[0] for match in map(_BLOCK.match, actual) if match})
    if wanted != found:
        raise StepError(
            f"{found} decoder blocks are left, though the method's `blocks_removed` means {wanted}",
            where=str(made.path),
        )
    if blocks is not None and isinstance(foreseen, Foreseen) and foreseen.whole is not None:
        foreseen = with_blocks(foreseen.whole, blocks)
    planned = {layer.name: layer for layer in foreseen.block_layers()}
    for name in sorted(planned.keys() | actual.keys()):
        if planned.get(name) != actual.get(name):
            raise StepError(
                f"{name} is {actual.get(name)}, though the method's `config_after` means {planned.get(name)}",
                where=str(made.path),
            )


def _stored_layers(model: Checkpoint) -> dict[str, LayerShape]:
    """The linear layers in the blocks of a model, plain or packed, by name."""
    from orchestrator.reader import TensorReader

    layers = {layer.name: layer for layer in model.block_layers()}
    if model.is_quantized:
        with TensorReader(model) as read:
            for name, scheme in model.schemes().items():
                num_out, num_in = unpack(read, name, scheme).q_OI.shape
                layers[name] = LayerShape(name, num_out, num_in)
    return layers


class Foresight:
    """Answers questions of what a step will make; `home` keeps the answers.

    may_run_code: whether code of the model may run for an answer. If not, such a model is foreseen as it was, but for
    the blocks that are removed, and what the method would refuse is found when the steps are run.
    """

    def __init__(self, home: Path, *, may_run_code: bool = False) -> None:
        self._may_run_code = may_run_code
        self._path = home / _FILE
        self._answers: dict[str, Any] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._answers = dict(json.loads(self._path.read_text(encoding="utf-8")))

    def after(self, draft: Draft, model: Checkpoint, note: Note) -> Checkpoint:
        """Return what the step will make of `model`; `model` itself if that cannot be (and was noted)."""
        method = draft.method
        if not isinstance(method, ModelMethod):
            return model
        try:
            return foresee_model(
                method,
                model,
                lambda config: self._shapes(draft, method, model, config),
                lambda name: plugin_fault(draft.installed, name),
            )
        except PluginFaultError as error:
            note(error, draft.place)
        except SpecError as error:
            note(error, (*draft.location, "with"))
        except OrchestratorError as error:  # what the step itself would refuse
            note(PreflightError(error.problems), draft.place)
        return model

    def save(self) -> None:
        """Keep the answers. A home that cannot be written only costs the next plan time."""
        if self._changed and self._path.parent.is_dir():
            kept = dict(list(self._answers.items())[-_KEPT:])
            with contextlib.suppress(OSError):
                write_atomically(self._path, canonical_json(kept))

    def _shapes(self, draft: Draft, method: ModelMethod, model: Checkpoint, config: Mapping[str, Any]) -> Shapes:
        if model.code and not self._may_run_code:
            return shapes_of(model)
        question = {
            "folder": str(model.path),
            "dtype": model.dtype,
            **recorded_code(model.code),
            "before": dict(model.config),
            "after": dict(config),
            "shapes": shapes_of(model),
            "stage": method.stage.value,
            "method": method.name,
            "parameters": method.model_dump(mode="json"),
        }
        sources = [package_digest("orchestrator", ()), draft.installed.source_digest, library_versions()]
        key = digest_of([{**question, "folder": None}, *sources])
        if key not in self._answers:
            found = ask(method, model, config) if has_torch() else _ask_apart(question)
            self._answers[key] = {name: list(shape) for name, shape in found.items()}
            self._changed = True
        return {name: tuple(shape) for name, shape in self._answers[key].items()}


def ask(method: ModelMethod, model: Checkpoint, config: Mapping[str, Any]) -> Shapes:
    """Let the method look at the modules of `model`; return the shapes of the tensors that `config` means.

    Raises what the method raises, and `PreflightError` for modules that cannot be built. Imports torch.
    """
    from orchestrator.skeleton import build_empty, stored_shapes

    method.check_model(build_empty(model, model.config))
    if config == model.config:
        return shapes_of(model)
    return stored_shapes(model, build_empty(model, config))


def _ask_apart(question: Mapping[str, Any]) -> Shapes:
    command = [sys.executable, "-m", "orchestrator.foreseen"]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode == 0:
            return {name: tuple(shape) for name, shape in answer.items()}
        problems = [Problem(**entry) for entry in answer["problems"]]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise PreflightError(
            f"what {question['stage']} {question['method']} makes of the model could not be found out: {last}",
            remedy="report it: this is a fault of ours",
        ) from None
    raise {"fault": PluginFaultError, "spec": SpecError}.get(answer["kind"], PreflightError)(problems)


def _largest(model: Checkpoint, removed: int) -> list[int]:
    """The numbers of the blocks that are left if the smallest go: which go is only known when they are gone."""
    sizes: dict[int, int] = {}
    for name, info in model.tensors.items():
        match = _BLOCK.match(name)
        if match:
            sizes[int(match[2])] = sizes.get(int(match[2]), 0) + math.prod(info.shape)
    gone = sorted(sizes, key=lambda index: (sizes[index], -index))[:removed]
    return sorted(sizes.keys() - set(gone))


def main() -> int:
    """The process that `plan` asks."""
    question = json.load(sys.stdin)
    try:
        installed = discover().find(question["stage"], question["method"])
        method = installed.cls.model_validate(question["parameters"])
        assert isinstance(method, ModelMethod)
        code = ModelCode(question[KEY], may_run=True) if KEY in question else None
        source = Checkpoint(Path(question["folder"]), dtype=question["dtype"], code=code)
        model = Foreseen(source, question["before"], question["shapes"])
        with plugin_fault(installed, "check_model"):
            found = ask(method, model, question["after"])
    except OrchestratorError as error:
        kind = "fault" if isinstance(error, PluginFaultError) else "spec" if isinstance(error, SpecError) else "model"
        answer = {"kind": kind, "problems": [vars(problem) for problem in error.problems]}
        sys.stdout.write(f"\n{json.dumps(answer)}")
        return error.exit_code
    sys.stdout.write(f"\n{json.dumps(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
