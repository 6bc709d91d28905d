"""A step of all searches, those of one shape together: by kernels where there are some, else by tensor operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from folo_beam.grid import Grid
from folo_core.sampling.kernels import has_kernels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from folo_beam.device import Step
    from folo_beam.sampler import BeamSampler, Search
    from folo_core.sampling.metadata import SamplingMetadata


def sampler_on(device_type: str, tokenizer: Any) -> BeamSampler:  # noqa: ANN401 (any tokenizer)
    """Return the sampler for logits on a type of device: with kernels, one that need not wait for the host."""
    if has_kernels(device_type):
        from folo_beam.ahead import AheadBeamSampler

        return AheadBeamSampler(tokenizer)
    from folo_beam.sampler import BeamSampler

    return BeamSampler(tokenizer)


def by_shape(searches: Mapping[str, Search], metadata: SamplingMetadata) -> list[list[tuple[Search, range]]]:
    """Return the searches of a step and their rows, those of one shape together."""
    shapes: dict[tuple[int, int, int, bool], list[tuple[Search, range]]] = {}
    for request_id, rows in metadata.groups:
        search = searches[request_id]
        shapes.setdefault(search.shape, []).append((search, rows))
    return list(shapes.values())


def advance(
    logits: torch.Tensor, metadata: SamplingMetadata, shapes: list[list[tuple[Search, range]]]
) -> list[torch.Tensor]:
    """Return what ``Grid.advance`` returns, for the searches of all shapes; on the host if kernels did a part of it."""
    steps = [_start(logits, metadata, members) for members in shapes]
    parts = [
        Grid.of(logits.float(), metadata, members).advance() if step is None else []
        for members, step in zip(shapes, steps, strict=True)
    ]
    if any(steps):
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # the one wait: for the copies of all steps
        parts = [step.columns() if step else [c.cpu() for c in part] for step, part in zip(steps, parts, strict=True)]
    return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]


def _start(logits: torch.Tensor, metadata: SamplingMetadata, members: list[tuple[Search, range]]) -> Step | None:
    """Set kernels to work on searches of a shape that they serve; else return None."""
    width, num_lanes, num_ends, constrained = members[0][0].shape
    if num_lanes > 1 or constrained or not has_kernels(logits.device.type):
        return None
    from folo_beam.device import Step, fits

    return Step.start(logits, metadata, members) if fits(width, num_ends) else None
