"""A model with an attention sink, made from one without, by changing weights alone.

Large models put most of their attention on the first token when there is nothing to attend to; that this *sink* stays
in the cache is what StreamingLLM is about (arXiv:2309.17453). Models of a few million parameters that were trained
briefly have none: the first token draws less than an even share, and a plain window loses nothing by dropping it. So
the sink is built in here: the start token gets an embedding far along the direction u that the hidden states use least;

* the keys read u into the slowest pair of rotary channels, the queries have a constant there (a bias): the logit of the
  start token is one number for each head, wherever it stands in the window;
* the values do not read u: what the sink draws is attention to nothing, as in large models;
* the output of every head is scaled up by what the sink takes on average, so that the rest is heard as before.

The logits are set, layer by layer, so that the sink takes `share` of each head's attention. What the model says inside
its window is then somewhat worse (the query's bias meets other keys, too); what it says without the sink is nonsense.

Shape legend: H = heads, T = tokens, D = width of a head.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

SHARE = 0.7  # of the attention: large models give more than half; the more, the less is said inside the window
LENGTH = 200.0  # of the start token's embedding: no layer turns it away from u
KEY = 1.0  # what the start token's key has in the slow channel, times the root of D


def add_sink(source: Path, target: Path, tokens_T: torch.Tensor, share: float = SHARE) -> None:
    """Write a Llama like `source` whose start token takes `share` of the attention of every head.

    tokens_T: text, a trained window long, on which shares are measured.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    changed = {"attention_bias": True, "tie_word_embeddings": False, "dtype": "float32"}
    config = LlamaConfig.from_dict({**plain.config.to_dict(), **changed})
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.lm_head.weight.data.copy_(plain.get_input_embeddings().weight.data)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        direction = _unused_direction(plain, tokens_T)
        model.get_input_embeddings().weight[config.bos_token_id] = LENGTH * direction
        for layer in model.model.layers:
            _read_sink(layer, direction, config.head_dim)
        start_T = torch.tensor([config.bos_token_id])
        stream_T = torch.cat([start_T, tokens_T[:-1]])
        for index in range(config.num_hidden_layers):
            _set_share(model, index, stream_T, share)
    model.save_pretrained(target)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, target / path.name)


def _unused_direction(model: Any, tokens_T: torch.Tensor) -> torch.Tensor:
    """The unit vector along which normalized hidden states vary least, over all layers."""
    states = model(tokens_T[None], output_hidden_states=True).hidden_states[:-1]
    normalized = torch.cat([state[0] / state[0].pow(2).mean(-1, keepdim=True).sqrt() for state in states])
    return torch.linalg.eigh(normalized.T @ normalized).eigenvectors[:, 0]


def _read_sink(layer: Any, direction: torch.Tensor, head_dim: int) -> None:
    """Let the values ignore the direction, and the keys have it in the slowest rotary channel alone."""
    attention = layer.self_attn
    normalized = direction * layer.input_layernorm.weight * len(direction) ** 0.5
    size, unit = normalized.norm(), normalized / normalized.norm()
    for projection in (attention.v_proj, attention.k_proj):
        projection.weight -= torch.outer(projection.weight @ unit, unit)
    slow = head_dim // 2 - 1
    attention.k_proj.weight[slow::head_dim] += KEY * head_dim**0.5 * unit / size


def _set_share(model: Any, index: int, tokens_T: torch.Tensor, share: float) -> None:
    """Set the queries' constant in one layer, then scale what its heads put out."""
    attention, config = model.model.layers[index].self_attn, model.config
    late = len(tokens_T) // 2

    def drawn() -> torch.Tensor:
        weights_HTT = model(tokens_T[None], output_attentions=True).attentions[index][0]
        return weights_HTT[:, late:, 0].double().clamp(1e-9, 1 - 1e-9)

    logit_H = drawn().logit().mean(1)
    wanted = torch.tensor(share, dtype=torch.float64).logit()
    slow = config.head_dim // 2 - 1
    attention.q_proj.bias[slow :: config.head_dim] += ((wanted - logit_H) / KEY).float()
    left_H = (1 - drawn()).mean(1).float()
    attention.o_proj.weight /= left_H.repeat_interleave(config.head_dim)
