"""The layout in which torch's 4-bit kernel for CUDA reads its weights, and the way back.

``_convert_weight_to_int4pack`` returns int32 ``[out / 8, in / (16 * depth), 32, depth / 2]``. A tile holds 8 outputs
and ``16 * depth`` inputs; which of them stands where within it is torch's own affair, so it is found out rather than
known: three matrices whose numbers are the digits of each place, base 16, are packed, and read back.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from folo_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

TILE_OUTPUTS = 8
UNIT = 16
"""Inputs of a tile for each unit of depth."""
DEPTHS = (8, 4, 2)
CODES_A_WORD = 8
CHUNK = 4096
"""Outputs unpacked at once: what an unpacked copy may take of a full device."""


def tile_depth(inputs: int) -> int:
    """Return the deepest tile that divides the inputs, a multiple of 32."""
    return next(depth for depth in DEPTHS if inputs % (UNIT * depth) == 0)


def unpack_codes(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """Return the numbers ``[outputs, inputs]`` as uint8."""
    depth = 2 * packed.shape[3]
    order = tile_order(depth, packed.device)
    found = torch.empty((outputs, inputs), dtype=torch.uint8, device=packed.device)
    for first in range(0, outputs, CHUNK):
        tiles = packed[first // TILE_OUTPUTS : (first + CHUNK) // TILE_OUTPUTS]
        codes = _codes(tiles)[..., order].reshape(len(tiles), -1, TILE_OUTPUTS, UNIT * depth)
        found[first : first + CHUNK] = codes.transpose(1, 2).reshape(-1, inputs)
    return found


def _codes(tiles: torch.Tensor) -> torch.Tensor:
    """Numbers of every tile in the order of its words: uint8 ``[rows of tiles, tiles of a row, 8 * words]``."""
    words = tiles.flatten(2).contiguous().view(torch.uint8)
    # Words are little-endian: a byte's lower half comes before its upper one.
    return torch.stack([words & 15, words >> 4], -1).flatten(2)


@functools.cache
def tile_order(depth: int, device: torch.device) -> torch.Tensor:
    """Return int64 ``[8 * 16 * depth]``: where in a tile's words the number of each output and input stands."""
    return find_order(depth, device, torch.ops.aten._convert_weight_to_int4pack)  # noqa: SLF001 (no public name)


def find_order(depth: int, device: torch.device, pack: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Find the order of a function that packs pairs of numbers, uint8 ``[out, in / 2]``.

    Raises:
        ConfigError: its tiles do not hold each number once.
    """
    width = UNIT * depth
    place = torch.arange(TILE_OUTPUTS * width, device=device).view(TILE_OUTPUTS, width)
    read = torch.zeros(TILE_OUTPUTS * width, dtype=torch.int64, device=device)
    for digit in range(3):
        codes = (place >> 4 * digit & 15).to(torch.uint8)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        read |= _codes(pack(pairs.contiguous(), depth))[0, 0].long() << 4 * digit
    if not torch.equal(read.sort().values, place.flatten()):
        raise ConfigError(
            f"model.quantization: 'int4': torch {torch.__version__} packs weights in another layout than tiles of "
            "8 outputs: give another version of torch, or 'fp8'"
        )
    return read.argsort()
