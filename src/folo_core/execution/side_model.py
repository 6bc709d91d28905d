"""A second model that reads along: it keeps blocks of its own and computes only what it has not read yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from folo_core.plugins.registry import Registry
    from folo_core.sampling.interface import SamplerContext


class SideModel:
    """Next-token logits of another model for the engine's sequences."""

    vocab_size: int

    def logits(self, keys: Sequence[str], histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits that follow each history, float32 ``[rows, vocab]``."""
        raise NotImplementedError


def open_side_model(name: str, registry: Registry, context: SamplerContext) -> SideModel:
    """Load the model ``name`` with the engine's loader."""
    raise NotImplementedError
