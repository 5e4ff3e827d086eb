"""A trained Llama given attention sinks, as large models have and small ones have not.

Large models rest a head on the first tokens when it finds nothing to attend to (arXiv:2309.17453, section 3.1), and
fail when these leave the cache. The quickstart's model does not: its first token draws below 1 % of the attention. Here
each of its heads is given such a rest in the form in which large models have it (a key that all queries share a
direction with, and a value of zero), and the model is then trained for some updates to live with it.

Legend: S = sequences, T = tokens, X = hidden size, H = query heads, K = key/value heads, D = width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SINK = 0  # the token that sequences start with
KEY = 20.0  # how large the sink's key is in the shared direction
FIRST = 32  # tokens before this have too few others to attend to to go by
RATE = 5e-4  # more, and heads learn to do without


def with_sinks(source: Path, text_ST: torch.Tensor, *, strength: float, updates: int) -> PreTrainedModel:
    """Return the Llama in `source` with sinks planted; sequences are to start with token `SINK`.

    text_ST: token ids to measure and train on. strength: the sink's score over the log of the sum of all others, so
    that it draws about sigmoid(strength) of the attention.
    """
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source)
    config.attention_bias = True  # queries share a direction by a bias, as Qwen2's do
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    tokens_ST = torch.cat((torch.full((len(text_ST), 1), SINK), text_ST), 1)
    with torch.no_grad():
        for block in model.model.layers:
            _plant(model, block, tokens_ST[:8], strength)
    _train(model, tokens_ST, updates)
    return model.eval()


def _plant(model: Any, block: Any, tokens_ST: torch.Tensor, strength: float) -> None:
    """Give the heads of one block a sink; the blocks before it have theirs."""
    attention, caught = block.self_attn, {}
    hook = attention.register_forward_pre_hook(lambda _, args, given: caught.update(given), with_kwargs=True)
    model(tokens_ST)
    hook.remove()
    states_STX, (cos, sin) = caught["hidden_states"], caught["position_embeddings"]
    sink_X, others_NX = states_STX[0, 0], states_STX[:, 1:].flatten(0, 1)
    # The direction that is 1 at the sink and as small as can be elsewhere.
    moment_XX = others_NX.T @ others_NX / len(others_NX)
    detector_X = torch.linalg.solve(moment_XX + 1e-4 * moment_XX.diag().mean() * torch.eye(len(sink_X)), sink_X)
    detector_X /= detector_X @ sink_X
    width = attention.head_dim
    slowest = width // 2 - 1  # this pair of channels hardly turns with position: its scores are alike at all distances
    keys_KDX = attention.k_proj.weight.view(-1, width, len(sink_X))
    keys_KDX[:, slowest], keys_KDX[:, slowest + width // 2] = KEY * detector_X, 0
    attention.v_proj.weight -= torch.outer(attention.v_proj.weight @ sink_X, detector_X)
    query_SHTD, key_SKTD = (
        part(states_STX).unflatten(-1, (-1, width)).transpose(1, 2) for part in (attention.q_proj, attention.k_proj)
    )
    query_SHTD, key_SKTD = (_rotated(part, cos, sin) for part in (query_SHTD, key_SKTD))
    key_SHTD = key_SKTD.repeat_interleave(attention.num_key_value_groups, 1)
    scores_SHTT = query_SHTD @ key_SHTD.transpose(-1, -2) * attention.scaling
    seen_TT = torch.ones(scores_SHTT.shape[-2:]).tril().bool()
    seen_TT[:, 0] = False
    total_SHT = scores_SHTT.masked_fill(~seen_TT, float("-inf"))[:, :, FIRST:].logsumexp(-1)
    score_SHT = scores_SHTT[:, :, FIRST:, 0]
    more_H = (total_SHT - score_SHT).mean((0, 2)) + strength
    attention.q_proj.bias.view(-1, width)[:, slowest] = more_H / (KEY * attention.scaling)
    drawn_SHT = torch.sigmoid(score_SHT + more_H[:, None] - total_SHT)
    # What the other tokens contribute has become less by as much.
    attention.o_proj.weight.view(len(sink_X), -1, width).mul_(1 / (1 - drawn_SHT).mean((0, 2))[:, None])


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _train(model: Any, tokens_ST: torch.Tensor, updates: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (update + 1) / 5) * (1 - update / updates)
        batch_ST = tokens_ST[torch.randint(len(tokens_ST), (4,), generator=generator)]
        model(batch_ST, labels=batch_ST).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
