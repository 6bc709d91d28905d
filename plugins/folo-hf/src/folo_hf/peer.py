"""transformers' own ``generate`` over the same weights: the peer of ``folo bench --against transformers``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersPeer:
    """A plain transformers model with its default attention and its dynamic cache."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._module = module.eval()
        # Lengths are the workload's, so that no contestant stops early; any token may fill masked places.
        module.generation_config.eos_token_id = None
        module.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Continue the prompts greedily as one left-padded batch, past end-of-sequence.

        The batch runs as long as its longest output; each result is cut to its own length.
        """
        width = max(map(len, prompts))
        device = self._module.device
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        output = self._module.generate(
            input_ids=padded, attention_mask=mask, do_sample=False, max_new_tokens=max(max_tokens)
        )
        rows = output[:, width:].tolist()
        return [row[:length] for row, length in zip(rows, max_tokens, strict=True)]
