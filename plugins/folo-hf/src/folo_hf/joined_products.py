"""A decoder layer's products on a CUDA device, joined with the norms, sums and activations around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from folo_hf.device_layers import DeviceLayer, Linear
    from folo_kernels.gpu.product_configs import Part, ProductConfig
    from folo_kernels.gpu.products import Rotation, ScaledRows

ALIGNMENT = 16
"""Bytes that a weight's place must be a multiple of to be read by tensor descriptors."""


@attrs.define(slots=True, eq=False)
class JoinedProducts:
    """A layer's products, each joined with what surrounds it where that was measured as faster, else torch's own."""

    config_for: Callable[[Part, int, int, int], ProductConfig | None]
    """See ``folo_kernels.gpu.product_configs.config_for``."""
    pdl_rows: range
    """Numbers of rows of steps in which each joined product is launched while its predecessor still runs."""
    most_rows: int
    """Rows of the largest step in which any product is joined."""
    _counters: torch.Tensor
    _kernels: ModuleType
    _products: ModuleType
    only_captured: bool = True
    """Whether other steps go without: their launches make tensor descriptors, which takes the host longer than it
    spares the device."""
    pdl: bool = False
    """Whether the present step is such a one."""

    @classmethod
    def make(cls, device: torch.device, hidden: int) -> JoinedProducts:
        """As measured for a model of this hidden size."""
        from folo_kernels.gpu import layers, products
        from folo_kernels.gpu.product_configs import MOST_ROWS, OVERLAPPED, config_for

        overlapped = OVERLAPPED.get(hidden, range(0))
        return cls(config_for, overlapped, MOST_ROWS, products.new_counters(device), layers, products)

    def serves(self, rows: int, *, is_captured: bool) -> bool:
        """Whether a step of so many rows is to be run with joined products."""
        return rows <= self.most_rows and (is_captured or not self.only_captured)

    @property
    def rotation(self) -> type[Rotation]:
        """What :meth:`rotate` is told."""
        kind: type[Rotation] = self._products.Rotation
        return kind

    def configs(
        self, layer: DeviceLayer, rotation: Rotation, scales: tuple[float, float], rows: int
    ) -> dict[Part, ProductConfig | None]:
        """How each of a layer's products is cut up, None where it is torch's."""
        linears: dict[Part, Linear] = {
            "rotated": layer.qkv,
            "qkv": layer.qkv,
            "out": layer.out,
            "gate_up": layer.gate_up,
            "down": layer.down,
        }
        found = {
            part: None if linear.weight.data_ptr() % ALIGNMENT else self.config_for(part, rows, *linear.weight.shape)
            for part, linear in linears.items()
        }
        config, weight, keys = found["rotated"], layer.qkv.weight, rotation.keys
        fits = config and scales == (1, 1) and self._products.rotates(weight, rotation.cosines.shape[1], keys, config)
        return found if fits else {**found, "rotated": None}

    def rotate(
        self, x: torch.Tensor | ScaledRows, linear: Linear, rotation: Rotation, config: ProductConfig
    ) -> torch.Tensor:
        """Queries ``[rows, heads, size]``; keys and values are written into their blocks."""
        query: torch.Tensor = self._products.rotated_product(
            x, linear.weight, rotation, config, self._counters, pdl=self.pdl
        )
        return query

    def multiply(self, x: torch.Tensor | ScaledRows, linear: Linear, config: ProductConfig | None) -> torch.Tensor:
        """``x W^T``."""
        if config is None:
            return functional.linear(self.normed(x), linear.weight)
        product: torch.Tensor = self._products.multiply(x, linear.weight, config, self._counters, pdl=self.pdl)
        return product

    def feed(self, x: torch.Tensor | ScaledRows, layer: DeviceLayer, config: ProductConfig | None) -> torch.Tensor:
        """``activation(gate) * value``."""
        if config is None:
            product = functional.linear(self.normed(x), layer.gate_up.weight)
            fed: torch.Tensor = self._kernels.gated(product, layer.activation, pdl=self.pdl)
        else:
            fed = self._products.gated_product(
                x, layer.gate_up.weight, layer.activation, config, self._counters, pdl=self.pdl
            )
        return fed

    def add(  # noqa: PLR0913 (the sum's parts and how to compute it)
        self,
        x: torch.Tensor,
        linear: Linear,
        residual: torch.Tensor,
        norm: tuple[torch.Tensor, float],
        config: ProductConfig | None,
        *,
        following: ProductConfig | None,
    ) -> torch.Tensor | ScaledRows:
        """Add ``x W^T`` to the residual stream; its norm, as the product that follows wants it."""
        weight, pdl = linear.weight, self.pdl
        found: torch.Tensor | ScaledRows
        if config is None:
            found, _ = self._kernels.add_norm(functional.linear(x, weight), residual, *norm, pdl=pdl)
        elif following is None:
            self._products.add_product(x, weight, residual, config, self._counters, pdl=pdl)
            found = self._kernels.norm(residual, *norm, pdl=pdl)
        else:
            found = self._products.add_product_and_scale(x, weight, residual, *norm, config, self._counters, pdl=pdl)
        return found

    @staticmethod
    def normed(x: torch.Tensor | ScaledRows) -> torch.Tensor:
        """Rows for who does not divide them; :meth:`add` leaves them so."""
        if not isinstance(x, torch.Tensor):
            raise TypeError("x: rows yet to be divided: add() them for a product that follows as torch's own")
        return x
