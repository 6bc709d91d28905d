"""Log probabilities for callers: the model's own, before any processor or filter touches the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from folo_core.execution.interface import Candidates


def gather_logprobs(log_probs: torch.Tensor, tokens: torch.Tensor, num_top: list[int]) -> list[Candidates]:
    """Pick each row's sampled token and its most likely tokens.

    Args:
        log_probs: float32 ``[rows, vocab]``.
        tokens: int64 ``[rows]``: the sampled (or prompt) token of each row.
        num_top: how many most likely tokens each row wants; -1 for the whole vocabulary.

    Returns:
        Per row ``(token ids, log probabilities, rank of the sampled token)``; the sampled token comes first.
    """
    vocab_size = log_probs.shape[-1]
    wanted = [vocab_size if count < 0 else count for count in num_top]
    sampled = log_probs.gather(1, tokens[:, None])
    ranks = (log_probs > sampled).sum(1) + 1
    top = log_probs.topk(max(wanted), dim=1)
    ids = torch.cat((tokens[:, None], top.indices), 1).tolist()
    values = torch.cat((sampled, top.values), 1).tolist()
    return [
        (row_ids[: count + 1], row_values[: count + 1], rank)
        for row_ids, row_values, rank, count in zip(ids, values, ranks.tolist(), wanted, strict=True)
    ]
