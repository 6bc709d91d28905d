"""Parameters that differ in length from row to row, laid end to end so that one tensor operation serves all rows."""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING, Protocol

import torch

from folo_core.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence, Sized

    from folo_core.sampling_params import SamplingParams

    class _Ids(Sized, Iterable[int], Protocol):
        """What has a length and yields token ids."""


_CACHED_ENTRIES = 1 << 20


class Ragged:
    """Token ids, and numbers that go with them, of each params object: read from Python once, not at every step."""

    def __init__(
        self,
        device: torch.device,
        ids: Callable[[SamplingParams], _Ids],
        numbers: Callable[[SamplingParams], Iterable[float]] | None = None,
    ) -> None:
        """Remember how to read ``ids`` and, if they have some, their ``numbers`` out of parameters."""
        self._device = device
        self._ids = ids
        self._numbers = numbers
        # The params are kept beside their tensors, so that no other object can take over their id.
        self._known: dict[int, tuple[SamplingParams, torch.Tensor, torch.Tensor]] = {}
        self._entries = 0

    def of(self, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows and token ids, int64 ``[n]``, and their numbers, float32 ``[n]`` (empty without), of all rows."""
        found = [self._look_up(item) for item in params]
        ids = torch.cat([ids for _, ids, _ in found])
        numbers = torch.cat([numbers for _, _, numbers in found])
        return row_numbers([len(ids) for _, ids, _ in found], self._device), ids, numbers

    def _look_up(self, params: SamplingParams) -> tuple[SamplingParams, torch.Tensor, torch.Tensor]:
        known = self._known.get(id(params))
        if known is not None:
            return known
        ids = torch.tensor(list(self._ids(params)), dtype=torch.int64, device=self._device)
        numbers = list(self._numbers(params)) if self._numbers else []
        if self._entries + len(ids) > _CACHED_ENTRIES:
            self._known.clear()
            self._entries = 0
        self._entries += len(ids) + 1
        known = (params, ids, torch.tensor(numbers, dtype=torch.float32, device=self._device))
        self._known[id(params)] = known
        return known


def row_numbers(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return row ``i`` repeated ``lengths[i]`` times, for all rows, int64 ``[sum(lengths)]``."""
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))


def lay_out(lists: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and values, int64 ``[n]`` each, of one list of integers per row."""
    flat = array("q")
    for values in lists:
        flat.fromlist(values)
    # Twice as fast as torch.tensor on a list, which asks every element for its type.
    ids = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    return row_numbers([len(values) for values in lists], device), ids.to(device)


def refuse_outside(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise ParamsError, naming ``field`` and the first ids at fault, if one is not a token of the model."""
    outside = list(itertools.islice((token for token in ids if not 0 <= token < vocab_size), 5))
    if outside:
        shown = ", ".join(map(str, outside))
        raise ParamsError(f"{field}: {shown}: outside the vocabulary; use token ids from 0 to {vocab_size - 1}")
