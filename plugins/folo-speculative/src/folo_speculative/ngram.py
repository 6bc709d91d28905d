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
        found = []
        rows = zip(metadata.request_ids, metadata.sequence_indices.tolist(), metadata.params, texts, strict=True)
        for request_id, sequence, params, text in rows:
            indexes = self._indexes.get(request_id)
            index = None if indexes is None else indexes.get(sequence)
            if index is None:
                index = self._open(request_id, sequence, params)
            found.append(index.continue_(text, max_tokens))
        width = max(map(len, found), default=0)
        padded = [tokens + [-1] * (width - len(tokens)) for tokens in found]
        device = metadata.positions.device
        return Draft(tokens=torch.tensor(padded, dtype=torch.int64, device=device).view(len(found), width))

    def remove_request(self, request_id: str) -> None:
        """Drop the request's indexes."""
        self._indexes.pop(request_id, None)

    def _open(self, request_id: str, sequence: int, params: SamplingParams) -> NgramIndex:
        own = params if isinstance(params, SpeculativeParams) else _USUAL
        index = NgramIndex(own.min_ngram, own.max_ngram)
        self._indexes.setdefault(request_id, {})[sequence] = index
        return index


class NgramIndex:
    """Where each n-gram of a growing text occurred last: each token is entered once, in constant time."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._places: list[tuple[int, dict[tuple[int, ...], int]]] = [(n, {}) for n in range(longest, shortest - 1, -1)]
        """Lengths, longest first, each with its n-grams and the places of what followed them."""
        self._length = 0

    def continue_(self, text: list[int], count: int) -> list[int]:
        """Enter what is new of ``text`` and return ``count`` tokens that may follow it, or none.

        A text that repeats itself up to its very end is continued round the loop.

        Args:
            text: token ids that begin with those of the last call.
            count: how many tokens to return.
        """
        known, length = self._length, len(text)
        for n, places in self._places:
            for end in range(known if known > n else n, length):  # noqa: FURB136 (a call less for each row)
                places[tuple(text[end - n : end])] = end
        self._length = length
        for n, places in self._places:
            place = places.get(tuple(text[length - n :]))
            if place is not None:
                loop = text[place:]
                return (loop * -(-count // len(loop)))[:count]
        return []
