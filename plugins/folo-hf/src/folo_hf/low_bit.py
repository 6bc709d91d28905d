"""Linear layers with weights of fewer bits on CUDA devices: float8 and 4-bit integers.

Both use operators of torch itself, those that torchao's weights use as well, without a tensor subclass between: a
captured step launches the same kernels, and a step that is not captured spares the host the dispatch.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from torch import nn
from torch.nn import functional

from folo_core.errors import ConfigError
from folo_hf.passes import FusedPart, SharedProduct, fuse, plain
from folo_hf.tinygemm import tile_depth, tile_order, unpack_codes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from folo_hf.device import HardwareProbe

FORMATS = ("fp8", "int4")

CAPABILITY = {"fp8": (8, 9), "int4": (8, 0)}
"""First CUDA compute capability that multiplies a format: Ada and Hopper have float8 units, Ampere bfloat16's."""

DTYPES = ("bfloat16",)
"""What activations may be: torch's kernels for both formats give nothing else."""

GROUP = 32
"""Weights of an output that share a step and a minimum, in 4 bits: those that GGUF's Q4_0 and Q4_1 round together."""

FEW_ROWS = 64
"""Rows up to which 4-bit weights are multiplied as they are. For more, which compute longer than they read, they are
unpacked first."""

LARGEST = 448.0
"""Of float8 e4m3."""

WIDENED_AT_ONCE = 4096
"""Outputs whose weights are widened at a time, so that a head's take little room."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


_rounds_rows = contextvars.ContextVar("rounds_rows", default=True)


@contextlib.contextmanager
def rows_as_they_are() -> Iterator[None]:
    """Within it float8 weights multiply rows that are not rounded, slowly.

    Two ways to compute a model can then be compared: rounded, a last bit of a row becomes a sixteenth now and then,
    and layer after layer that grows into more than a fault would show.
    """
    before = _rounds_rows.set(False)
    try:
        yield
    finally:
        _rounds_rows.reset(before)


class LowBit(Protocol):
    """A weight matrix that multiplies rows."""

    @property
    def in_features(self) -> int:
        """Inputs."""

    @property
    def out_features(self) -> int:
        """Outputs."""

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``: ``[..., in] -> [..., out]``, in ``x``'s dtype."""

    def plain(self) -> torch.Tensor:
        """The rounded weight ``[out, in]``, in the dtype it came in or in bfloat16."""


def quantise(weight: torch.Tensor, format: str) -> LowBit:  # noqa: A002 (what it is)
    """Round a weight ``[out, in]`` on its own device; ``format`` is ``fp8`` or ``int4``.

    Raises:
        ConfigError: the format's kernels do not take its shape.
    """
    reason = why_not(tuple(weight.shape), format)
    if reason is not None:
        raise ConfigError(f"model.quantization: {format!r}: a weight {list(weight.shape)}: {reason}")
    return Fp8.of(weight) if format == "fp8" else Int4.of(weight)


def why_not(shape: tuple[int, ...], format: str) -> str | None:  # noqa: A002 (as above)
    """Why a weight of this shape ``(out, in)`` cannot be stored in a format; None if it can."""
    outputs, inputs = shape
    steps = (16, 16) if format == "fp8" else (8, GROUP)
    if outputs % steps[0] or inputs % steps[1]:
        return f"its outputs must be a multiple of {steps[0]} and its inputs one of {steps[1]}"
    return None


@attrs.frozen(slots=True, eq=False)
class Fp8:
    """Float8 (e4m3) with a scale for each output; rows are rounded to float8 as they come."""

    data: torch.Tensor
    """``[out, in]``, float8."""
    scale: torch.Tensor
    """``[1, out]``, float32."""
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8:
        """Round each output's weights to the scale of the largest of them."""
        data, scale = rounded_rows(weight.detach())
        return cls(data, scale.t().contiguous(), weight.dtype)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.data.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""
        return self.data.nbytes + self.scale.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        if not _rounds_rows.get():
            return self._widened(x)
        rows = x.reshape(-1, x.shape[-1])
        data, scale = _rounding(rows)
        product = torch._scaled_mm(  # noqa: SLF001 (torch has no other name for it)
            data, self.data.t(), scale, self.scale, out_dtype=x.dtype, use_fast_accum=x.is_cuda
        )
        return product.reshape(*x.shape[:-1], self.out_features)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        pieces = zip(self.data.split(WIDENED_AT_ONCE), self.scale.t().split(WIDENED_AT_ONCE), strict=True)
        return torch.cat([functional.linear(x, (data.float() * scale).to(x.dtype)) for data, scale in pieces], -1)

    def plain(self) -> torch.Tensor:
        """The rounded weight ``[out, in]``."""
        return (self.data.float() * self.scale.t()).to(self.dtype)


@attrs.frozen(slots=True, eq=False)
class Int4:
    """Numbers from 0 to 15, and for each ``GROUP`` of an output's weights a step and a middle, in bfloat16."""

    packed: torch.Tensor
    """The numbers in the tiles of torch's kernel."""
    steps: torch.Tensor
    """``[in / GROUP, out, 2]``: a weight is ``(number - 8) * step + middle``."""
    in_features: int
    out_features: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int4:
        """Spread each group's 16 numbers evenly from its least weight to its greatest."""
        outputs, inputs = weight.shape
        groups = weight.detach().float().reshape(outputs, -1, GROUP)
        low = groups.amin(-1, keepdim=True)
        step = ((groups.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-9).to(torch.bfloat16)
        middle = (low + 8 * step.float()).to(torch.bfloat16)
        # Rounded with the numbers that will be computed with, so that their own rounding is made up for.
        codes = ((groups - middle.float()) / step.float() + 8).round_().clamp_(0, 15)
        steps = torch.cat([step, middle], -1).transpose(0, 1).contiguous()
        return cls(_pack(codes.reshape(outputs, inputs).to(torch.int32)), steps, inputs, outputs)

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""
        return self.packed.nbytes + self.steps.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if x.is_cuda and len(rows) > FEW_ROWS:
            return functional.linear(rows, self.plain()).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        multiply = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
        product: torch.Tensor = multiply(rows.contiguous(), self.packed, GROUP, self.steps)
        return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def plain(self) -> torch.Tensor:
        """The rounded weight ``[out, in]`` in bfloat16."""
        if self.packed.is_cuda:
            codes = unpack_codes(self.packed, self.out_features, self.in_features)
        else:
            # The layout on a CPU is that of the processor at hand: what it gives for unit rows tells the weight.
            unit = torch.eye(self.in_features, dtype=torch.bfloat16)
            return self(unit).t().contiguous()
        # Contiguous: torch would lay the sum out in the order of its first term.
        step, middle = self.steps.transpose(0, 1).contiguous().unbind(-1)
        groups = codes.reshape(self.out_features, -1, GROUP).to(torch.bfloat16) - 8
        return torch.addcmul(middle[..., None], groups, step[..., None]).reshape(self.out_features, self.in_features)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Lay int32 numbers ``[out, in]`` out for torch's kernel."""
    depth = tile_depth(codes.shape[1])
    if not codes.is_cuda:
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, depth)  # noqa: SLF001
        return packed
    tile_order(depth, codes.device)  # found out here, since a step that is being captured could not
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), depth)  # noqa: SLF001
    return packed  # noqa: RET504 (typed above)


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to float8; return it and float32 scales ``[rows, 1]``, of which ``x`` is about the product."""
    scale = (x.float().abs().amax(-1, keepdim=True) / LARGEST).clamp_min(1e-12)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _rounding(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations: on CUDA in one kernel, since a step of few rows would wait for five small ones."""
    if not rows.is_cuda or not _has_triton():
        return rounded_rows(rows)
    from folo_kernels.gpu.rounding_kernels import round_rows

    return round_rows(rows if rows.stride(-1) == 1 else rows.contiguous())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class LowBitLinear(nn.Module):
    """``x @ weight.T + bias`` with a rounded weight."""

    def __init__(self, low_bit: LowBit, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.low_bit = low_bit
        self.in_features, self.out_features = low_bit.in_features, low_bit.out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight ``[out, in]``, unpacked anew: for code that looks at it, not for computing with."""
        return self.low_bit.plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        product = self.low_bit(x)
        return product if self.bias is None else product + self.bias


class LowBitLinears:
    """Every linear layer of a model on CUDA rounded; siblings that share an input become one product.

    The head, whose errors go straight into the logits, is never stored in fewer than 8 bits: beside 4-bit layers it is
    in float8 where the device has that, else as it was. A layer whose shape the kernels do not take stays as it was.
    """

    name = "low-bit-linears"

    def __init__(self, quantization: str, capability: tuple[int, int]) -> None:
        self._format = quantization
        self._head = "fp8" if capability >= CAPABILITY["fp8"] else None

    def applies(self, device: str, dtype: torch.dtype) -> bool:
        """On CUDA."""
        return device.startswith("cuda") and str(dtype).removeprefix("torch.") in DTYPES

    def run(self, model: nn.Module) -> int:
        """Replace what can be; a tied head gets a copy of its own, since the embedding needs the plain weights."""
        replaced = 0
        head = getattr(model, "get_output_embeddings", lambda: None)()
        for parent in list(model.modules()):
            for names in FUSED:
                if self._takes_all(parent, names):
                    replaced += fuse(parent, names, self._share)
            for name, child in list(parent.named_children()):
                new = self._replacement(child, self._head if child is head else self._format)
                if new is not None:
                    setattr(parent, name, new)
                    replaced += 1
                elif isinstance(child, FusedPart) and isinstance(child.shared.linear, nn.Linear):
                    replaced += self._round_shared(child.shared)
        if torch.cuda.is_initialized():
            # Old weights lie in pieces that nothing else may fit into: back to the device with them.
            torch.cuda.empty_cache()
        return replaced

    def _takes_all(self, parent: nn.Module, names: Sequence[str]) -> bool:
        linears = [getattr(parent, name, None) for name in names]
        return all(isinstance(each, nn.Linear) and why_not(_shape(each), self._format) is None for each in linears)

    def _replacement(self, child: nn.Module, format: str | None) -> LowBitLinear | None:  # noqa: A002 (as above)
        found = plain(child)
        if found is None or format is None or why_not((found[0].shape[0], found[0].shape[1]), format) is not None:
            return None
        return LowBitLinear(quantise(found[0], format), found[1])

    def _share(self, linears: Sequence[nn.Linear]) -> SharedProduct:
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        together = LowBitLinear(quantise(weight, self._format), torch.cat(biases) if biases else None)
        return SharedProduct(together, [linear.out_features for linear in linears])

    def _round_shared(self, shared: SharedProduct) -> int:
        """Round a product that another pass made of several linears; count it once, for the first of its parts."""
        new = self._replacement(shared.linear, self._format)
        if new is None:
            return 0
        shared.linear = new
        return 1


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def low_bit_linears(model: nn.Module) -> Iterator[LowBitLinear]:
    """Every rounded layer, once each."""
    seen: set[int] = set()
    for module in model.modules():
        layer = module.shared.linear if isinstance(module, FusedPart) else module
        if isinstance(layer, LowBitLinear) and id(layer) not in seen:
            seen.add(id(layer))
            yield layer


def check_device(quantization: str, device: str, dtype: str, hardware: HardwareProbe) -> tuple[int, int]:
    """Check that a CUDA device computes with weights of this format; return its compute capability.

    Raises:
        ConfigError: it does not; the message says what it lacks, and what to give instead.
    """
    index = int(device.partition(":")[2] or 0)
    capability = hardware.cuda_capability(index)
    needed = CAPABILITY.get(quantization)
    reason = None
    if needed is None:
        reason = f"{quantization} weights are computed with on a CPU alone; on {device} give 'fp8' or 'int4'"
    elif capability < needed:
        have, want = (f"{major}.{minor}" for major, minor in (capability, needed))
        reason = f"{hardware.cuda_name(index)} has compute capability {have} and {quantization} needs {want}"
    elif dtype not in DTYPES:
        reason = f"activations in {dtype} on {device}: give dtype={' or '.join(map(repr, DTYPES))}"
    if reason is not None:
        raise ConfigError(f"model.quantization: {quantization!r}: {reason}, or leave quantization out")
    return capability
