"""Makes a token's bits independent of the step's other tokens, and checks that they are.

Where a result depends on the number of rows, it is because a routine picks another order of summation or another
formula for them. Measured with torch 2.13 on a processor with AVX2, in float32 on one to four threads:

- oneDNN's packed product (``folo_hf.passes``) gives a row the same bits for any number of rows;
- ``torch.nn.functional.linear`` (MKL) does so for multiples of 16 rows, and not below 12;
- ``silu``, ``sigmoid``, ``gelu`` and ``softplus`` compute the last few elements of a tensor, or of a thread's share of
  it, by another formula than the rest, so that a bit depends on its place; ``exp``, ``tanh`` and ``erf`` do not;
- norms, softmax, sums over the last dimension, sine and cosine keep their bits.

So linears are packed, activations are written with ``exp`` and its like, and what no pass can reach (the weights of
experts, of routers) runs under ``SteadyRows``. What a model does beyond that is found out by ``settle``: it runs the
model with several numbers of rows, and refuses it if a bit differs.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import activations

from folo_core.errors import UnsupportedModelError
from folo_hf.probe import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from folo_hf.attention import AttentionBridge, AttentionCall

ROWS = 16
"""``SteadyRows`` pads the rows of a linear layer to a multiple of this."""

TRIED = 64
"""Rows that the check compares with: enough for a step that is split over threads."""

COUNTS = (1, 2, 3, 5, 8, 13, 17, 33)
"""Numbers of rows that the check tries."""


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``1 / (1 + exp(-x))``, elementwise."""
    return torch.neg(x).exp_().add_(1).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x / (1 + exp(-x))``, elementwise."""
    return x / torch.neg(x).exp_().add_(1)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``x * Phi(x)``, elementwise, or its approximation by ``tanh``."""
    if approximate == "tanh":
        inner = (x * x * x).mul_(0.044715).add_(x).mul_(math.sqrt(2 / math.pi))
        return inner.tanh_().add_(1).mul_(x).mul_(0.5)
    return torch.erf(x * math.sqrt(0.5)).add_(1).mul_(x).mul_(0.5)


def padded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, of a number of rows that is a multiple of ``ROWS``."""
    rows = x.reshape(-1, x.shape[-1])
    padded = functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
    return functional.linear(padded, weight, bias)[: len(rows)].view(*x.shape[:-1], weight.shape[0])


class SteadyActivation(nn.Module):
    """An activation written with functions that compute every element alike."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise, ``[...] -> [...]``."""
        return self._function(x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, "tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / torch.mul(x, -1.702).exp_().add_(1)


STEADY: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    nn.SiLU: silu,
    nn.Sigmoid: sigmoid,
    activations.SiLUActivation: silu,
    activations.GELUActivation: gelu,
    activations.GELUTanh: _gelu_tanh,
    activations.QuickGELUActivation: _quick_gelu,
}
"""Activation modules and what stands for them."""


class SteadyActivations:
    """A pass (``folo_hf.passes``) that replaces activations of which a bit depends on its place in the tensor."""

    name = "steady-activations"

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """On a CPU; the exponential of a wide negative half-precision number overflows."""
        return device == "cpu" and dtype == torch.float32

    def run(self, model: nn.Module) -> int:
        """Replace every activation module that is in ``STEADY``; return how many."""
        replaced = 0
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                kind = type(child)
                if kind is nn.GELU:
                    setattr(parent, name, SteadyActivation(_gelu_tanh if child.approximate == "tanh" else gelu))
                elif kind in STEADY:
                    setattr(parent, name, SteadyActivation(STEADY[kind]))
                else:
                    continue
                replaced += 1
        return replaced


class EagerExperts:
    """A pass that has experts work one after another: the other ways multiply the rows of all of them in one call."""

    name = "eager-experts"

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """Wherever rows shall keep their bits."""
        return True

    def run(self, model: nn.Module) -> int:
        """Tell the model, which ignores it if it has no experts."""
        chosen: Any = model  # a transformers module
        chosen.set_experts_implementation("eager")
        return 1


STEADY_PASSES = (SteadyActivations(), EagerExperts())
"""What runs after the other passes where a token's bits must be its own."""


def _silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # noqa: ARG001, FBT001, FBT002 (torch's signature)
    return silu(x)


STEADY_CALLS: dict[Any, Callable[..., torch.Tensor]] = {
    functional.linear: padded_linear,
    functional.silu: _silu,
    functional.gelu: gelu,
    torch.sigmoid: sigmoid,
    torch.Tensor.sigmoid: sigmoid,
}
"""Functions of torch and what stands for them within ``SteadyRows``."""


class SteadyRows(TorchFunctionMode):
    """Within it, functions that no pass reaches give a row the same bits for any number of rows.

    It costs a call of Python for every function of torch, which only models that need it should pay.
    """

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 (torch's signature)
        types: Any,  # noqa: ANN401 (likewise)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (likewise)
        """Call what stands for the function, outside the mode."""
        return STEADY_CALLS.get(func, func)(*args, **(kwargs or {}))


class _Echo:
    """Stands for attention in the check: mixes a row's own query, key and value, and nothing else."""

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor:
        """``value``, of a size that depends on every element of query and key."""
        groups = query.shape[1] // key.shape[1]
        sizes = query.sum(-1, keepdim=True) + key.sum(-1, keepdim=True).repeat_interleave(groups, 1)
        return torch.tanh(sizes) * value.repeat_interleave(groups, 1)


Guard = type[contextlib.AbstractContextManager[Any]]
"""Made anew around every forward pass."""


def settle(model: PreTrainedModel, bridge: AttentionBridge) -> Guard:
    """Find what a forward pass must run under for each token's bits to be its own.

    Raises:
        UnsupportedModelError: nothing makes them so; names the architecture.
    """
    bridge.target, threads = _Echo(), torch.get_num_threads()
    try:
        found = "?"
        for guard in (contextlib.nullcontext, SteadyRows):
            found = next(_differences(model, guard, threads), "")
            if not found:
                return guard
    finally:
        bridge.target = None
        torch.set_num_threads(threads)
    raise UnsupportedModelError(
        f"deterministic: True: {type(model).__name__} gives a token other bits {found}: leave deterministic off"
    )


def _differences(model: PreTrainedModel, guard: Guard, threads: int) -> Iterator[str]:
    """Where logits of the check's tokens differ from those of all of them at once on one thread."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = ((torch.arange(TRIED) * 7919 + 11) % size).to(model.device)
    positions = torch.arange(TRIED, device=model.device)
    wanted = None
    for number in sorted({1, threads}):
        torch.set_num_threads(number)
        for count in (TRIED, *COUNTS):
            rows = slice((TRIED - count) // 2, (TRIED - count) // 2 + count)
            with guard():
                logits = run(model, ids[rows], positions[rows])
            wanted = logits if wanted is None else wanted
            if not torch.equal(logits, wanted[rows]):
                yield f"in a step of {count} tokens on {number} threads than in one of {TRIED}"
