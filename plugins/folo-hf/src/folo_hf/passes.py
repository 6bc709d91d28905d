"""Passes over a loaded module that make it faster and leave its results as they were.

A pass replaces submodules in place. It runs after the weights are loaded and before the probe
(``folo_hf.probe``) judges the model, so that what is judged is what will run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that are applied to the same input one after another."""

BATCH_HINT = 32
"""Rows that packed weights are laid out for; with it, a row's result is the same bits whatever the number of rows."""


class Pass(Protocol):
    """One improvement of a module."""

    name: str

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """Whether the pass pays there."""

    def run(self, model: nn.Module) -> int:
        """Change the model in place; return the number of submodules replaced."""


class PackLinears:
    """Linear layers with weights in oneDNN's blocked layout, and siblings that share an input as one product.

    On a two-core AVX2 processor in float32, the packed product was 1.0 to 4.2 times as fast as
    ``torch.nn.functional.linear`` from four rows on, and 0.4 to 0.8 times as fast for a single row.
    Its rows do not depend on how many there are, which the plain product's do.
    """

    name = "pack-linears"

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """On a CPU in float32; packed bfloat16 is slower than float32 where the processor has no bfloat16 units."""
        return device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def run(self, model: nn.Module) -> int:
        """Pack every plain linear layer. A tied head gets a copy of its own: the embedding needs the plain weights."""
        replaced = 0
        for parent in list(model.modules()):
            for names in FUSED:
                replaced += fuse(parent, names, _pack_together)
            for name, child in list(parent.named_children()):
                found = plain(child)
                if found is not None:
                    setattr(parent, name, PackedLinear(*found))
                    replaced += 1
        return replaced


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with the weight packed."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), BATCH_HINT)  # noqa: SLF001 (no public way)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight ``[out, in]``, unpacked anew: for code that looks at it, not for computing with."""
        plain: torch.Tensor = self._packed.to_dense()
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        # Opaque to torch's own bookkeeping, but an operator of plain torch: what its compiler emits for linears.
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # noqa: SLF001
        return product


class SharedProduct:
    """One product whose pieces are the results of several linears applied to the same input.

    Args:
        linear: all of them as one layer, their outputs side by side.
        sizes: outputs of each.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        self.linear = linear
        self._sizes = list(sizes)
        self._input: torch.Tensor | None = None
        self._pieces: dict[int, torch.Tensor] = {}

    def piece(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The linear's result for ``x``; computed for all of them when the first of them is asked for."""
        if self._input is not x or index not in self._pieces:
            self._input = x
            self._pieces = dict(enumerate(self.linear(x).split(self._sizes, dim=-1)))
        piece = self._pieces.pop(index)
        if not self._pieces:
            self._input = None
        return piece


class FusedPart(nn.Module):
    """One of the linears of a shared product, in its old place."""

    def __init__(self, shared: SharedProduct, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shared, self._index = shared, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``; a view of the shared product."""
        return self.shared.piece(self._index, x)


class FuseLinears:
    """Siblings that share an input as one plain product: one reading of the input, one kernel instead of two or three.

    Their weights are copied into one tensor, parent after parent, and the old ones are let go.
    """

    name = "fuse-linears"

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """On a CUDA device; elsewhere packing does it."""
        return device.startswith("cuda")

    def run(self, model: nn.Module) -> int:
        """Join what can be."""
        replaced = sum(fuse(parent, names, _join) for parent in list(model.modules()) for names in FUSED)
        if torch.cuda.is_initialized():
            # Old weights lie in pieces that nothing else may fit into: back to the device with them.
            torch.cuda.empty_cache()
        return replaced


PASSES: tuple[Pass, ...] = (PackLinears(), FuseLinears())


def run_passes(model: nn.Module, device: str, dtype: torch.dtype, passes: Sequence[Pass] = PASSES) -> list[str]:
    """Run the passes that apply; return the names of those that changed something."""
    return [each.name for each in passes if each.applies(device, dtype) and each.run(model)]


def plain(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """A linear layer's weight ``[out, in]`` and bias; None if it is no linear layer, or one that does more."""
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 (no public way to ask)
        return None
    # Exact types, since a subclass may compute something else.
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if type(module) is Conv1D:
        conv: Any = module  # transformers leaves it untyped
        return conv.weight.t(), conv.bias
    return None


def _pack_together(linears: Sequence[nn.Linear]) -> SharedProduct:
    return SharedProduct(PackedLinear(*_side_by_side(linears)), [linear.out_features for linear in linears])


def _join(linears: Sequence[nn.Linear]) -> SharedProduct:
    weight, bias = _side_by_side(linears)
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return SharedProduct(joined, [linear.out_features for linear in linears])


def _side_by_side(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return torch.cat([linear.weight.detach() for linear in linears]), torch.cat(biases) if biases else None


def shared_linear(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """Return the one layer that computes these children, if one does."""
    children: list[Any] = [getattr(parent, name, None) for name in names]
    if not all(isinstance(child, FusedPart) for child in children):
        return None
    products = {id(child.shared): child.shared for child in children}
    return next(iter(products.values())).linear if len(products) == 1 else None


def fuse(parent: nn.Module, names: Sequence[str], share: Callable[[Sequence[nn.Linear]], SharedProduct]) -> int:
    """Replace these children, if they are plain linears of one input, by the pieces of one product; count them."""
    linears = list(_siblings(parent, names))
    if len(linears) != len(names):
        return 0
    if len({linear.in_features for linear in linears}) > 1 or len({linear.bias is None for linear in linears}) > 1:
        return 0
    shared = share(linears)
    for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
        setattr(parent, name, FusedPart(shared, index, linear))
    return len(names)


def _siblings(parent: nn.Module, names: Sequence[str]) -> Iterator[nn.Linear]:
    for name in names:
        child = getattr(parent, name, None)
        if type(child) is nn.Linear and plain(child) is not None:
            yield child
