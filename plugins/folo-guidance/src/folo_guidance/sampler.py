"""Two models' logits to one distribution, from which the plain samplers draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from folo_core.errors import FoloError, OutOfBlocksError, ParamsError
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import SamplingType
from folo_guidance.params import SECTION, GuidanceConfig

if TYPE_CHECKING:
    from folo_core.execution.side_model import SideModel
    from folo_core.request import Request
    from folo_core.sampling.interface import SamplerContext
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence
    from folo_guidance.params import GuidanceParams

_LEAST = -1e4
"""Log probability of what the guide excludes: differences must stay numbers."""


class GuidanceSampler:
    """Guidance by a second model that reads along with every row.

    The combination is classifier-free guidance (Sanchez et al., 2023) and, with a weaker model as the guide,
    contrastive decoding (O'Brien and Lewis, 2023), with its plausibility constraint (Li et al., 2023).
    """

    needs_history = True

    def __init__(self, context: SamplerContext) -> None:
        """Draw with the plain samplers; the guide is opened by the first request that needs it."""
        self._context = context
        self._plain = {kind: context.plain_sampler(kind) for kind in (SamplingType.GREEDY, SamplingType.RANDOM)}
        self._guide: SideModel | None = None

    def add_request(self, request: Request) -> None:
        """Open the guide, unless it is open or not needed.

        Raises:
            ParamsError: the configuration names no guide.
            ConfigError: the guide does not fit the main model.
            ModelLoadError: the guide cannot be loaded.
        """
        if cast("GuidanceParams", request.params).scale != 1:
            self._open(cast("GuidanceParams", request.params).scale)

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Combine, then draw: greedily at temperature 0, else at random. A request whose guide fails ends alone."""
        params = [cast("GuidanceParams", p) for p in metadata.params]
        floor = torch.tensor([[p.plausibility] for p in params], device=logits.device).log()
        implausible = logits < logits.amax(1, keepdim=True) + floor
        guided = [row for row, p in enumerate(params) if p.scale != 1]
        if guided:
            logits[guided] = self._combine(logits[guided], metadata.select(guided))
        logits.masked_fill_(implausible, -torch.inf)
        sound = logits.isfinite().any(1).logical_and_(~logits.isnan().any(1)).tolist()
        tokens = torch.full((len(params), 1), -1, device=logits.device)
        for kind, sampler in self._plain.items():
            rows = [row for row, p in enumerate(params) if p.sampling_type is kind and sound[row]]
            if rows:
                tokens[rows] = sampler.step(logits[rows], metadata.select(rows)).tokens[:, :1]
        parents = torch.tensor([row for row, fine in enumerate(sound) if fine], dtype=torch.int64, device=logits.device)
        bad = [request_id for request_id, fine in zip(metadata.request_ids, sound, strict=True) if not fine]
        errors = {name: FoloError(f"request {name!r}: the guide's logits cannot be sampled: NaN") for name in bad}
        return SamplerOutput(parents=parents, tokens=tokens[parents], errors=errors)

    def finish(self, request: Request) -> list[Sequence]:
        """Return the finished sequence."""
        return list(request.finished)

    def remove_request(self, request_id: str) -> None:
        """Return the blocks that the guide keeps for the request."""
        if self._guide is not None:
            self._guide.forget_request(request_id)

    def _combine(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return ``log p_guide + scale * (log p_main - log p_guide)``; what is masked stays so."""
        scales = [cast("GuidanceParams", p).scale for p in metadata.params]
        keys = list(zip(metadata.request_ids, metadata.sequence_indices.tolist(), strict=True))
        guide = self._read(self._open(scales[0]), keys, metadata.history or []).log_softmax(-1).clamp_(min=_LEAST)
        main = logits.log_softmax(-1)
        mixed = guide + torch.tensor(scales, device=logits.device)[:, None] * (main - guide)
        return mixed.masked_fill_(main == -torch.inf, -torch.inf)

    def _read(self, guide: SideModel, keys: list[tuple[str, int]], histories: list[list[int]]) -> torch.Tensor:
        """Return the guide's logits after each history, in several passes if its memory is short."""
        try:
            return guide.logits(keys, histories)
        except OutOfBlocksError:
            half = len(keys) // 2
            if not half:
                raise
            parts = ((keys[:half], histories[:half]), (keys[half:], histories[half:]))
            return torch.cat([self._read(guide, *part) for part in parts])

    def _open(self, scale: float) -> SideModel:
        if self._guide is None:
            config = self._context.config
            section = None if config is None else config.plugins.get(SECTION)
            if not isinstance(section, GuidanceConfig) or section.guide is None:
                message = f"scale: {scale}: no guiding model is configured: set guide in [plugins.{SECTION}]"
                raise ParamsError(f"{message}, or LLM(..., plugins={{{SECTION!r}: {{'guide': MODEL}}}})")
            self._guide = self._context.side_model(section.guide)
        return self._guide
