"""GPTQ and Wanda the way their authors' programs do it, written from the papers in plain torch.

GPTQ: Frantar et al. 2022, arXiv:2210.17323, algorithm 1. Wanda: Sun et al. 2023, arXiv:2306.11695, eq. 1 and
algorithm 1. The whole model is in memory, and so are all inputs of a block and all its outputs; sequences go through
one at a time; every layer sums its own H, also where layers read the same input. Runs in this project's environment
and imports nothing of it but the list of cases.

Shape legend: N = sequences, T = tokens, D = model width, O = out features, I = in features, B = columns of a block.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import BLOCK_SIZE, DAMPING, GROUP_SIZE, Case
from benchmarks.peers.job import Job, execute


class HessianSum:
    """H = 2/n X^T X of one layer, n counting sequences, as a mean that is rescaled with every sequence."""

    def __init__(self, layer: nn.Linear) -> None:
        self.hessian_II = torch.zeros(layer.in_features, layer.in_features)
        self.num_sequences = 0

    def add_batch(self, inputs: torch.Tensor) -> None:
        """Add one batch of inputs [N, T, I]."""
        added = inputs.shape[0]
        x_IT = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian_II *= self.num_sequences / (self.num_sequences + added)
        self.num_sequences += added
        x_IT = math.sqrt(2 / self.num_sequences) * x_IT.float()
        self.hessian_II += x_IT.matmul(x_IT.t())


class NormSum:
    """Squared norm of each input feature of one layer, divided by the sequences, rescaled with every sequence."""

    def __init__(self, layer: nn.Linear) -> None:
        self.squares_I = torch.zeros(layer.in_features)
        self.num_sequences = 0

    def add_batch(self, inputs: torch.Tensor) -> None:
        """Add one batch of inputs [N, T, I]."""
        added = inputs.shape[0]
        x_IT = inputs.reshape(-1, inputs.shape[-1]).t().float()
        self.squares_I *= self.num_sequences / (self.num_sequences + added)
        self.num_sequences += added
        self.squares_I += torch.norm(x_IT, p=2, dim=1) ** 2 / self.num_sequences


def fit_grid(group_OI: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, float]:
    """Return the step [O, 1] of a symmetric grid over the extremes of each row, and its middle integer."""
    extreme_O = group_OI.abs().amax(dim=1)
    extreme_O[extreme_O == 0] = 1
    levels = 2**num_bits - 1
    return (2 * extreme_O / levels)[:, None], (levels + 1) / 2


def fasterquant(layer: nn.Linear, hessian_II: torch.Tensor, num_bits: int) -> None:
    """Replace the layer's weight by its quantization, column by column with compensation."""
    weight_OI = layer.weight.data.clone().float()
    quantized_OI = torch.zeros_like(weight_OI)
    dead_I = torch.diag(hessian_II) == 0
    hessian_II[dead_I, dead_I] = 1
    weight_OI[:, dead_I] = 0
    diagonal = torch.arange(hessian_II.shape[0])
    hessian_II[diagonal, diagonal] += DAMPING * torch.mean(torch.diag(hessian_II))
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    columns = weight_OI.shape[1]
    for first in range(0, columns, BLOCK_SIZE):
        last = min(first + BLOCK_SIZE, columns)
        block_OB = weight_OI[:, first:last].clone()
        errors_OB = torch.zeros_like(block_OB)
        upper_BB = upper_II[first:last, first:last]
        for i in range(last - first):
            if (first + i) % GROUP_SIZE == 0:
                # Of the weights as they are at the start of the block, as the authors fit it.
                step, middle = fit_grid(weight_OI[:, first + i : first + i + GROUP_SIZE], num_bits)
            column_O = block_OB[:, i]
            integer = torch.clamp(torch.round(column_O[:, None] / step) + middle, 0, 2**num_bits - 1)
            quantized_O = (step * (integer - middle)).flatten()
            quantized_OI[:, first + i] = quantized_O
            error_O = (column_O - quantized_O) / upper_BB[i, i]
            block_OB[:, i:] -= error_O[:, None].matmul(upper_BB[i, i:][None])
            errors_OB[:, i] = error_O
        weight_OI[:, last:] -= errors_OB.matmul(upper_II[first:last, last:])
    layer.weight.data = quantized_OI.to(layer.weight.dtype)


def prune(layer: nn.Linear, squares_I: torch.Tensor, pattern: tuple[int, int] | None) -> None:
    """Set half of the layer's weights to zero: those with the smallest |W_ij| ||X_j||, within a row or runs of m."""
    score_OI = layer.weight.data.abs().float() * torch.sqrt(squares_I[None])
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    if pattern is None:
        order_OI = torch.sort(score_OI, dim=-1, stable=True)[1]
        mask_OI.scatter_(1, order_OI[:, : score_OI.shape[1] // 2], True)
    else:
        n, m = pattern
        for i in range(score_OI.shape[1]):
            if i % m == 0:
                smallest_On = torch.topk(score_OI[:, i : i + m], m - n, dim=1, largest=False)[1]
                mask_OI.scatter_(1, i + smallest_On, True)
    layer.weight.data[mask_OI] = 0


class CaughtError(Exception):
    """The first block was reached; nothing beyond it need be run."""


def first_inputs(model: nn.Module, tokens_NT: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Return what the first block gets [N, T, D], and its other arguments, which are the same for every sequence."""
    count, length = tokens_NT.shape
    inputs_NTD = torch.zeros(count, length, model.config.hidden_size, dtype=model.dtype)
    arguments: dict = {}
    done = 0

    def catch(module, args, kwargs):
        nonlocal done
        inputs_NTD[done] = args[0][0]
        arguments.update(kwargs)
        done += 1
        raise CaughtError

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in tokens_NT:
        with contextlib.suppress(CaughtError):
            model(row[None])
    hook.remove()
    return inputs_NTD, arguments


def run_block(block: nn.Module, inputs_NTD: torch.Tensor, outputs_NTD: torch.Tensor, arguments: dict) -> None:
    """Run all sequences, one at a time."""
    for i in range(len(inputs_NTD)):
        outputs_NTD[i] = block(inputs_NTD[i][None], **arguments)[0]


def compress_block(block: nn.Module, case: Case, inputs_NTD, outputs_NTD, arguments: dict) -> None:
    """Measure every layer of the block on the inputs given, compress each, and compute the compressed outputs."""
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    sums = [HessianSum(layer) if case.method == "gptq" else NormSum(layer) for layer in layers]
    hooks = [
        layer.register_forward_hook(lambda module, args, output, s=s: s.add_batch(args[0]))
        for layer, s in zip(layers, sums, strict=True)
    ]
    run_block(block, inputs_NTD, outputs_NTD, arguments)
    for hook in hooks:
        hook.remove()
    for layer, s in zip(layers, sums, strict=True):
        if isinstance(s, HessianSum):
            fasterquant(layer, s.hessian_II, case.num_bits)
        else:
            prune(layer, s.squares_I, case.pattern)
    run_block(block, inputs_NTD, outputs_NTD, arguments)


def load(job: Job):
    """Return the whole model."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32 if job.dtype == "float32" else "auto")
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def compress(job: Job, model) -> None:
    """Go through the blocks; what comes out of a compressed one goes into the next. Save plain weights."""
    inputs_NTD, arguments = first_inputs(model, job.tokens_NT())
    outputs_NTD = torch.zeros_like(inputs_NTD)
    for block in model.model.layers:
        compress_block(block, job.case, inputs_NTD, outputs_NTD, arguments)
        inputs_NTD, outputs_NTD = outputs_NTD, inputs_NTD
    model.save_pretrained(job.out)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)


if __name__ == "__main__":
    execute(load, compress)
