"""``AttentionBackend`` over FlashInfer's wrappers for paged keys and values.

FlashInfer plans on the host how the work of a step is cut up, once for all layers that attend alike: same heads, scale,
window and soft cap. Most models have one such kind of layer, some have two. Each kind has wrappers of its own, because
a wrapper remembers its last plan.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import attrs
import torch

from folo_core.errors import ConfigError
from folo_flashinfer.pages import split
from folo_flashinfer.plugin import MEND
from folo_flashinfer.storage import Pool

if TYPE_CHECKING:
    from folo_core.attention.interface import AttentionMetadata, KVCacheSpec
    from folo_flashinfer.pages import Pages

WORKSPACE_BYTES = 256 * 2**20
"""For partial results of long sequences that several blocks of threads share; all wrappers use the same."""

TENSOR_CORE_GROUP = 4
"""Query heads of a key head from which decoding fills a tensor core's tile well enough to pay."""

LAYOUT = "NHD"
"""FlashInfer's name of pages in which a token's heads lie together: new tokens are then written by one indexed copy."""


def load_library() -> Any:  # noqa: ANN401 (it is optional, and has no types)
    """Return the module ``flashinfer``.

    Raises:
        ConfigError: it cannot be imported, with the reason.
    """
    try:
        return importlib.import_module("flashinfer")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"attention: 'flashinfer': it cannot be imported ({reason}): {MEND}") from error


@attrs.frozen(slots=True, kw_only=True)
class Kind:
    """What layers have in common that share a plan."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """Return what both wrappers' ``plan`` take by name. A window counts the tokens before a token, not itself."""
        return {
            "sm_scale": self.scale,
            "window_left": -1 if self.window is None else self.window - 1,
            "logits_soft_cap": self.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }


@attrs.frozen(slots=True)
class Run:
    """A planned wrapper, and the packed rows that it computes: None for all of the step's."""

    wrapper: Any
    rows: torch.Tensor | None


@attrs.define(slots=True, kw_only=True, eq=False)
class StepPlan:
    """One step's sequences, and what has been planned for them by kind of layer."""

    decoding: Pages | None
    reading: Pages | None
    runs: dict[Kind, list[Run]] = attrs.field(factory=dict)


class FlashInferBackend:
    """``AttentionBackend`` and ``SwappingBackend``; ``library`` is the module ``flashinfer``."""

    wants_device_metadata = False
    supports_graphs = False  # a plan is made on the host, and what is launched depends on it

    def __init__(self, library: Any) -> None:  # noqa: ANN401 (see load_library)
        self._library = library
        self._wrappers: dict[tuple[Kind, str], Any] = {}

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed keys and values, and FlashInfer's workspace (see ``AttentionBackend``).

        Raises:
            ConfigError: FlashInfer has no kernels for the model's heads.
        """
        self.pool = Pool(specs, num_blocks, block_size, device)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan(self, metadata: AttentionMetadata) -> StepPlan:
        """Lay out the step's pages; FlashInfer plans when the first layer of a kind says what it needs."""
        decoding, reading = split(metadata)
        return StepPlan(decoding=decoding, reading=reading)

    def forward(  # noqa: PLR0913 (the protocol's signature)
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values into their slots, then attend causally (see ``AttentionBackend``)."""
        plan = metadata.plan
        if not isinstance(plan, StepPlan):
            raise TypeError(f"metadata.plan: {type(plan).__name__}: give what plan() returned for this step")
        self.pool.write(layer, metadata.slot_mapping, key, value)
        kind = Kind(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_size=query.shape[2],
            dtype=query.dtype,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
        )
        if kind not in plan.runs:
            plan.runs[kind] = self._planned(plan, kind, metadata.block_size)
        return self._attend(plan.runs[kind], query, (self.pool.keys[layer], self.pool.values[layer]))

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer."""
        self.pool.copy(sources, destinations)

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        self.pool.zero(blocks)

    def allocate_host(self, num_blocks: int) -> None:
        """Allocate room on the host for blocks 1 to ``num_blocks`` of all layers."""
        self.pool.allocate_host(num_blocks)

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it."""
        self.pool.swap_out(device_blocks, host_blocks)

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it."""
        self.pool.swap_in(host_blocks, device_blocks)

    def _attend(self, runs: list[Run], query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Compute every run's rows; ``query`` and the result are ``[num_tokens, heads, head_size]``."""
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for run in runs:
            if run.rows is None:
                return run.wrapper.run(query.contiguous(), cache)  # type: ignore[no-any-return]  # a tensor
            output.index_copy_(0, run.rows, run.wrapper.run(query.index_select(0, run.rows), cache))
        return output

    def _planned(self, plan: StepPlan, kind: Kind, block_size: int) -> list[Run]:
        """Let FlashInfer plan the step for layers of this kind."""
        shape = (kind.heads, kind.kv_heads, kind.head_size, block_size)
        runs = []
        if plan.decoding is not None:
            pages = plan.decoding
            wrapper = self._wrapper(kind, "decode")
            wrapper.plan(pages.page_start, pages.page_ids, pages.last_page_len, *shape, **kind.options())
            runs.append(self._run(wrapper, pages))
        if plan.reading is not None:
            pages = plan.reading
            wrapper = self._wrapper(kind, "prefill")
            places = (pages.query_start, pages.page_start, pages.page_ids, pages.last_page_len)
            wrapper.plan(*places, *shape, causal=True, **kind.options())
            runs.append(self._run(wrapper, pages))
        return runs

    def _run(self, wrapper: Any, pages: Pages) -> Run:  # noqa: ANN401 (FlashInfer's)
        rows = None if pages.rows is None else torch.from_numpy(pages.rows).to(self._workspace.device)
        return Run(wrapper, rows)

    def _wrapper(self, kind: Kind, which: str) -> Any:  # noqa: ANN401 (FlashInfer's)
        if (kind, which) not in self._wrappers:
            if which == "decode":
                grouped = kind.heads // kind.kv_heads >= TENSOR_CORE_GROUP
                made = self._library.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, LAYOUT, use_tensor_cores=grouped
                )
            else:
                made = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT)
            self._wrappers[kind, which] = made
        return self._wrappers[kind, which]
