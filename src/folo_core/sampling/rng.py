"""Counter-based randomness: a random number is a function of its key, not of what was drawn before it.

A token's number depends on the request's seed, the sequence's index within the request and the token's position,
and on nothing else: not on neighbours, batch order, preemption, chunking or device.

Algorithm: Philox4x32-10 of J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import functools
from array import array
from sys import byteorder

import torch

_HOST_ROWS = 256
"""Up to this many rows on the CPU are computed without tensors; measured to be the faster way."""
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def uniform(seeds: torch.Tensor, sequence_indices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return one uniform number per row, float64 ``[rows]`` in [0, 1), a multiple of 2**-53.

    All 64 bits of each argument count. The arithmetic is on integers, so the result is the same bit for bit
    on every device that has int64 and float64.

    Args:
        seeds: int64 ``[rows]``: the request's seed; any value.
        sequence_indices: int64 ``[rows]``: the index of the sequence within its request.
        positions: int64 ``[rows]``: number of tokens before the one being drawn.
    """
    words = philox4x32(torch.stack((positions, sequence_indices, seeds)))
    return words[0].mul(1 << 21).add_(words[1] >> 11).to(torch.float64).mul_(2.0**-53)


def philox4x32(block: torch.Tensor) -> torch.Tensor:
    """Return the four output words of Philox4x32-10 for each row, int64 ``[4, rows]``, each in [0, 2**32).

    Args:
        block: int64 ``[3, rows]``: the low and the high half of the 128-bit counter, and the 64-bit key.
    """
    rows = block.shape[1]
    on_host = block.device.type == "cpu" and 0 < rows <= _HOST_ROWS
    return _philox_in_integers(block) if on_host else _philox_in_tensors(block)


def _philox_in_tensors(block: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 in tensor operations, each on the words of both multiplications at once."""
    low, high = block & _MASK, block >> 32 & _MASK
    multipliers, weyl = _constants(block.device)
    even, odd = low[:2], high[:2]
    for round_key in torch.stack((low[2], high[2])) + weyl:
        flipped = even.flip(0)
        product = flipped * multipliers
        even = (product >> 32).add_(flipped).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK)
        odd = product
    return torch.stack((even[0], odd[0], even[1], odd[1])) & _MASK


@functools.cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the multipliers, int64 ``[2, 1]`` in flipped order, and the keys' increments, int64 ``[rounds, 2, 1]``.

    A multiplier is stored less 2**32. Its product with a word then fits a signed 64-bit integer and keeps its
    low word, while its high word is short by that factor, which is added back.
    """
    multipliers = torch.tensor([[m - (1 << 32)] for m in reversed(_MULTIPLIERS)], device=device)
    weyl = torch.tensor([[[r * w & _MASK] for w in _WEYL] for r in range(_ROUNDS)], device=device)
    return multipliers, weyl


def _philox_in_integers(block: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 with every row in a 64-bit lane of one Python integer.

    A tensor operation on a few rows is nearly all dispatch; long integers do the same work much cheaper.
    A product of two words fits its lane, so nothing carries into the next one.
    """
    rows = block.shape[1]
    size = 8 * rows
    data = array("q", block.flatten().tolist()).tobytes()
    position, index, key = (int.from_bytes(data[i * size : (i + 1) * size], byteorder) for i in range(3))
    ones, mask = _lanes(rows)
    c0, c1, c2, c3 = position & mask, position >> 32 & mask, index & mask, index >> 32 & mask
    k0, k1 = key & mask, key >> 32 & mask
    w0, w1 = (w * ones for w in _WEYL)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & mask, p1 & mask, ((p0 >> 32) ^ c3 ^ k1) & mask, p0 & mask
        k0, k1 = k0 + w0 & mask, k1 + w1 & mask
    data = b"".join(word.to_bytes(size, byteorder) for word in (c0, c1, c2, c3))
    return torch.frombuffer(bytearray(data), dtype=torch.int64).view(4, rows)


@functools.lru_cache(maxsize=_HOST_ROWS)
def _lanes(rows: int) -> tuple[int, int]:
    """Return integers with 1 and with the word mask in each of ``rows`` lanes."""
    ones = ((1 << 64 * rows) - 1) // ((1 << 64) - 1)
    return ones, ones * _MASK
