"""Packed weights, plain or quantised, and their product with rows of activations."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from folo_kernels import library as native
from folo_kernels.pages import huge

if TYPE_CHECKING:
    from collections.abc import Sequence


class Format(IntEnum):
    """How weights are stored. See native/quantised.hpp."""

    FLOAT32 = 0
    INT8 = 1
    """8 bits and a float32 scale for each 32 weights of an output: 9 bits a weight."""
    INT4 = 2
    """4 bits and a float16 scale and minimum for each 32 weights of an output: 5 bits a weight."""


class Epilogue(IntEnum):
    """What becomes of a product."""

    STORE = 0
    ADD = 1
    SILU_GATE = 2
    GELU_TANH_GATE = 3


GATES = frozenset({Epilogue.SILU_GATE, Epilogue.GELU_TANH_GATE})

MOST_PARTS = 4
"""As many as ``Source`` of native/packing.hpp holds."""


@attrs.frozen(slots=True)
class Plain:
    """A linear layer's float32 weight ``[outputs, inputs]`` and bias ``[outputs]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class PackedMatrix:
    """Weights of one or more linear layers that are applied to the same input, packed for the kernels.

    Args:
        parts: layers whose outputs lie side by side; at most four.
        weight_format: how to store them.
        gated: two parts of one size are the gate and the values of a gated feed-forward: the product is
            ``activation(gate) * value``, and :meth:`multiply` must be given such an epilogue.

    Raises:
        ValueError: the parts differ in dtype, device or inputs, there are too many, or they are no gate and its values.
    """

    def __init__(self, parts: Sequence[Plain], weight_format: Format = Format.FLOAT32, *, gated: bool = False) -> None:
        _check(parts, gated=gated)
        self._library = native.load()
        self.outputs = sum(part.weight.shape[0] for part in parts)
        self.inputs = parts[0].weight.shape[1]
        self.sizes = [part.weight.shape[0] for part in parts]
        self.format = weight_format
        self.gated = gated
        panel = 2 * self._library.vector_lanes
        columns = 2 * _round_up(self.sizes[0], panel // 2) if gated else _round_up(self.outputs, panel)
        panel_bytes = self._library.panel_bytes(self.inputs, weight_format)
        self._panels = huge(columns // panel * panel_bytes)
        has_bias = any(part.bias is not None for part in parts)
        self._bias = np.zeros(columns, dtype=np.float32) if has_bias else None
        self.native = native.Matrix(
            panels=self._panels.ctypes.data,
            bias=None if self._bias is None else self._bias.ctypes.data,
            panel_bytes=panel_bytes,
            outputs=self.outputs,
            inputs=self.inputs,
            num_panels=columns // panel,
            format=weight_format,
        )
        self._pack(parts)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return int(self._panels.nbytes)

    def multiply(self, x: torch.Tensor, epilogue: Epilogue = Epilogue.STORE) -> torch.Tensor:
        """``x W^T + bias``: float32 ``[..., inputs] -> [..., outputs]``, half as many outputs if gated.

        Raises:
            ValueError: the kernels would read or write beyond what they are given.
        """
        if x.shape[-1] != self.inputs or x.dtype != torch.float32:
            raise ValueError(f"x: {tuple(x.shape)} {x.dtype}: give rows of {self.inputs} inputs in float32")
        if epilogue == Epilogue.ADD or (epilogue in GATES) != self.gated:
            raise ValueError(f"epilogue: {epilogue.name}: give {'a gate' if self.gated else 'STORE'} for this matrix")
        rows = x.reshape(-1, self.inputs)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        width = self.outputs // 2 if self.gated else self.outputs
        y = x.new_empty(*x.shape[:-1], width)
        if rows.shape[0]:
            product = native.Product(
                rows.data_ptr(),
                rows.stride(0),
                rows.shape[0],
                ctypes.pointer(self.native),
                y.data_ptr(),
                width,
                epilogue,
            )
            self._library.multiply(ctypes.byref(product))
        return y

    def plain(self) -> list[torch.Tensor]:
        """Each part's weight ``[outputs, inputs]``, as it is stored: after rounding, if quantised."""
        lanes = self._library.vector_lanes
        flat = torch.empty(self.native.num_panels * 2 * lanes, self.inputs)
        self._library.unpack(ctypes.byref(self.native), flat.data_ptr())
        if self.gated:
            turns = flat.view(-1, 2, lanes, self.inputs)
            return [turns[:, part].reshape(-1, self.inputs)[: self.sizes[0]] for part in range(2)]
        return list(flat[: self.outputs].split(self.sizes))

    def _pack(self, parts: Sequence[Plain]) -> None:
        weights = [part.weight.detach().contiguous() for part in parts]
        biases = [None if part.bias is None else part.bias.detach().contiguous() for part in parts]
        source = native.Source(count=len(parts), gated=self.gated)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            source.weights[index] = weight.data_ptr()
            source.biases[index] = None if bias is None else bias.data_ptr()
            source.outputs[index] = weight.shape[0]
        bias_out = None if self._bias is None else self._bias.ctypes.data
        self._library.pack(ctypes.byref(source), ctypes.byref(self.native), self._panels.ctypes.data, bias_out)


def _check(parts: Sequence[Plain], *, gated: bool) -> None:
    sizes = [part.weight.shape[0] for part in parts]
    if not 1 <= len(parts) <= MOST_PARTS:
        raise ValueError(f"parts: {len(parts)}: give 1 to {MOST_PARTS}")
    if gated and (len(parts) != 2 or sizes[0] != sizes[1]):  # noqa: PLR2004 (a gate and its values)
        raise ValueError(f"parts: sizes {sizes}: give a gate and values of one size")
    for part in parts:
        for tensor in (part.weight, part.bias):
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
                raise ValueError(f"weight: {tensor.dtype} on {tensor.device}: give float32 on the CPU")
        if part.weight.shape[1] != parts[0].weight.shape[1]:
            raise ValueError(f"weight: {tuple(part.weight.shape)}: parts of one product share their input")


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
