"""The proof of an OpenVINO folder: OpenVINO GenAI serves it from a paged cache and says what Transformers says.

Three comparisons, none of which passes by accident: logits of the stateful model (KL divergence over all tokens), the
tokens of text by the converted tokenizer, and greedy generation with continuous batching. A generated token counts as
right if Transformers, given the same tokens before it, has no token that is better by more than rounding.

Shape legend: N = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError

if TYPE_CHECKING:
    import torch

GENERATED = 24  # tokens
_BLOCKS = 64  # of the paged cache; more than the prompts and what is generated take
# OpenVINO rounds what enters a product with integers to 8 bits unless it is told not to.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def logits_of(folder: Path, tokens_NT: torch.Tensor) -> torch.Tensor:
    """The logits [N, T, V] of the stateful model, in float32, sequence by sequence."""
    import numpy as np
    import torch
    from openvino import Core

    compiled = Core().compile_model(folder / "openvino_model.xml", "CPU", {**_EXACT, **_threads()})
    found = []
    for tokens_T in tokens_NT.numpy().astype(np.int64):
        request = compiled.create_infer_request()
        places_T = np.arange(len(tokens_T))[None]
        given = {
            "input_ids": tokens_T[None],
            "attention_mask": np.ones_like(tokens_T)[None],
            "position_ids": places_T,
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in given.items() if name in _inputs(compiled)})
        found.append(torch.from_numpy(request.get_tensor("logits").data.copy()))
    return torch.cat(found)


def generate(folder: Path, prompts_NT: torch.Tensor) -> list[list[int]]:
    """What OpenVINO GenAI generates greedily for all prompts at once, from a paged cache."""
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = _BLOCKS
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        folder, scheduler, "CPU", {**_EXACT, **_threads(), "KV_CACHE_PRECISION": "f32"}
    )
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = GENERATED, True, False
    handles = [
        pipeline.add_request(number, Tensor(prompt_T[None].astype(np.int64)), settings)
        for number, prompt_T in enumerate(prompts_NT.numpy())
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return [list(handle.read_all()[0].generated_ids) for handle in handles]


def shortfall(model: Any, prompts_NT: torch.Tensor, generated: Sequence[Sequence[int]]) -> float:
    """By how much the log-probability of a generated token falls short of the best one's, in nats; the largest."""
    import torch

    worst = 0.0
    for prompt_T, made in zip(prompts_NT, generated, strict=True):
        made_T = torch.tensor(made)
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.cat([prompt_T, made_T])[None], use_cache=False).logits[0].float()
        log_p_TV = logits_TV[len(prompt_T) - 1 : -1].log_softmax(-1)
        chosen_T = log_p_TV.gather(-1, made_T[:, None])[:, 0]
        worst = max(worst, float((log_p_TV.amax(-1) - chosen_T).max()))
    return worst


def check_texts(folder: Path, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise `StepError` unless the converted tokenizer makes the tokens, and the text, that `tokenizer` makes."""
    import openvino_genai

    other = openvino_genai.Tokenizer(folder)
    for text in texts:
        wanted = list(tokenizer(text)["input_ids"])
        made = other.encode(text).input_ids.data[0].tolist()
        if made != wanted:
            raise StepError(
                f"OpenVINO's tokenizer makes {made[:8]} of {text!r}, Transformers {wanted[:8]}",
                remedy="leave openvino out of `formats`, or export with a tokenizer that OpenVINO converts",
            )
        back = tokenizer.decode(wanted, skip_special_tokens=True)
        if other.decode(wanted) != back:
            raise StepError(f"OpenVINO's tokenizer makes {other.decode(wanted)!r} of the tokens of {back!r}")


def _inputs(compiled: Any) -> set[str]:
    return {name for given in compiled.inputs for name in given.get_names()}


def _threads() -> dict[str, Any]:
    import torch

    return {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
