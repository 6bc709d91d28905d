"""Stochastic beam search for Folo."""

from __future__ import annotations

from folo_third_party_strategy.params import StochasticBeamParams

__all__ = ["StochasticBeamParams"]
