"""Recognises a stack of decoder layers in a transformers module, and tries what is to run in their place.

Nothing is taken on trust: parts are found by their names, what they compute is compared with the formula that will be
computed instead, and at the end whole logits with the layers' own (``probe``'s tokens, in its two packed steps).
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
from torch import nn

from folo_hf.probe import FIRST, SECOND_HEAD, SECOND_TAIL, DenseTarget, packed_logits, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel

    from folo_hf.attention import AttentionBridge

Key = TypeVar("Key")

TABLE_STRETCH = 2048
"""Positions whose cosines and sines are made at a time."""

TRIAL_BLOCK = 16
"""Tokens of a block in a trial; each of its two sequences fits into one."""

TRIAL_BLOCKS = 3
"""Blocks that a trial takes: the null block, and one of each sequence."""


class NotRecognisedError(Exception):
    """A layer is not of the kind that is to stand in for it."""


def find_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that owns the list of layers, and the list's name there.

    Raises:
        NotRecognisedError: there is none.
    """
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and all(hasattr(layer, "self_attn") for layer in child):
                return owner, name
    raise NotRecognisedError("no list of layers with self_attn")


@torch.no_grad()
def norm_factor(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Return an RMSNorm's factor in float32, ``[hidden]``, found by what the norm does to ones, and its epsilon.

    Raises:
        NotRecognisedError: it is no RMSNorm.
    """
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or epsilon is None or weight.dim() != 1:
        raise NotRecognisedError(f"{type(norm).__name__} is no RMSNorm")
    # In float32, whatever the model's dtype: a factor of 1 + weight would lose half of the weight's digits.
    exact = norm if weight.dtype == torch.float32 else copy.deepcopy(norm).float()
    factor = exact(torch.ones_like(weight, dtype=torch.float32)) * (1 + epsilon) ** 0.5
    x = torch.linspace(-3, 3, weight.numel(), dtype=torch.float32, device=weight.device).sin_()
    formula = x / (x.square().mean() + epsilon) ** 0.5 * factor
    if not torch.allclose(exact(x), formula, rtol=1e-4, atol=1e-5):
        raise NotRecognisedError(f"{type(norm).__name__} is no RMSNorm")
    return factor.contiguous(), float(epsilon)


def optional_factor(parent: nn.Module, name: str) -> torch.Tensor | None:
    """Return the factor of a norm that a layer may lack."""
    norm = getattr(parent, name, None)
    return None if norm is None else norm_factor(norm)[0]


def activation_of(activation: Any, known: Mapping[Key, Callable[[torch.Tensor], torch.Tensor]]) -> Key | None:  # noqa: ANN401 (a function or a module)
    """Return which of the known activations this is: forms that differ in the fourth digit are told apart."""
    if activation is None:
        return None
    x = torch.linspace(-8, 8, 1001)
    found = activation(x)
    return next((e for e, each in known.items() if torch.allclose(found, each(x), rtol=0, atol=1e-6)), None)


class _Note(nn.Module):
    """Stands where a layer stood, and notes what it is handed instead of running."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,  # noqa: ANN401 (masks and caches)
    ) -> torch.Tensor:
        self._notes.hidden = hidden_states[0]
        # Layers of one kind share their tensors, so most of this copies nothing.
        self._notes.rotary.append((position_embeddings[0][0].contiguous(), position_embeddings[1][0].contiguous()))
        return hidden_states


@attrs.define(slots=True, eq=False)
class Notes:
    """What layers were handed."""

    hidden: torch.Tensor = attrs.field(factory=lambda: torch.empty(0))
    """``[tokens, hidden]``: what comes out of the embedding."""
    rotary: list[tuple[torch.Tensor, torch.Tensor]] = attrs.field(factory=list)
    """Each layer's cosines and sines, ``[tokens, rotary_size]``."""


@torch.no_grad()
def noted(
    model: PreTrainedModel, stack: tuple[nn.Module, str], input_ids: torch.Tensor, positions: torch.Tensor
) -> Notes:
    """What the layers are handed for these tokens, without running them or what stands in for them."""
    owner, name = stack
    layers, notes = getattr(owner, name), Notes()
    base: Any = model.base_model
    setattr(owner, name, nn.ModuleList(_Note(notes) for _ in range(len(layers))))
    try:
        base(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
    finally:
        setattr(owner, name, layers)
    return notes


class RotaryTables:
    """Cosines and sines of every position, made by the model's own rotary embedding, a stretch at a time.

    Args:
        model: whose layers are handed them.
        stack: what ``find_layers`` said of it.
        limit: how many positions there are at most: some embeddings change their frequencies beyond it.
    """

    def __init__(self, model: PreTrainedModel, stack: tuple[nn.Module, str], limit: int | None = None) -> None:
        self._model, self._stack, self._limit = model, stack, limit
        self.tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        """One for each kind of layer: cosines and sines ``[positions, rotary_size]``."""
        self.table_of: list[int] = []
        """Each layer's kind."""

    def reach(self, position: int) -> None:
        """Extend the tables up to a position."""
        stretches = []
        start = len(self.tables[0][0]) if self.tables else 0
        while start <= position:
            stretches.append(self._stretch(start))
            start += TABLE_STRETCH
        if stretches:
            before = [self.tables] if self.tables else []
            self.tables = [
                (torch.cat([cosine for cosine, _ in kind]), torch.cat([sine for _, sine in kind]))
                for kind in zip(*before, *stretches, strict=True)
            ]

    def _stretch(self, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        end = start + TABLE_STRETCH if self._limit is None else min(start + TABLE_STRETCH, self._limit)
        positions = torch.arange(start, end, device=self._model.device)
        rotary = noted(self._model, self._stack, torch.zeros_like(positions), positions).rotary
        kinds = {cosine.data_ptr(): (cosine, sine) for cosine, sine in rotary}
        self.table_of = [list(kinds).index(cosine.data_ptr()) for cosine, _ in rotary]
        return list(kinds.values())


@attrs.frozen(slots=True, kw_only=True, eq=False)
class TrialStep:
    """One packed step of a trial. Sequence ``i`` owns block ``i + 1``."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    """int64 ``[num_tokens]``."""
    query_start: list[int]
    seq_lens: list[int]
    block_tables: list[list[int]]


def trial_steps(model: PreTrainedModel) -> Iterator[TrialStep]:
    """The probe's two steps: one sequence whole and the head of another, then that one's tail."""
    first, second = tokens(model)
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND_HEAD)])
    slots = positions + TRIAL_BLOCK * torch.tensor([1] * FIRST + [2] * SECOND_HEAD)
    yield TrialStep(
        input_ids=torch.cat([first, second[:SECOND_HEAD]]),
        positions=positions.to(model.device),
        slots=slots.to(model.device),
        query_start=[0, FIRST, FIRST + SECOND_HEAD],
        seq_lens=[FIRST, SECOND_HEAD],
        block_tables=[[1], [2]],
    )
    tail = torch.arange(SECOND_HEAD, SECOND_HEAD + SECOND_TAIL)
    yield TrialStep(
        input_ids=second[SECOND_HEAD:],
        positions=tail.to(model.device),
        slots=(tail + 2 * TRIAL_BLOCK).to(model.device),
        query_start=[0, SECOND_TAIL],
        seq_lens=[SECOND_HEAD + SECOND_TAIL],
        block_tables=[[2]],
    )


def layers_logits(model: PreTrainedModel, bridge: AttentionBridge) -> torch.Tensor:
    """Logits of the trial's tokens from the layers themselves, ``[tokens, vocab_size]``."""
    target = bridge.target = DenseTarget()
    with contextlib.ExitStack() as after:
        after.callback(setattr, bridge, "target", None)
        return torch.cat(list(packed_logits(model, target)))


def check_logits(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> float:
    """Compare logits; return the ratio of the difference's norm to the logits' norm.

    Raises:
        NotRecognisedError: it is not less than the tolerance.
    """
    expected, found = expected.float(), found.float()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error < tolerance:
        raise NotRecognisedError(f"the logits differ from the layers' own by {error:.3g} of their size")
    return error
