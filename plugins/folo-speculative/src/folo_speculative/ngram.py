"""Prompt lookup: what followed the last tokens when they came up before will probably follow again.

Method: A. Saxena, "Prompt Lookup Decoding" (2023): the longest of a few suffixes that has occurred, at its latest
occurrence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_core.sampling.interface import Draft
from folo_speculative.params import SpeculativeParams

if TYPE_CHECKING:
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams

_USUAL = SpeculativeParams()


class NgramProposer:
    """Looks the end of each row's text up in the text itself, with an index that grows as the text does."""

    def __init__(self) -> None:
        self._indexes: dict[str, dict[int, NgramIndex]] = {}
        """By request and by sequence within it."""

    def propose(self, metadata: SamplingMetadata, max_tokens: int) -> Draft:
        """Draft what followed the longest known end of each row, or nothing for rows whose end is new."""
        texts = metadata.history or [[]] * metadata.num_rows
        rows = zip(metadata.request_ids, metadata.sequence_indices.tolist(), metadata.params, texts, strict=True)
        found = [self._index(name, index, params).continue_(text, max_tokens) for name, index, params, text in rows]
        width = max(map(len, found), default=0)
        padded = [tokens + [-1] * (width - len(tokens)) for tokens in found]
        device = metadata.positions.device
        return Draft(tokens=torch.tensor(padded, dtype=torch.int64, device=device).view(len(found), width))

    def remove_request(self, request_id: str) -> None:
        """Drop the request's indexes."""
        self._indexes.pop(request_id, None)

    def _index(self, request_id: str, sequence: int, params: SamplingParams) -> NgramIndex:
        indexes = self._indexes.setdefault(request_id, {})
        if sequence not in indexes:
            own = params if isinstance(params, SpeculativeParams) else _USUAL
            indexes[sequence] = NgramIndex(own.min_ngram, own.max_ngram)
        return indexes[sequence]


class NgramIndex:
    """Where each n-gram of a growing text occurred last: each token is entered once, in constant time."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._places: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(longest, shortest - 1, -1)}
        """Length to n-gram to the place of what followed it; longest first."""
        self._length = 0

    def continue_(self, text: list[int], count: int) -> list[int]:
        """Enter what is new of ``text`` and return ``count`` tokens that may follow it, or none.

        A text that repeats itself up to its very end is continued round the loop.

        Args:
            text: token ids that begin with those of the last call.
            count: how many tokens to return.
        """
        for n, places in self._places.items():
            first = max(self._length, n)
            if len(text) <= first:
                continue
            shifted = (text[first - n + i : len(text) - n + i] for i in range(n))
            places.update(zip(zip(*shifted, strict=True), range(first, len(text)), strict=True))
        self._length = len(text)
        ends = (places.get(tuple(text[-n:])) for n, places in self._places.items())
        place = next((end for end in ends if end is not None), None)
        if place is None:
            return []
        loop = text[place:]
        return (loop * -(-count // len(loop)))[:count]
