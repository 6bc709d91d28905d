"""Padded batches, for code that runs a model without paged attention (R13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@attrs.frozen(slots=True)
class PaddedBatch:
    """Sequences of different lengths as one rectangle. Shapes are ``[sequences, longest]``, dtype int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    """1 for a token, 0 for padding."""
    position_ids: torch.Tensor
    """Each token's position in its own sequence; 0 on padding."""


def prepare_batch(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> PaddedBatch:
    """Pad sequences on the left, so that every row's last token is in the last column.

    A decoder reads its next token from the last position: padded on the right, short rows would read it from padding.

    Raises:
        ValueError: there is no sequence, or an empty one.
    """
    if not sequences or not all(sequences):
        raise ValueError("sequences: give at least one sequence, and no empty one")
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return PaddedBatch(ids.to(device), mask.to(device), positions.to(device))
