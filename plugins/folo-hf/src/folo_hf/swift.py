"""Spares ``from_pretrained`` work that leaves nothing behind."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers import modeling_utils

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

INITIALISERS = ("uniform_", "normal_", "trunc_normal_", "constant_", "zeros_", "ones_", "kaiming_uniform_")
"""Functions of ``torch.nn.init`` that a layer's constructor calls."""

_MAPPING = "get_model_conversion_mapping"


@attrs.define
class LoadingReport:
    """What ``from_pretrained`` was seen to do."""

    conversions: list[Any] | None = None
    """How transformers would rename and merge a checkpoint's weights; None if it did not say."""

    def plain(self, names: Iterable[str]) -> bool:
        """Whether no weight of these names is renamed or merged; False where transformers does not let us know."""
        if self.conversions is None:
            return False
        matchers = [getattr(each, "_scoped_match", None) for each in self.conversions]
        if None in matchers:
            return False
        return not any(matches(name) is not None for name in names for matches in matchers if matches is not None)


@contextmanager
def swift_loading(*, plain_names: bool, ranges_on_cpu: bool = False) -> Iterator[LoadingReport]:
    """Load faster in a block, with the same result.

    Modules are built on the ``meta`` device, where a parameter has no values: drawing random ones for it is skipped.

    Args:
        plain_names: it is known that no weight is renamed or merged: the patterns of every architecture that does so,
            more than a thousand, need not be compiled to find that out.
        ranges_on_cpu: make there what becomes the frequencies of positions: the first calculation on ``meta`` imports
            torch's symbolic shapes. A constructor that mixes ranges with its parameters fails then.
    """
    report = LoadingReport()
    mapping = getattr(modeling_utils, _MAPPING, None)

    def observed(*args: Any, **options: Any) -> Any:  # noqa: ANN401 (transformers' own)
        report.conversions = [] if plain_names or mapping is None else mapping(*args, **options)
        return report.conversions

    replaced = [(torch.nn.init, name, _unless_meta(getattr(torch.nn.init, name))) for name in INITIALISERS]
    replaced += [(torch, "arange", _unless_default_is_meta(torch.arange))] if ranges_on_cpu else []
    replaced += [] if mapping is None else [(modeling_utils, _MAPPING, observed)]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield report
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def _unless_meta(initialise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(initialise)
    def call(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401 (the function's own)
        return tensor if tensor.is_meta else initialise(tensor, *args, **options)

    return call


def _unless_default_is_meta(arange: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(arange)
    def call(*args: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401 (the function's own)
        if "device" not in options and torch.get_default_device().type == "meta":
            options["device"] = "cpu"
        return arange(*args, **options)

    return call
