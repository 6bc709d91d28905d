"""A step's block tables in the form that FlashInfer reads: the pages of all sequences end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from folo_core.attention.interface import AttentionMetadata


@attrs.frozen(slots=True, kw_only=True, eq=False)
class Pages:
    """Some of a step's sequences. All tensors are int32 on the host, where FlashInfer plans."""

    rows: NDArray[np.int64] | None
    """Packed rows of their new tokens; None if they are all of the step's."""
    query_start: torch.Tensor
    """``[num_seqs + 1]``: where each sequence's new tokens begin among ``rows``."""
    page_start: torch.Tensor
    """``[num_seqs + 1]``: where each sequence's pages begin in ``page_ids``."""
    page_ids: torch.Tensor
    """The blocks of all sequences, in order."""
    last_page_len: torch.Tensor
    """``[num_seqs]``: tokens in each sequence's last block, 1 to ``block_size``."""


def split(metadata: AttentionMetadata) -> tuple[Pages | None, Pages | None]:
    """Return the sequences with one new token, and those with more; None where there are none."""
    counts = np.diff(metadata.query_start)
    decoding, reading = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
    return _pages(metadata, decoding), _pages(metadata, reading)


def _pages(metadata: AttentionMetadata, chosen: NDArray[np.intp]) -> Pages | None:
    if not len(chosen):
        return None
    size = metadata.block_size
    starts = metadata.query_start[chosen].astype(np.int64)
    counts = metadata.query_start[chosen + 1].astype(np.int64) - starts
    lengths = metadata.seq_lens[chosen].astype(np.int64)
    pages = -(-lengths // size)
    table = metadata.block_tables[chosen]
    rows = None
    if len(chosen) < len(metadata.seq_lens):
        # Each row is its sequence's first row, and how far it stands behind that sequence's first one here.
        begins = np.cumsum(counts) - counts
        rows = np.repeat(starts - begins, counts) + np.arange(int(counts.sum()))
    return Pages(
        rows=rows,
        query_start=_offsets(counts),
        page_start=_offsets(pages),
        page_ids=_int32(table[np.arange(table.shape[1]) < pages[:, None]]),
        last_page_len=_int32(lengths - (pages - 1) * size),
    )


def _offsets(counts: NDArray[np.int64]) -> torch.Tensor:
    return _int32(np.concatenate([[0], np.cumsum(counts)]))


def _int32(array: NDArray[np.integer]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32))
