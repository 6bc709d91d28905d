"""A second model that reads along: it keeps blocks of its own and computes only what it has not read yet.

Strategies use it to draft (speculative decoding) or to compare (guidance). It has an attention backend, a pool of
blocks and books of its own, so nothing that it does reaches the engine's model.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from folo_core.attention.interface import AttentionMetadata
from folo_core.errors import OutOfBlocksError, RequestError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray

    from folo_core.attention.interface import AttentionBackend
    from folo_core.execution.interface import LoadedModel
    from folo_core.kv_cache.block_table import BlockTable


@attrs.define(slots=True, eq=False)
class _Reading:
    """What was computed under one key."""

    tokens: list[int]
    table: BlockTable


class SideModel:
    """Next-token logits of another model for the engine's sequences.

    Every history is read under a key, under which its keys and values stay for the next call. A new key shares the
    blocks of the key whose tokens begin most alike, copied on write. When blocks run out, the keys that were used
    longest ago are dropped and computed anew if they come again: memory changes how long a call takes, and nothing
    else.
    """

    def __init__(
        self, model: LoadedModel, backend: AttentionBackend, empty: BlockTable, *, vocab_size: int | None = None
    ) -> None:
        """Bind ``model`` to ``backend``, over the blocks of a pool.

        Args:
            model: loaded, not bound yet.
            backend: not allocated yet.
            empty: a table without tokens; its pool and block size are the side model's.
            vocab_size: width of the logits to return; the model's own by default. Rows are cut to it, or filled
                up with their least logit, since two models of one tokenizer may pad their vocabularies differently.
        """
        self._model = model
        self._backend = backend
        self._empty = empty
        self._readings: dict[Hashable, _Reading] = {}
        """In order of use, the latest last."""
        self.vocab_size = model.info.vocab_size if vocab_size is None else vocab_size
        self.max_model_len = model.info.max_model_len
        """Longest history in tokens."""
        self.num_computed_tokens = 0
        """Tokens that ever passed through the model."""
        backend.allocate(model.kv_cache_specs, empty.pool.num_blocks, empty.block_size, model.device)
        model.bind(backend)

    @torch.inference_mode()
    def logits(self, keys: Sequence[Hashable], histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits that follow each history, float32 ``[rows, vocab_size]``, from one packed forward pass.

        Args:
            keys: under what each row is remembered, all different. A tuple's first item should be the request's
                id, which ``forget_request`` looks at.
            histories: token ids of each row, one at least; what they have in common with what was computed under
                their key is not computed again. Ids past the model's vocabulary (padding) are read as token 0.

        Raises:
            OutOfBlocksError: the rows of this call alone do not fit the side model's blocks.
            RequestError: a history is empty or longer than ``max_model_len``, or a key occurs twice.
        """
        if not keys:
            return torch.empty((0, self.vocab_size), device=self._model.device)
        tokens = [list(history) for history in histories]
        self._check(keys, tokens)
        readings = [self._open(key, wanted) for key, wanted in zip(keys, tokens, strict=True)]
        try:
            starts = [reading.table.num_tokens for reading in readings]
            self._make_room(set(keys), readings, tokens)
            found = self._compute(readings, starts, tokens)
        except BaseException:
            for key in keys:  # what they hold was perhaps not computed
                self.forget(key)
            raise
        for reading, wanted in zip(readings, tokens, strict=True):
            reading.tokens = wanted
        return self._fit(found.float())

    def forget(self, key: Hashable) -> None:
        """Return the blocks of a key; an unknown one is ignored."""
        reading = self._readings.pop(key, None)
        if reading is not None:
            reading.table.release()

    def forget_request(self, request_id: str) -> None:
        """Forget the key ``request_id`` and every key that is a tuple which begins with it."""
        for key in list(self._readings):
            if key == request_id or (isinstance(key, tuple) and key[:1] == (request_id,)):
                self.forget(key)

    def check_integrity(self) -> None:
        """Check the pool's books against every table.

        Raises:
            BlockPoolError: they do not balance.
        """
        self._empty.pool.check_integrity(reading.table.blocks for reading in self._readings.values())

    def _check(self, keys: Sequence[Hashable], tokens: list[list[int]]) -> None:
        if len(set(keys)) < len(keys):
            message = f"keys: {list(keys)}: each row of a call needs a key of its own"
            raise RequestError(message)
        lengths = [len(history) for history in tokens]
        if min(lengths) < 1 or max(lengths) > self.max_model_len:
            message = (
                f"histories: from {min(lengths)} to {max(lengths)} tokens: model {self._model.info.architecture!r} "
                f"reads from 1 to {self.max_model_len}: lower max_model_len"
            )
            raise RequestError(message, code="context_length_exceeded")

    def _open(self, key: Hashable, tokens: list[int]) -> _Reading:
        """Return the key's reading, cut to what it shares with ``tokens``, the newest of which is always computed."""
        reading = self._readings.pop(key, None)
        shared = 0 if reading is None else common_prefix(reading.tokens, tokens)
        if reading is None:
            shares = {other: common_prefix(r.tokens, tokens) for other, r in self._readings.items()}
            best = max(shares, key=shares.__getitem__, default=None)
            table = self._empty
            # Less than a block is copied for more than it costs to compute.
            if best is not None and shares[best] >= self._empty.block_size:
                table, shared = self._readings[best].table, shares[best]
            reading = _Reading([], table.fork())
        shared = min(shared, len(tokens) - 1)
        reading.table.truncate(shared)
        reading.tokens = tokens[:shared]
        self._readings[key] = reading
        return reading

    def _make_room(self, keys: set[Hashable], readings: list[_Reading], tokens: list[list[int]]) -> None:
        """Give every row blocks for its missing tokens, and copy the partly filled ones that others share."""
        pool = self._empty.pool
        counts = [len(wanted) - reading.table.num_tokens for reading, wanted in zip(readings, tokens, strict=True)]
        while (needed := _blocks_needed(readings, counts)) > pool.num_free:
            oldest = next((key for key in self._readings if key not in keys), None)
            if oldest is None:
                message = (
                    f"side model {self._model.info.architecture!r}: {needed} blocks wanted for {len(readings)} rows, "
                    f"{pool.num_free} of {pool.num_usable} free: lower max_num_seqs or max_model_len"
                )
                raise OutOfBlocksError(message)
            self.forget(oldest)
        copies = [r.table.append_tokens(count) for r, count in zip(readings, counts, strict=True)]
        made = [copy for copy in copies if copy is not None]
        if made:
            self._backend.copy_blocks([source for source, _ in made], [target for _, target in made])

    def _compute(self, readings: list[_Reading], starts: list[int], tokens: list[list[int]]) -> torch.Tensor:
        """Run every row's tokens from its start on; return the logits after the last of each."""
        device = self._model.device
        new = np.concatenate([np.array(t[start:], dtype=np.int64) for start, t in zip(starts, tokens, strict=True)])
        new[new >= self._model.info.vocab_size] = 0
        positions, metadata = self._pack(readings, np.array(starts))
        if self._backend.wants_device_metadata:
            metadata.to_device(device)
        metadata.plan = self._backend.plan(metadata)
        last = torch.from_numpy(metadata.query_start[1:].astype(np.int64) - 1).to(device)
        self.num_computed_tokens += metadata.num_tokens
        return self._model.forward(
            torch.from_numpy(new).to(device), torch.from_numpy(positions).to(device), last, metadata
        )

    def _pack(self, readings: list[_Reading], starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], AttentionMetadata]:
        """Lay the new tokens end to end; return their positions and the pass's metadata."""
        size = self._empty.block_size
        lengths = np.array([reading.table.num_tokens for reading in readings])
        counts = lengths - starts
        query_start = np.zeros(len(readings) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        tables = np.zeros((len(readings), max(len(r.table.blocks) for r in readings)), dtype=np.int32)
        for row, reading in enumerate(readings):
            tables[row, : len(reading.table.blocks)] = reading.table.blocks
        rows = np.repeat(np.arange(len(readings)), counts)
        positions = np.arange(len(rows)) + np.repeat(starts - query_start[:-1], counts)
        slots = tables[rows, positions // size].astype(np.int64) * size + positions % size
        metadata = AttentionMetadata(
            num_tokens=len(rows),
            query_start=query_start,
            seq_lens=lengths.astype(np.int32),
            block_tables=tables,
            slot_mapping=torch.from_numpy(slots).to(self._model.device),
            block_size=size,
        )
        return positions, metadata

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        missing = self.vocab_size - logits.shape[1]
        if missing <= 0:
            return logits[:, : self.vocab_size]
        # Not -inf: differences of logits must stay numbers.
        return torch.cat((logits, logits.amin(1, keepdim=True).expand(-1, missing)), 1)


def _blocks_needed(readings: list[_Reading], counts: list[int]) -> int:
    """Count the blocks that the rows will take: the last holder of a shared tail block writes in place."""
    tails = Counter(tail for reading in readings if (tail := reading.table.shared_tail()) is not None)
    copies = sum(min(count, readings[0].table.pool.references(tail) - 1) for tail, count in tails.items())
    return copies + sum(reading.table.missing_blocks(count) for reading, count in zip(readings, counts, strict=True))


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return how many leading items two lists share, by halving: comparing slices is much faster than items."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
