"""Whether the walk's blocks compute what stock Transformers computes: asked before any compute is spent on a model of
an architecture that no test covers.

The same random tokens go through the blocks of `Skeleton`, one after the other, and through the model as
``from_pretrained`` loads it; what each block puts out must be the same. A model that is too large to be loaded whole
is compared up to the depth at which every kind of block has occurred, with stock Transformers told that the model
ends there.

Shape legend: B = sequences, T = tokens of a sequence, D = model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError
from orchestrator.model import load_config, load_model

if TYPE_CHECKING:
    import torch

    from orchestrator.skeleton import Block, Skeleton

WHOLE_BYTES = 2_000_000_000  # stored weights up to this size are compared whole
_SEQUENCES, _LENGTH = 2, 24
# Relative to the largest number of a block's output. Kernels that sum in another order differ by some 1e-6; a missing
# scale, mask or position by more than 1e-2.
_TOLERANCE = 1e-3


def prove(checkpoint: Checkpoint, *, whole_bytes: int = WHOLE_BYTES) -> int:
    """Compare block by block with stock Transformers, and return the number of blocks that were compared.

    Raises `PreflightError`, naming the architecture, if the model cannot be run block by block or a block differs.
    """
    import torch

    from orchestrator.skeleton import Skeleton

    # In the stored dtype, so that both sides hold the same numbers.
    checkpoint = Checkpoint(checkpoint.path, code=checkpoint.code)
    skeleton = Skeleton(checkpoint)
    depth = len(skeleton.blocks) if checkpoint.weight_bytes() <= whole_bytes else _depth_of_all_kinds(skeleton)
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            vocabulary = skeleton.model.get_input_embeddings().num_embeddings
            tokens_BT = torch.randint(0, vocabulary, (_SEQUENCES, _LENGTH), generator=generator)
            expected = _stock_outputs(checkpoint, [b.name for b in skeleton.blocks], depth, tokens_BT)
            found = _skeleton_outputs(skeleton, depth, tokens_BT)
    except PreflightError:
        raise
    except Exception as error:  # modules of an unknown architecture may fail in any way
        raise _refusal(checkpoint, f"its blocks do not run one by one: {type(error).__name__}: {error}") from error
    finally:
        skeleton.close()
    for block, one_BTD, other_BTD in zip(skeleton.blocks, expected, found, strict=False):
        scale = float(one_BTD.abs().max())
        difference = float((one_BTD - other_BTD).abs().max()) if one_BTD.shape == other_BTD.shape else float("nan")
        if not difference <= _TOLERANCE * scale:
            raise _refusal(
                checkpoint, f"run by itself, {block.name} puts out other numbers than in the whole model ({difference})"
            )
    return depth


def _depth_of_all_kinds(skeleton: Skeleton) -> int:
    """The number of leading blocks that have every combination of modules, shapes and attention."""
    types = getattr(skeleton.base.config, "layer_types", None) or [None] * len(skeleton.blocks)

    def kind(block: Block, attention: Any) -> Any:
        modules = tuple(type(module).__name__ for module in block.module.modules())
        return attention, modules, tuple(tuple(p.shape) for p in block.module.parameters())

    kinds = [kind(block, types[number]) for number, block in enumerate(skeleton.blocks)]
    return max(kinds.index(one) for one in kinds) + 1


def _skeleton_outputs(skeleton: Skeleton, depth: int, tokens_BT: torch.Tensor) -> list[torch.Tensor]:
    embedding = skeleton.model.get_input_embeddings()
    (name,) = [name for name, module in skeleton.model.named_modules() if module is embedding]
    skeleton.load(name)
    # As in the walk, the arguments are those of one sequence, and have to do for many.
    _, arguments = skeleton.capture(tokens_BT[:1], embedding)
    hidden_BTD, _ = skeleton.capture(tokens_BT, embedding)
    skeleton.release(name)
    outputs = []
    for block, given in zip(skeleton.blocks[:depth], arguments, strict=False):
        skeleton.load(block.name)
        hidden_BTD = block.run(hidden_BTD, given)
        skeleton.release(block.name)
        outputs.append(hidden_BTD)
    return outputs


def _stock_outputs(checkpoint: Checkpoint, names: list[str], depth: int, tokens_BT: torch.Tensor) -> list[torch.Tensor]:
    import torch

    config = load_config(checkpoint)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    model = load_model(checkpoint, torch.float32, config)
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple | list) else output

    for name, module in model.named_modules():
        # Stored names may leave out the name of the base model.
        for block in names[:depth]:
            if name == block or name == f"{model.base_model_prefix}.{block}":
                module.register_forward_hook(lambda module, inputs, output, n=block: keep(n, output))
    model(tokens_BT, use_cache=False)
    return [found[name] for name in names[:depth]]


def _refusal(checkpoint: Checkpoint, what: str) -> PreflightError:
    from orchestrator.skeleton import REMEDY

    kind = checkpoint.config["model_type"]
    return PreflightError(f"{checkpoint.path} (model_type {kind!r}): {what}", remedy=REMEDY)
