"""Linear layers and gated feed-forwards through Folo's CPU kernels (``folo_kernels``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from folo_core.errors import ConfigError, UnsupportedModelError
from folo_hf.low_bit import low_bit_linears
from folo_hf.passes import FusedPart, PackedLinear, SharedProduct, fuse, plain, shared_linear
from folo_hf.stack import activation_of
from folo_kernels.library import settled, why_not
from folo_kernels.matrix import Epilogue, Format, PackedMatrix, Plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

GATES: dict[Epilogue, Callable[[torch.Tensor], torch.Tensor]] = {
    Epilogue.SILU_GATE: functional.silu,
    Epilogue.GELU_TANH_GATE: lambda x: functional.gelu(x, approximate="tanh"),
}
"""Activations that the kernels know."""

NATIVE_FORMATS = ("int8", "int4")
"""Values of ``quantization`` that the kernels know."""

MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


class NativeLinears:
    """Every linear layer packed for the kernels: siblings that share an input, and gated feed-forwards, as one.

    Args:
        weights: how to store them. The head, whose errors go straight into the logits, is stored in 8 bits at least.
    """

    name = "native-linears"

    def __init__(self, weights: Format = Format.FLOAT32) -> None:
        self._format = weights
        self._gates: dict[str, Epilogue | None] = {}

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """On a CPU in float32, where the kernels were compiled."""
        return device == "cpu" and dtype == torch.float32 and why_not() is None

    def run(self, model: nn.Module) -> int:
        """Replace what can be; a tied head gets a copy of its own, since the embedding needs the plain weights."""
        settled()
        replaced = 0
        self._gates.clear()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        gone: set[nn.Module] = set()
        for parent in list(model.modules()):
            if parent in gone:
                continue  # a replaced feed-forward's linears are packed already
            replaced += fuse(parent, ("q_proj", "k_proj", "v_proj"), self._share)
            for name, child in list(parent.named_children()):
                new = self._replacement(child, is_head=child is head)
                if new is not None:
                    setattr(parent, name, new)
                    gone.add(child)
                    replaced += 1
        return replaced

    def _replacement(self, child: nn.Module, *, is_head: bool) -> nn.Module | None:
        gate = self._gate_of(child)
        if gate is not None:
            return NativeMlp(child, gate, self._format)
        found = plain(child)
        if found is None:
            return None
        rounded = Format.INT8 if is_head and self._format == Format.INT4 else self._format
        return NativeLinear(PackedMatrix([Plain(*found)], rounded))

    def _gate_of(self, child: nn.Module) -> Epilogue | None:
        """What ``gate_of`` says of the first module that is made alike: reading the weights of each takes seconds."""
        if not _has_parts(child):
            return None
        settings = {name: value for name, value in vars(child).items() if isinstance(value, (str, int, float))}
        alike = f"{id(type(child))} {child} {settings}"
        if alike not in self._gates:
            self._gates[alike] = gate_of(child)
        return self._gates[alike]

    def _share(self, linears: Sequence[nn.Linear]) -> SharedProduct:
        matrix = PackedMatrix([Plain(linear.weight, linear.bias) for linear in linears], self._format)
        return SharedProduct(NativeLinear(matrix), matrix.sizes)


class NativeLinear(nn.Module):
    """``x @ weight.T + bias``."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.inputs, matrix.outputs

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight ``[out, in]``, unpacked anew: for code that looks at it, not for computing with."""
        return self.matrix.plain()[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        return self.matrix.multiply(x)


class NativeMlp(nn.Module):
    """``down(activation(gate(x)) * up(x))`` as two products, the activation within the first."""

    def __init__(self, mlp: nn.Module, gate: Epilogue, weights: Format) -> None:
        super().__init__()
        gate_proj, up_proj, down_proj = (getattr(mlp, name) for name in MLP_PARTS)
        self.gate = gate
        self.gate_up = PackedMatrix(
            [Plain(linear.weight, linear.bias) for linear in (gate_proj, up_proj)], weights, gated=True
        )
        self.down = PackedMatrix([Plain(down_proj.weight, down_proj.bias)], weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., hidden]``."""
        return self.down.multiply(self.gate_up.multiply(x, self.gate))


def weight_format(quantization: str | None, device: str, dtype: str, *, deterministic: bool) -> Format:
    """How a configuration wants its weights stored.

    Raises:
        ConfigError: they are to be quantised, and cannot be: the message says why, and what to give instead.
    """
    if quantization is None:
        return Format.FLOAT32
    reason = mend = None
    if deterministic:
        reason, mend = "is not among what deterministic=True promises the same bits for", "give one of the two up"
    elif quantization not in NATIVE_FORMATS:
        reason, mend = "takes a CUDA device of compute capability 8.9 or more", "give 'int8' or 'int4' on a CPU"
    elif device != "cpu" or dtype != "float32":
        reason = f"the model is to run in {dtype} on {device}, and on a CPU only float32 computes with rounded weights"
        mend = 'give device="cpu" and dtype="float32" (or "auto"), or leave quantization out'
    elif (missing := why_not()) is not None:
        reason, mend = f"takes folo_kernels, which cannot be used here: {missing}", "or leave quantization out"
    if reason is not None:
        raise ConfigError(f"model.quantization: {quantization!r}: {reason}; {mend}")
    return Format[quantization.upper()]


def check_quantised(model: nn.Module, quantization: str | None) -> None:
    """Refuse a model most of whose products read weights that were not rounded, such as stacked experts.

    Raises:
        UnsupportedModelError: it is one.
    """
    if quantization is None:
        return
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    plain_weights = sum(each.numel() for each in model.parameters() if id(each) not in embeddings)
    rounded = sum(matrix.outputs * matrix.inputs for matrix in packed_matrices(model))
    rounded += sum(layer.out_features * layer.in_features for layer in low_bit_linears(model))
    if rounded <= plain_weights:
        raise UnsupportedModelError(
            f"model.quantization: {quantization!r}: of {type(model).__name__}, {plain_weights} weights are in no "
            f"linear layer that can be rounded, and only {rounded} are: leave quantization out"
        )


def packed_matrices(model: nn.Module) -> Iterator[PackedMatrix]:
    """Every matrix that the kernels multiply by, once each, in the order of the model's modules."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, NativeMlp):
            yield from (module.gate_up, module.down)
        elif isinstance(module, NativeLinear):
            yield module.matrix
        elif isinstance(module, FusedPart) and isinstance(module.shared.linear, NativeLinear):
            if id(module.shared) not in seen:
                yield module.shared.linear.matrix
            seen.add(id(module.shared))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are stored."""
    plain_bytes = sum(parameter.nbytes for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    linears += [product.linear for product in _products(model) if isinstance(product.linear, PackedLinear)]
    packed = sum(4 * linear.in_features * linear.out_features for linear in linears)
    joined = [product.linear for product in _products(model) if type(product.linear) is nn.Linear]
    plain_bytes += sum(parameter.nbytes for linear in joined for parameter in linear.parameters())
    low_bit = sum(layer.low_bit.nbytes for layer in low_bit_linears(model))
    return plain_bytes + packed + low_bit + sum(matrix.nbytes for matrix in packed_matrices(model))


def _products(model: nn.Module) -> list[SharedProduct]:
    found = {id(part.shared): part.shared for part in model.modules() if isinstance(part, FusedPart)}
    return list(found.values())


def shared_matrix(parent: nn.Module, names: Sequence[str]) -> PackedMatrix | None:
    """Return the matrix that these children share, if they share one natively."""
    linear = shared_linear(parent, names)
    return linear.matrix if isinstance(linear, NativeLinear) else None


def _has_parts(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 (no public way to ask)
        return False
    linears = [getattr(module, name, None) for name in MLP_PARTS]
    others = set(dict(module.named_children())) - {*MLP_PARTS, "act_fn"}
    return not others and all(each is not None and plain(each) is not None for each in linears)


@torch.no_grad()
def gate_of(module: nn.Module) -> Epilogue | None:
    """Return the activation of a gated feed-forward that the kernels can compute; None if the module is none.

    It is recognised by the names of its parts. Then its activation must be one that the kernels have, on its own, where
    forms that differ in the fourth digit are told apart; and the module must give what the formula gives.
    """
    if not _has_parts(module):
        return None
    linears: list[Any] = [getattr(module, name) for name in MLP_PARTS]
    gate, up, down = linears
    if type(gate) is not nn.Linear or gate.weight.shape != up.weight.shape:
        return None
    epilogue = activation_of(getattr(module, "act_fn", None), GATES)
    if epilogue is None:
        return None
    x = torch.linspace(-3, 3, 2 * gate.in_features, dtype=gate.weight.dtype).view(2, -1).sin_()
    formula = down(GATES[epilogue](gate(x)) * up(x))
    return epilogue if torch.allclose(formula, module(x), rtol=1e-4, atol=1e-5) else None
