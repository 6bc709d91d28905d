"""Rows that go on with each other's blocks, for backends that leave it to the host (see ``Regrouping``).

It waits for the device to say who continues whom: right everywhere, and fast where there is no device to wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from folo_core.attention.interface import AttentionBackend, AttentionMetadata, Regrouping, RegroupingBackend
    from folo_core.execution.input_batch import PackedStep


def regroup(backend: AttentionBackend, metadata: AttentionMetadata) -> None:
    """Have a backend carry out what a planned step asks for, if it does."""
    if metadata.regrouping is not None:
        cast("RegroupingBackend", backend).regroup(metadata)  # for no other is it asked


def regroup_on_host(step: PackedStep, regrouping: Regrouping, backend: AttentionBackend, block_size: int) -> None:
    """Rewrite a step's tables and slots before it is planned, and copy blocks."""
    parents = regrouping.parents.cpu().numpy()
    rows = np.concatenate([np.arange(first, first + count) for first, count in regrouping.groups])
    moved = rows[parents[rows] != rows]
    tables, known = step.block_tables, step.block_tables.copy()
    last, offset = np.divmod(step.starts, block_size)
    before = np.arange(tables.shape[1]) < last[moved, None]
    tables[moved] = np.where(before, known[parents[moved]], known[moved])
    copied = moved[offset[moved] > 0]
    if not len(copied):
        return
    spares = regrouping.spares[copied]
    tables[copied, last[copied]] = spares
    step.tokens[2, step.query_start[copied]] = spares.astype(np.int64) * block_size + offset[copied]
    backend.copy_blocks(known[parents[copied], last[copied]].tolist(), spares.tolist())
