"""Recorded decode steps: on CUDA the whole forward pass of a batch size is one launch in place of hundreds.

A graph replays the same kernels over the same memory, so a step is recorded once for each of a few numbers of rows
(``bucket_sizes``), reads what varies from tensors that stay in place, and is padded to the next larger size. A padding
row runs token 0 at position 0 into the null block and attends to nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from folo_core.attention.interface import AttentionMetadata
from folo_core.execution.regrouping import regroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from folo_core.attention.interface import AttentionBackend
    from folo_core.config import EngineConfig
    from folo_core.execution.input_batch import InputBatch, PackedStep
    from folo_core.execution.interface import LoadedModel

logger = logging.getLogger(__name__)

_FINE, _COARSE = 8, 32
"""Steps between sizes: fine up to 64 rows, where a padding row costs a larger share."""
MOST_ROWS = 512
"""Larger steps are not recorded: each keeps logits of its own, and launching is a small part of such a step."""
_STAGES = 4
"""Pinned buffers in turn: one is filled while the device may still read those of the steps in flight."""


def bucket_sizes(most: int) -> list[int]:
    """Return the numbers of rows that are recorded, ascending, the last one ``most``, or MOST_ROWS if that is less."""
    most = min(most, MOST_ROWS)
    sizes = {1, 2, 4, *range(_FINE, 65, _FINE), *range(96, most + 1, _COARSE)}
    return sorted({size for size in sizes if size < most} | {most})


def decode_graphs(
    model: LoadedModel, backend: AttentionBackend, batch: InputBatch, config: EngineConfig
) -> DecodeGraphs | None:
    """Return graphs to record, or None where they are off or a part cannot be recorded."""
    able = getattr(model, "supports_graphs", False) and getattr(backend, "supports_graphs", False)
    if not config.model.graphs or model.device.type != "cuda" or not able:
        return None
    return DecodeGraphs(model, backend, batch, config.scheduler.max_num_seqs)


@attrs.frozen(slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class _Stages:
    """Host copies of a step's tokens, ``[4, rows]``, on their way to the device."""

    def __init__(self, most: int) -> None:
        self._tensors = [torch.zeros((4, most), dtype=torch.int64, pin_memory=True) for _ in range(_STAGES)]
        self._events = [torch.cuda.Event() for _ in range(_STAGES)]
        self._turn = 0

    def send(self, tokens: NDArray[np.int64], target: torch.Tensor) -> None:
        """Copy ``[4, n]`` into the first columns of ``target [4, rows]`` and zeros into the others."""
        self._turn = (self._turn + 1) % _STAGES
        event, stage = self._events[self._turn], self._tensors[self._turn].view(-1)[: target.numel()]
        event.synchronize()
        host, count = stage.numpy().reshape(target.shape), tokens.shape[1]
        host[:, :count] = tokens
        host[:, count:] = 0
        target.copy_(stage.view(target.shape), non_blocking=True)
        event.record()


class DecodeGraphs:
    """The recorded steps of one model, up to ``most`` rows, or MOST_ROWS if that is less."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend, batch: InputBatch, most: int) -> None:
        self.sizes = bucket_sizes(most)
        most = self.sizes[-1]
        self._model, self._backend, self._batch = model, backend, batch
        self._size_of = np.searchsorted(self.sizes, np.arange(most + 1))
        self._recorded: dict[int, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._tokens = torch.zeros(4 * most, dtype=torch.int64, device=model.device)
        self._index = torch.arange(most, device=model.device)
        self._stages = _Stages(most)

    def covers(self, rows: int) -> bool:
        """Whether a step of so many rows can be replayed."""
        return 0 < rows <= self.sizes[-1]

    def replay(self, step: PackedStep) -> torch.Tensor:
        """Return the logits ``[rows, vocab_size]`` of a decode step, valid until the next one is replayed."""
        size = self.sizes[self._size_of[len(step.slots)]]
        recorded = self._recorded.get(size) or self._record(size)
        self._fill(step, size)
        recorded.graph.replay()
        return recorded.logits[: len(step.slots)]

    def record_all(self) -> None:
        """Record every size, the largest first, so that the others find its memory to share."""
        for size in _with_progress([size for size in reversed(self.sizes) if size not in self._recorded]):
            self._record(size)

    @torch.inference_mode()
    def _record(self, size: int) -> _Recorded:
        """Run a step of padding twice, the second time into a graph: the first one compiles and allocates."""
        nothing = np.zeros((size, 1), dtype=np.int32)
        metadata = self._metadata(size, np.zeros(size, dtype=np.int32), nothing)
        self._tokens.zero_()
        metadata.plan = self._backend.plan(metadata)
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(stream):
            self._forward(size, metadata)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = self._forward(size, metadata)
        torch.cuda.current_stream(self._model.device).wait_stream(stream)
        recorded = self._recorded[size] = _Recorded(graph, logits)
        return recorded

    def _forward(self, size: int, metadata: AttentionMetadata) -> torch.Tensor:
        tokens = self._inputs(size)
        return self._model.forward(self._batch.input_ids(tokens), tokens[1], self._index[:size], metadata)

    def _fill(self, step: PackedStep, size: int) -> None:
        """Bring a step's tokens and the attention's plan to where the graph of this size reads them."""
        missing = size - len(step.slots)
        lengths = np.pad(step.seq_lens, (0, missing))
        metadata = self._metadata(size, lengths, np.pad(step.block_tables, ((0, missing), (0, 0))))
        metadata.regrouping = step.regrouping
        metadata.plan = self._backend.plan(metadata)
        self._stages.send(step.tokens, self._inputs(size))
        regroup(self._backend, metadata)

    def _inputs(self, size: int) -> torch.Tensor:
        return self._tokens[: 4 * size].view(4, size)

    def _metadata(self, size: int, seq_lens: NDArray[np.int32], block_tables: NDArray[np.int32]) -> AttentionMetadata:
        return AttentionMetadata(
            num_tokens=size,
            query_start=np.arange(size + 1, dtype=np.int32),
            seq_lens=seq_lens,
            block_tables=block_tables,
            slot_mapping=self._inputs(size)[2],
            block_size=self._batch.block_size,
            is_captured=True,
        )


def _with_progress(sizes: list[int]) -> Iterator[int]:
    """Yield the sizes; on a terminal with a bar on stderr, and in any case with a line in the log at the end."""
    started = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(sizes, "recording decode steps", console=Console(stderr=True), transient=True)
    else:
        yield from sizes
    logger.info("recorded %d decode graphs in %.1f s", len(sizes), time.perf_counter() - started)
