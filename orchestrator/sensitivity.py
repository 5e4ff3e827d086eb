"""How much an error in a layer's output costs at the end of the model: a Fisher information for every linear layer.

If a layer's outputs change by e, the KL divergence of the model's next tokens grows, to second order, by
E[(g . e)^2] / 2, where g is the gradient of log p(y | text) by those outputs for a token y drawn from the model's own
prediction (Martens 2014, arXiv:1412.1193, sec. 9). As in K-FAC (Martens and Grosse 2015, arXiv:1503.05671, sec. 3) the
gradients are taken as unrelated to the layer's inputs, and here also as alike in all outputs: what is kept is the mean
of g^2. With e = D x for the difference D of weights the cost is

    mean(g^2) / 2 * tr(D H D^T) / n        nats per token, with H = X^T X over n tokens

which is what the statistics of a layer's inputs give for any D. Gradients are taken block by block, from the last to
the first; of the model there is one block, or its head, in memory, and hidden states are on disk.

Shape legend: N = sequences, B = sequences of a batch, T = tokens, C = tokens of a chunk, D = model width,
V = vocabulary, O = out features.
"""

from __future__ import annotations

import math
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.capture import Stream
from orchestrator.errors import StepError
from orchestrator.hidden import HiddenStates
from orchestrator.parallel import Workers, exact_matmuls, one_thread
from orchestrator.skeleton import Skeleton

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint import Checkpoint
    from orchestrator.job import Progress
    from orchestrator.skeleton import Block

# Gradients settle with far fewer tokens than H: each gives one number, where H has I^2.
TOKENS = 8192
LOGITS_AT_ONCE = 1 << 24  # 64 MiB in float32


def output_sensitivity(
    checkpoint: Checkpoint,
    tokens_NT: torch.Tensor,
    folder: Path,
    *,
    seed: int,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress = lambda fraction, message: None,
) -> dict[str, float]:
    """Return mean(g^2) / 2 of every linear layer in a decoder block, nats per token and square of the output.

    tokens_NT: as many sequences as have `TOKENS` tokens are used. folder: for hidden states; empty. seed: of the draws.
    The mean is over all tokens: of an expert, those that were not routed to it count as zero.

    Raises `StepError` for gradients that are not finite, and `PreflightError` as `Skeleton` does.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    tokens_NT = tokens_NT[: max(1, -(-TOKENS // tokens_NT.shape[1]))]
    skeleton = Skeleton(checkpoint)
    last = len(skeleton.blocks)
    sums: dict[str, float] = {}
    with one_thread() as threads, exact_matmuls(), torch.no_grad():
        pool = Workers(workers or threads)
        stream = Stream(skeleton, tokens_NT, folder, pool, device)
        try:
            stream.go_to(0)
            tuples: list[bool] = []
            for block in skeleton.blocks:
                skeleton.load(block.name, device)
                see = block.module.register_forward_hook(lambda m, inputs, out: tuples.append(isinstance(out, tuple)))
                stream.forward(block)
                see.remove()
                skeleton.release(block.name)
                progress(0.4 * (block.index + 1) / last, f"sensitivity: {block.name} passed")
            gradients = stream.beside("gradient.f32")
            try:
                _behind_blocks(skeleton, stream, gradients, pool, device, seed, in_tuple=tuples[-1])
                for block in reversed(skeleton.blocks):
                    skeleton.load(block.name, device)
                    sums |= _through_block(block, stream, gradients, pool, device)
                    skeleton.release(block.name)
                    progress(1 - 0.55 * block.index / last, f"sensitivity: {block.name} measured")
            finally:
                gradients.remove()
        finally:
            pool.close()
            stream.close()
            skeleton.close()
    for name, total in sums.items():
        if not math.isfinite(total):
            raise StepError(f"the gradients by the outputs of {name} are not finite", remedy="check the model")
    outputs = {layer.name: layer.out_features for layer in checkpoint.block_layers()}
    return {name: total / (2 * tokens_NT.numel() * outputs[name]) for name, total in sums.items()}


def _behind_blocks(
    skeleton: Skeleton,
    stream: Stream,
    gradients: HiddenStates,
    pool: Workers,
    device: str,
    seed: int,
    *,
    in_tuple: bool,
) -> None:
    """Write the gradients of log p(y | text) by what the last block puts out, for tokens y that are drawn."""
    import torch
    from torch.nn.functional import cross_entropy

    hidden = stream.entering(len(skeleton.blocks))
    chunk = max(1, LOGITS_AT_ONCE // skeleton.vocabulary)
    with skeleton.head(device, in_tuple=in_tuple) as head:

        def run(index: int) -> None:
            draw = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            hidden_BTD = hidden.read(index).to(device)
            flat_TD = hidden_BTD.flatten(0, 1)
            gradient_TD = torch.empty_like(flat_TD)
            for part in torch.split(torch.arange(len(flat_TD)), chunk):
                with torch.enable_grad():
                    hidden_CD = flat_TD[part].requires_grad_()
                    logits_CV = head(hidden_CD[:, None])[:, 0].float()  # no sequence is longer than the model takes
                    drawn_C = torch.multinomial(logits_CV.detach().softmax(-1), 1, generator=draw)[:, 0]
                    loss = cross_entropy(logits_CV, drawn_C, reduction="sum")
                    (gradient_TD[part],) = torch.autograd.grad(loss, hidden_CD)
            gradients.write(index, gradient_TD.view_as(hidden_BTD))

        pool.run([partial(run, index) for index in range(hidden.num_batches)])


def _through_block(
    block: Block, stream: Stream, gradients: HiddenStates, pool: Workers, device: str
) -> dict[str, float]:
    """Return the sum of g^2 over tokens and outputs of each layer; gradients become those by what enters the block."""
    import torch

    hidden = stream.entering(block.index)
    found: list[dict[str, float]] = [dict.fromkeys(block.linears, 0.0) for _ in range(hidden.num_batches)]
    current = threading.local()  # which batch a thread is at; hooks are the module's, not the thread's

    def watch(name: str, output: torch.Tensor) -> None:
        of_batch = found[current.batch]

        def add(gradient: torch.Tensor) -> None:
            of_batch[name] += float(gradient.square().sum(dtype=torch.float64))

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def run(index: int) -> None:
        current.batch = index
        with torch.enable_grad():
            entering_BTD = hidden.read(index).to(device).requires_grad_()
            leaving_BTD = stream.output(block, entering_BTD)
            (gradient_BTD,) = torch.autograd.grad(leaving_BTD, entering_BTD, gradients.read(index).to(device))
        gradients.write(index, gradient_BTD)

    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, n=name: watch(n, output))
        for name, layer in block.linears.items()
    ]
    try:
        pool.run([partial(run, index) for index in range(hidden.num_batches)])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sum(of_batch[name] for of_batch in found) for name in block.linears}
