"""Makes a model's embeddings cover its tokenizer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def fit_vocabulary(model: PreTrainedModel, num_tokens: int) -> None:
    """Grow the embeddings if the tokenizer has tokens beyond them; without that, such a token would crash a step.

    The new rows, of the head too, are the mean of the old ones: a token that the model never learnt is then neither
    likely nor impossible, and loading twice gives the same model. Rows beyond the tokenizer are common padding and
    stay as they are.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if num_tokens <= old:
        return
    logger.warning("tokenizer: has %d tokens, the model's vocabulary %d: grew the embeddings", num_tokens, old)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    head = model.get_output_embeddings()
    grown = [model.get_input_embeddings().weight]
    if head is not None:
        grown += [head.weight] if head.bias is None else [head.weight, head.bias]
    with torch.no_grad():
        for weight in grown:
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
