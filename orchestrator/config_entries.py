"""Numbers of a config.json, under the names that families have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import SpecError

MOST_COUNT = 2**40  # beyond it there is no model
# Other names of the same entries.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "hidden_size": ("n_embd",),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_key_value_heads": ("num_kv_heads",),
}


def layer_index(config: Mapping[str, Any], key: str) -> int:
    """Return the number of a layer, 0 where there is none."""
    return 0 if not config.get(key) else count(config, key)


def count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer of the configuration."""
    value = next((config[name] for name in (key, *_ALIASES.get(key, ())) if config.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNT:
        raise SpecError(
            f"config.json must give {key} as a positive integer, not {str(value)[:40]}",
            remedy="complete the model's config.json",
        )
    return value
