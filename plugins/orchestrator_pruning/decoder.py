"""The decoder layers of a model: running it without some of them, and taking them out for good.

No architecture is listed. The layers are the one list of as many modules as config.json says. A model runs without a
layer by its own forward pass, in which that layer hands its input on. After removal, config.json must describe what is
left, so that stock Transformers builds it: lists with an entry for each layer, and numbers of layers, are edited; then
the model is built from that configuration on the meta device, and its layers are compared with those that are left,
name by name, shape by shape and setting by setting (window, attention type, scale). What cannot be said is refused.

Shape legend: B = windows of a batch, T = tokens of a window, D = model width, V = vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError, decoder_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn

See = Callable[[int, "torch.Tensor", "torch.Tensor"], None]
# Settings of modules that say which layer they are in, by which they find their part of the KV cache.
_NUMBERS = ("layer_idx", "layer_id", "layer_index")
# Entries of config.json: all layers before the one of this number are of another kind than those after it.
_BORDERS = ("max_window_layers", "first_k_dense_replace")
_REMEDY = "prune weights instead, or use a model whose layers are alike"


class DecoderLayers:
    """The decoder layers of a causal language model of Transformers.

    Raises `PreflightError` if they cannot be found.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        names = decoder_blocks(model, model.config.num_hidden_layers)
        self._name = names[0].rpartition(".")[0]
        self._modules: list[nn.Module] = [model.get_submodule(name) for name in names]
        self._in_tuples = False  # whether layers put out a tuple that begins with the hidden states

    def __len__(self) -> int:
        return len(self._modules)

    def run(self, tokens_BT: torch.Tensor, removed: Collection[int], see: See | None = None) -> torch.Tensor:
        """Return the logits [B, T, V] of the model without the layers `removed`.

        see: called for each other layer, with its number and the hidden states [B, T, D] that enter and leave it.
        """
        watched = [] if see is None else [index for index in range(len(self)) if index not in removed]

        def watch(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
                self._in_tuples = isinstance(output, tuple)
                leaving_BTD = output[0] if self._in_tuples else output
                assert see is not None
                see(index, _hidden(module, inputs, named), leaving_BTD)

            return hook

        hooks = [self._modules[i].register_forward_hook(watch(i), with_kwargs=True) for i in watched]
        try:
            return self._logits(tokens_BT, {index: self._hand_on(index) for index in removed})
        finally:
            for handle in hooks:
                handle.remove()

    def run_and_keep(
        self, tokens_BT: torch.Tensor, removed: Collection[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return the same logits, and by number the hidden states that enter each layer left."""
        entering: dict[int, torch.Tensor] = {}

        def keep(index: int, entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor) -> None:
            entering[index] = entering_BTD

        return self.run(tokens_BT, removed, keep), entering

    def run_behind(
        self, tokens_BT: torch.Tensor, removed: Collection[int], index: int, entering_BTD: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits without `removed` and layer `index`, from what enters it: layers before it do not run."""
        replaced = {i: self._hand_on(i) for i in range(len(self)) if i < index or i in removed}
        return self._logits(tokens_BT, {**replaced, index: lambda *inputs, **named: self._as_output(entering_BTD)})

    def check_movable(self, count: int) -> None:
        """Raise `StepError` if config.json cannot say that the first `count` layers are gone: layers have their places.

        Asked before the search, which takes long; `keep` asks again, for the layers that really go.
        """
        self._described(range(count, len(self)))

    def keep(self, kept: Sequence[int]) -> None:
        """Take out all layers but `kept`, in this order; the configuration then describes the model.

        Raises `StepError` if it cannot; nothing is changed then.
        """
        from torch import nn

        stock = list(self._described(kept).get_submodule(self._name))
        for old, new in zip(kept, stock, strict=True):
            for module, told in zip(self._modules[old].modules(), new.modules(), strict=True):
                for setting in _NUMBERS:
                    if setting in vars(told):
                        setattr(module, setting, getattr(told, setting))
        # Most models share one configuration with all their parts; those that copy it read their own.
        configs = {id(module.config): module.config for module in self._model.modules() if hasattr(module, "config")}
        for config in configs.values():
            if getattr(config, "num_hidden_layers", None) == len(self):
                _edit(config, kept, len(self))
        self._modules = [self._modules[index] for index in kept]
        self._model.set_submodule(self._name, nn.ModuleList(self._modules))

    def _described(self, kept: Sequence[int]) -> Any:
        """Return the model, without weights, that Transformers builds for `kept` from config.json alone."""
        import torch

        config = copy.deepcopy(self._model.config)
        _edit(config, kept, len(self))
        try:
            written = json.loads(json.dumps(config.to_dict(), default=str))
            read = type(config).from_dict(copy.deepcopy(written))
            again = json.loads(json.dumps(read.to_dict(), default=str))
            read._attn_implementation = config._attn_implementation
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                stock: Any = type(self._model)(read)
        except Exception as error:  # configurations check themselves, each in its own way
            raise self._refusal(f"Transformers does not take it: {' '.join(str(error).split())[:200]}") from error
        for key in sorted(written):
            if written[key] != again.get(key) and not key.startswith("_") and key != "dtype":
                raise self._refusal(f"{key} would be {again.get(key)}, not {written[key]}")
        shapes = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
        wanted = self._names_after(kept)
        for name in sorted(shapes.keys() | wanted.keys()):
            if shapes.get(name) != wanted.get(name):
                raise self._refusal(f"{name} would have shape {shapes.get(name)}, not {wanted.get(name)}")
        for place, (old, new) in enumerate(zip(kept, stock.get_submodule(self._name), strict=True)):
            difference = _difference(self._modules[old], new)
            if difference:
                raise self._refusal(f"layer {old}, then layer {place}, would have another {difference}")
        return stock

    def _names_after(self, kept: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes by name, as they are when only `kept` are left."""
        places = {f"{self._name}.{old}": f"{self._name}.{place}" for place, old in enumerate(kept)}
        shapes = {}
        for name, tensor in self._model.state_dict().items():
            if name.startswith(f"{self._name}."):
                number, _, inner = name.removeprefix(f"{self._name}.").partition(".")
                if f"{self._name}.{number}" not in places:
                    continue
                name = f"{places[f'{self._name}.{number}']}.{inner}"
            shapes[name] = tuple(tensor.shape)
        return shapes

    def _refusal(self, what: str) -> StepError:
        kind = self._model.config.model_type
        return StepError(f"config.json cannot describe a {kind!r} model without these layers: {what}", remedy=_REMEDY)

    def _logits(self, tokens_BT: torch.Tensor, forwards: Mapping[int, Callable[..., Any]]) -> torch.Tensor:
        """Run the model with other forward passes for some layers."""
        for index, forward in forwards.items():
            self._modules[index].forward = forward  # of this object: it hides that of its class
        try:
            logits_BTV: torch.Tensor = self._model(input_ids=tokens_BT, use_cache=False).logits
        finally:
            for index in forwards:
                del self._modules[index].forward
        return logits_BTV

    def _hand_on(self, index: int) -> Callable[..., Any]:
        module = self._modules[index]
        name = _first_parameter(module)
        return lambda *inputs, **named: self._as_output(inputs[0] if inputs else named[name])

    def _as_output(self, hidden_BTD: torch.Tensor) -> Any:
        return (hidden_BTD,) if self._in_tuples else hidden_BTD


def _first_parameter(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


def _hidden(module: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> torch.Tensor:
    hidden_BTD: torch.Tensor = inputs[0] if inputs else named[_first_parameter(module)]
    return hidden_BTD


def _edit(config: Any, kept: Sequence[int], depth: int) -> None:
    """Make `config`, of a model with `depth` layers, describe one that has only `kept`."""
    place = {old: new for new, old in enumerate(kept)}
    for key in _BORDERS:
        border = getattr(config, key, None)
        if isinstance(border, int):  # it may lie behind the last layer, and does so still
            setattr(config, key, border - sum(old not in place for old in range(min(border, depth))))
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None)
    if isinstance(step, int) and step > 1 and dense is not None:  # every so manyth has experts: say which have none
        config.mlp_only_layers = [old for old in range(depth) if old in dense or (old + 1) % step]
        config.decoder_sparse_step = 1
    for key in list(vars(config)):
        entries = getattr(config, key, None)
        if key.startswith("_") or not isinstance(entries, list) or not ("layer" in key or "block" in key):
            continue
        numbers = all(type(entry) is int and 0 <= entry < depth for entry in entries)
        if numbers and (len(entries) != depth or entries == list(range(depth))):  # which layers are of some kind
            setattr(config, key, [place[old] for old in entries if old in place])
        elif len(entries) == depth:  # of which kind each layer is
            setattr(config, key, [entries[old] for old in kept])
    config.num_hidden_layers = len(kept)


def _difference(one: nn.Module, other: nn.Module) -> str | None:
    """Name the first setting in which two layers differ beside their numbers; shapes are compared by the caller."""
    left, right = dict(one.named_modules()), dict(other.named_modules())
    if left.keys() != right.keys():
        return f"module {min(left.keys() ^ right.keys())}"
    for name, module in left.items():
        settings, others = _settings(module), _settings(right[name])
        if type(module) is not type(right[name]):
            return f"type of {name or 'module'}"
        for key in sorted(settings.keys() | others.keys()):
            if settings.get(key) != others.get(key):
                return f"{key} of {name or 'the module itself'} ({settings.get(key)}, not {others.get(key)})"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module was told when it was built, as far as it is plain."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and not key.startswith("_")
        and key not in (*_NUMBERS, "training")
    }
