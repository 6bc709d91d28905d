"""Paged attention on CUDA devices: what is compiled for a device, and the launches. Importing it imports Triton."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch

from folo_kernels.gpu import attention_kernels as kernels
from folo_kernels.gpu.plan import Tuning
from folo_kernels.gpu.staging import Stager

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from folo_kernels.gpu.blocks import DeviceBlocks
    from folo_kernels.gpu.staging import StagedPlan

    Int32s = NDArray[np.int32]

LOG2_E = math.log2(math.e)

FEW_ROWS = 64
"""Rows up to which a step has few programs, each of which must have many loads under way."""


@attrs.frozen(slots=True, kw_only=True)
class DecodeConfig:
    """What the decode kernel is compiled for."""

    block_n: int
    """Tokens per step of its loop over one row's keys."""
    shared_rows: int
    """Query rows (rows times heads that share a KV head) that read a shared prefix together."""
    shared_block_n: int
    """Tokens per step of its loop over the keys that several rows share."""
    num_warps: int
    num_stages: int
    merged_at_once: int = 32
    """Partial results, one of each query head, that whoever merges them reads at a time."""


@attrs.frozen(slots=True, kw_only=True)
class PrefillConfig:
    """What the prefill kernel is compiled for."""

    block_m: int
    """Query rows (tokens times heads that share a KV head) of a tile."""
    block_n: int
    num_warps: int
    num_stages: int


@attrs.frozen(slots=True, kw_only=True)
class Configs:
    """Both kernels' configurations."""

    decode: DecodeConfig
    prefill: PrefillConfig
    few: DecodeConfig | None = None
    """For steps of at most FEW_ROWS rows, if not as for more."""
    single: DecodeConfig | None = None
    """For steps of one row, if not as for few."""

    def decoding(self, num_rows: int) -> DecodeConfig:
        """Pick by a step's sequences, padding included."""
        few = self.few if self.few is not None and num_rows <= FEW_ROWS else self.decode
        return self.single if self.single is not None and num_rows == 1 else few


HOPPER = Configs(
    decode=DecodeConfig(block_n=64, shared_rows=32, shared_block_n=32, num_warps=2, num_stages=3),
    few=DecodeConfig(block_n=64, shared_rows=32, shared_block_n=32, num_warps=4, num_stages=3),
    single=DecodeConfig(block_n=128, shared_rows=32, shared_block_n=32, num_warps=4, num_stages=2),
    prefill=PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=3),
)
"""What was measured to be fast for up to 128 features of 16 bits from compute capability 9.0 on."""


def configs_for(capability: tuple[int, int], head_size: int, dtype: torch.dtype) -> Configs:
    """Pick configurations by a device's compute capability, the larger head size and the dtype of keys and values.

    Shared memory decides: a processor has 227 KiB from 9.0 on, and as little as 99 KiB on some 8.x. Tiles of float8
    count as those of 16 bits, which they become before they are multiplied.
    """
    tile_bytes = tile(head_size) * max(2, dtype.itemsize)
    is_large = capability[0] >= 9  # noqa: PLR2004 (Hopper and later)
    stages, rows = (3, 64) if is_large else (2, 32)
    # Tiles of float32 are split into parts for tensor cores, which takes room as well.
    wide_stages = 2 if is_large or dtype.itemsize < 4 else 1  # noqa: PLR2004
    if tile_bytes <= 256 and is_large:  # noqa: PLR2004 (128 features in 16 bits)
        return HOPPER
    if tile_bytes <= 256:  # noqa: PLR2004
        decode = DecodeConfig(block_n=64, shared_rows=rows, shared_block_n=32, num_warps=4, num_stages=stages)
        prefill = PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=stages)
    elif tile_bytes <= 512:  # noqa: PLR2004
        decode = DecodeConfig(block_n=32, shared_rows=rows, shared_block_n=32, num_warps=4, num_stages=stages)
        prefill = PrefillConfig(block_m=2 * rows, block_n=32, num_warps=8, num_stages=wide_stages)
    else:
        decode = DecodeConfig(block_n=16, shared_rows=16, shared_block_n=16, num_warps=4, num_stages=2)
        prefill = PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=wide_stages)
    return Configs(decode=decode, prefill=prefill)


@attrs.frozen(slots=True, kw_only=True)
class Scoring:
    """What a layer does with scores, and how its keys and values are stored."""

    scale: float
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it."""
    softcap: float | None = None
    k_scale: float = 1.0
    """What stored keys are multiplied by: the ``key_scale`` of the layer's shape."""
    v_scale: float = 1.0

    def arguments(self) -> tuple[float, float, float, int]:
        """Factor on scores (to units of log2, or to twice the cap's tanh), cap, scale of values, window."""
        scale = self.scale * self.k_scale
        if self.softcap is None:
            return scale * LOG2_E, 0.0, self.v_scale, self.window or 0
        return 2 * scale / self.softcap * LOG2_E, self.softcap * LOG2_E, self.v_scale, self.window or 0


@attrs.frozen(slots=True, kw_only=True)
class Partials:
    """Room for partial results, written and read within one layer."""

    values: torch.Tensor
    """float32 ``[slots * heads * value_size]``."""
    tops: torch.Tensor
    """float32 ``[slots * heads]``: log2 of the sum of powers of two of a result's scores."""
    counters: torch.Tensor
    """int32 ``[rows * kv_heads]``: how many of a row's partial results are there; zero before and after a layer."""


@attrs.frozen(slots=True, kw_only=True)
class Operands:
    """One layer's tensors: queries, all blocks' keys and values, and the output."""

    query: torch.Tensor
    """``[tokens, heads, key_size]``; any stride over tokens and heads."""
    keys: torch.Tensor
    """``[num_blocks, kv_heads, block_size, key_size]``."""
    values: torch.Tensor
    out: torch.Tensor
    """``[tokens, heads, value_size]``; any stride over tokens."""

    def sizes(self) -> dict[str, int | str]:
        """What both kernels are compiled for."""
        _, kv_heads, block_size, key_size = self.keys.shape
        value_size = self.values.shape[3]
        return {
            "GROUP": self.query.shape[1] // kv_heads,
            "KV_HEADS": kv_heads,
            "KEY_SIZE": key_size,
            "VALUE_SIZE": value_size,
            "KEY_TILE": tile(key_size),
            "VALUE_TILE": tile(value_size),
            "BLOCK_SIZE": block_size,
            # Float32 in three products of tensor cores: exact ones have no such unit, and spill their registers.
            "PRECISION": "tf32x3" if self.query.is_cuda else "ieee",
        }

    def strides(self) -> tuple[int, int, int]:
        """Numbers from one token's queries to the next one's, from one head's, and from one token's output."""
        return self.query.stride(0), self.query.stride(1), self.out.stride(0)


def tile(size: int) -> int:
    """Features that a kernel computes with: a power of two, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def decode(  # noqa: PLR0913 (a layer's whole call)
    operands: Operands,
    plan: StagedPlan,
    partials: Partials,
    scoring: Scoring,
    config: DecodeConfig,
    *,
    pdl: bool = False,
) -> None:
    """Attend for the rows with one new token. Where a row was cut into several items, the last one merges them."""
    sizes = operands.sizes()
    kv_heads, group = operands.keys.shape[1], int(sizes["GROUP"])
    group_tile = 1 << (group - 1).bit_length()
    kernels.decode_kernel[kv_heads, plan.item_programs](
        operands.query, operands.keys, operands.values, operands.out,
        partials.values, partials.tops, partials.counters,
        plan.part("header"), plan.part("items"), plan.part("rows"), plan.part("tables"),
        *operands.strides(), *scoring.arguments(),
        ROW_TILE=tile(group), SHARED_TILE=tile(plan.tuning.rows_per_chunk * group), HAS_SHARED=plan.has_shared,
        BLOCK_N=config.block_n, SHARED_BLOCK_N=config.shared_block_n,
        GROUP_TILE=group_tile, PARTS=max(1, config.merged_at_once // group_tile),
        SOFTCAP=scoring.softcap is not None, WINDOW=scoring.window is not None, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **({"launch_pdl": True} if pdl else {}), **sizes,
    )  # fmt: skip


def prefill(operands: Operands, plan: StagedPlan, scoring: Scoring, config: PrefillConfig) -> None:
    """Attend for the sequences with several new tokens."""
    num_tiles = len(plan.work.tiles)
    if not num_tiles:
        return
    kernels.prefill_kernel[operands.keys.shape[1], num_tiles](
        operands.query, operands.keys, operands.values, operands.out,
        plan.part("header"), plan.part("rows"), plan.part("tables"), plan.part("tiles"),
        *operands.strides(), *scoring.arguments(),
        TOKENS=plan.tuning.tokens_per_tile, BLOCK_M=tile(plan.tuning.tokens_per_tile * plan.tuning.group),
        BLOCK_N=config.block_n, SOFTCAP=scoring.softcap is not None, WINDOW=scoring.window is not None,
        num_warps=config.num_warps, num_stages=config.num_stages, **operands.sizes(),
    )  # fmt: skip


def store_kv(  # noqa: PLR0913 (a layer's tensors)
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write new keys and values into their slots of a layer's blocks, in one launch.

    Args:
        key: ``[tokens, kv_heads, key_size]``; any stride over tokens and heads.
        value: ``[tokens, kv_heads, value_size]``, likewise.
        slots: int64 ``[tokens]``: ``block * block_size + offset``.
        keys: ``[num_blocks, kv_heads, block_size, key_size]``.
        values: ``[num_blocks, kv_heads, block_size, value_size]``.
        key_scale: what is written is ``key / key_scale``; for keys stored in float8.
        value_scale: as key_scale.
    """
    _, kv_heads, block_size, key_size = keys.shape
    value_size = values.shape[3]
    if not len(slots):
        return
    kernels.store_kernel[(len(slots),)](
        key, value, slots, keys, values, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        1 / key_scale, 1 / value_scale,
        KV_HEADS=kv_heads, HEADS_TILE=1 << (kv_heads - 1).bit_length(), KEY_SIZE=key_size, VALUE_SIZE=value_size,
        KEY_TILE=tile(key_size), VALUE_TILE=tile(value_size), BLOCK_SIZE=block_size, num_warps=4,
    )  # fmt: skip


class PagedAttention:
    """Attention over a store of blocks: plans steps, and attends with room for partial results that layers share."""

    def __init__(
        self,
        blocks: DeviceBlocks,
        *,
        max_rows: int,
        max_width: int,
        tuning: Tuning | None = None,
        configs: Configs | None = None,
    ) -> None:
        """Attend over these blocks.

        Args:
            blocks: keys and values of all layers.
            max_rows: most sequences of a captured step.
            max_width: most blocks of a sequence in a captured step.
            tuning: overrules what is known of the device.
            configs: overrules what is picked for the device.
        """
        self.blocks = blocks
        self._configs = configs
        self._kv_heads = max(shape.kv_heads for shape in blocks.shapes)
        tuning = tuning or self._tuning()
        self.stager = Stager(blocks.block_size, blocks.device, max_rows=max_rows, max_width=max_width, tuning=tuning)
        self._max_rows = max_rows
        self._partials: list[Partials] = []
        # Made before any graph is captured, in which zeros would be written by replays alone.
        self._counters = [self._zeros(max_rows)]

    def plan(
        self,
        query_start: Int32s,
        seq_lens: Int32s,
        tables: Int32s,
        *,
        is_captured: bool = False,
        exchanging: Sequence[tuple[int, int]] = (),
    ) -> StagedPlan:
        """Decide a step's work and put it on the device (arguments as for ``plan.cut``)."""
        if len(seq_lens) * self._kv_heads > self._counters[-1].numel():
            # A captured graph may still count in the older, fewer ones.
            self._counters.append(self._zeros(len(seq_lens)))
        return self.stager.plan(query_start, seq_lens, tables, is_captured=is_captured, exchanging=exchanging)

    def configs(self, layer: int) -> Configs:
        """Return what a layer's kernels are compiled for."""
        if self._configs is not None:
            return self._configs
        shape = self.blocks.shapes[layer]
        return configs_for(self._capability(), max(shape.key_size, shape.value_size), shape.dtype)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write new keys and values of a layer into their slots."""
        blocks, shape = self.blocks, self.blocks.shapes[layer]
        scales = {"key_scale": shape.key_scale, "value_scale": shape.value_scale}
        store_kv(_unit(key), _unit(value), slots, blocks.keys[layer], blocks.values[layer], **scales)

    def attend(  # noqa: PLR0913 (what attention depends on)
        self,
        layer: int,
        query: torch.Tensor,
        plan: StagedPlan,
        scoring: Scoring,
        out: torch.Tensor | None = None,
        *,
        pdl: bool = False,
    ) -> torch.Tensor:
        """Attend causally: ``[tokens, heads, key_size] -> [tokens, heads, value_size]``, over what was written.

        With ``pdl``, decoding starts while the kernel before it still runs, and waits for that before it reads
        queries, keys and values (programmatic dependent launch, from compute capability 9.0 on).
        """
        keys, values = self.blocks.keys[layer], self.blocks.values[layer]
        if out is None:
            out = query.new_empty(*query.shape[:2], values.shape[3])
        operands = Operands(query=_unit(query), keys=keys, values=values, out=out)
        self._ready(plan, query.shape[1] // keys.shape[1])
        configs = self.configs(layer)
        if plan.item_programs:
            partials = self._room(plan.num_slots, *out.shape[1:])
            decode(operands, plan, partials, scoring, configs.decoding(plan.num_rows), pdl=pdl)
        prefill(operands, plan, scoring, configs.prefill)
        return out

    def _ready(self, plan: StagedPlan, group: int) -> None:
        """Make the device hold the plan, cut for as many heads per KV head as the layer has."""
        if group > plan.tuning.group:
            self.stager.regroup(plan, group)
        else:
            self.stager.put(plan)

    def _room(self, slots: int, heads: int, value_size: int) -> Partials:
        """Room for partial results. Older, smaller room is kept: a captured graph may still write there."""
        slots = max(slots, self.stager.tuning.slot_room(self._max_rows))
        found = self._partials[-1] if self._partials else None
        if found is None or found.tops.numel() < slots * heads or found.values.numel() < slots * heads * value_size:
            found = _partials(slots * heads, value_size, self._counters[-1])
            self._partials.append(found)
        return attrs.evolve(found, counters=self._counters[-1])

    def _zeros(self, rows: int) -> torch.Tensor:
        """Counters of so many rows."""
        return torch.zeros(rows * self._kv_heads, dtype=torch.int32, device=self.blocks.device)

    def _capability(self) -> tuple[int, int]:
        if self.blocks.device.type != "cuda":
            return (9, 0)  # the interpreter has no limits
        return torch.cuda.get_device_capability(self.blocks.device)

    def _tuning(self) -> Tuning:
        """Cut steps for this device and the model's KV heads; the query heads are known once a layer attends."""
        configs = [self.configs(layer) for layer in range(len(self.blocks.shapes))]
        tuning = Tuning(
            kv_heads=self._kv_heads,
            group=1,
            query_rows=min(found.prefill.block_m for found in configs),
            # In a captured step, rows alone must decide; so all numbers of rows share alike.
            shared_rows=min(found.decode.shared_rows for found in configs),
        )
        if self.blocks.device.type != "cuda":
            return tuning
        processors = torch.cuda.get_device_properties(self.blocks.device).multi_processor_count
        return attrs.evolve(tuning, processors=processors)


def _partials(results: int, value_size: int, counters: torch.Tensor) -> Partials:
    values, tops = (
        torch.empty(count, dtype=torch.float32, device=counters.device) for count in (results * value_size, results)
    )
    return Partials(values=values, tops=tops, counters=counters)


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    """Features side by side, which kernels rely on."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
