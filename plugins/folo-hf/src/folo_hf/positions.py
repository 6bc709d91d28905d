"""How long a sequence a model's positions allow, and rotary embeddings whose frequencies depend on that length."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

UNLIMITED = 2**20
"""Taken for a model whose configuration names no limit."""

LIMIT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx", "max_seq_len")


def position_limit(config: PretrainedConfig, wanted: int | None) -> int:
    """Longest sequence in tokens.

    transformers changes the frequencies of ``dynamic`` and ``longrope`` embeddings when *any* sequence of a batch grows
    past the length the model was first trained at, so that a request's result would depend on its neighbours. Folo
    does not let that happen: ``dynamic`` ends at that length, ``longrope`` too unless a greater ``max_model_len`` is
    asked for, and then uses its long frequencies from the first token on.
    """
    text = config.get_text_config(decoder=True)
    limit = next((int(value) for field in LIMIT_FIELDS if (value := getattr(text, field, None))), UNLIMITED)
    for rope in _rope_parameters(text):
        original = rope.get("original_max_position_embeddings") or limit
        if _changes(rope) and original < limit and not _goes_long(rope, wanted):
            logger.warning(
                "max_model_len is %d, where this model's rotary frequencies (%s) change; %s",
                original,
                rope["rope_type"],
                "a greater max_model_len chooses its long ones"
                if rope["rope_type"] == "longrope"
                else "longer sequences are not served",
            )
            limit = original
    return limit


def settle_rope(model: PreTrainedModel, wanted: int | None) -> None:
    """Fix ``longrope`` embeddings to their long frequencies if ``max_model_len`` goes past the original length."""
    text = model.config.get_text_config(decoder=True)
    if not any(_goes_long(rope, wanted) for rope in _rope_parameters(text)):
        return
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope" and hasattr(module, "original_inv_freq"):
            original = text.rope_parameters["original_max_position_embeddings"]
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](text, module.inv_freq.device, seq_len=original + 1)
            module.inv_freq.copy_(long)
            # What transformers returns to for short sequences.
            module.original_inv_freq = torch.clone(module.inv_freq)


def _rope_parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The parameters of each kind of rotary embedding: one set, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    yield from [rope] if "rope_type" in rope else (value for value in rope.values() if isinstance(value, dict))


def _changes(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") in {"dynamic", "longrope"}


def _goes_long(rope: dict[str, Any], wanted: int | None) -> bool:
    original = rope.get("original_max_position_embeddings")
    return rope.get("rope_type") == "longrope" and original is not None and wanted is not None and wanted > original
