"""Cache policies with one bug each, for `orchestrator.testing` to find; right but for what the docstrings say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.api import CachePolicy, Checkpoint, ModelShape, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

_streams = itertools.count(1)


class Contiguous(CachePolicy):
    """No bug: keys and values one after the other, as Transformers itself keeps them."""

    stage: ClassVar[Stage] = Stage.VALIDATE
    name: ClassVar[str] = "contiguous"
    paper: ClassVar[str] = "None."

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        from transformers import DynamicCache

        yield DynamicCache(config=model.config)

    def held_bytes(self, cache: Cache) -> int:
        return sum(int(tensor.nbytes) for layer in cache.layers for tensor in (layer.keys, layer.values))

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        assert shape.dtype == "float32"
        return 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * tokens


class Miscounts(Contiguous):
    """Plans for one token more than are held."""

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        return super().planned_bytes(shape, tokens + 1)


class LeavesEager(Contiguous):
    """Leaves another attention function behind."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        model.set_attn_implementation("eager")
        with super().attached(model, checkpoint) as cache:
            yield cache


class LeavesHook(Contiguous):
    """Leaves a hook behind."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        model.register_forward_hook(lambda module, given, result: None)
        with super().attached(model, checkpoint) as cache:
            yield cache


class TouchesWeights(Contiguous):
    """Changes a weight that no token of most streams meets: the embedding of a token that is not drawn."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        import torch

        with torch.no_grad():
            embeddings: Any = model.get_input_embeddings()
            embeddings.weight[UNDRAWN] += 1
        with super().attached(model, checkpoint) as cache:
            yield cache


UNDRAWN = 7


def _changed(cache: Any, change: Any) -> Any:
    """The cache, with what `update` gives the model changed by `change(states, layer)`."""
    for layer in cache.layers:
        plain = layer.update

        def update(keys: Any, values: Any, *args: Any, plain: Any = plain, layer: Any = layer, **given: Any) -> Any:
            return change(layer, *plain(keys, values, *args, **given))

        layer.update = update
    return cache


class DividesByZero(Contiguous):
    """Gives values that are not finite."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        with super().attached(model, checkpoint) as cache:
            yield _changed(cache, lambda layer, keys, values: (keys, values / 0))


class RemembersStreams(Contiguous):
    """Gives values that depend on how many streams there have been."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        scale = 1 + 1e-6 * next(_streams)
        with super().attached(model, checkpoint) as cache:
            yield _changed(cache, lambda layer, keys, values: (keys, values * scale))


class RoundsByCall(Contiguous):
    """Rounds the values of tokens that come at once to a grid of all of them, until the next call."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        read: dict[Any, int] = {}

        def rounded(layer: Any, keys: Any, values: Any) -> Any:
            new = values[:, :, read.get(layer, 0) :]
            read[layer] = values.shape[2]
            step = new.abs().amax() / 4
            values = values.clone()
            values[:, :, -new.shape[2] :] = (new / step).round() * step
            return keys, values

        with super().attached(model, checkpoint) as cache:
            yield _changed(cache, rounded)


class ForgetsByCall(Contiguous):
    """Once the prompt is read, forgets for all tokens that come at once what is too far from the last of them."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        prompted: set[Any] = set()

        def without_old(layer: Any, keys: Any, values: Any) -> Any:
            if layer not in prompted:
                prompted.add(layer)
                return keys, values
            values = values.clone()
            values[:, :, :-FAR] = 0
            return keys, values

        with super().attached(model, checkpoint) as cache:
            yield _changed(cache, without_old)


FAR = 40


class LooksAhead(Contiguous):
    """Lets the tokens of a prompt see a little of all of it."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        prompted: set[Any] = set()

        def blurred(layer: Any, keys: Any, values: Any) -> Any:
            if layer in prompted:
                return keys, values
            prompted.add(layer)
            return keys, values + values.mean(2, keepdim=True) / 4

        with super().attached(model, checkpoint) as cache:
            yield _changed(cache, blurred)


class RefusesAll(Contiguous):
    """Cannot be attached."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        raise RuntimeError("out of luck")
        yield
