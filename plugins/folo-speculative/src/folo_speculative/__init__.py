"""Speculative decoding for Folo: guess several tokens, judge them in one pass. Importing this imports no torch."""

from folo_speculative.config import SpeculativeConfig
from folo_speculative.params import SpeculativeParams

__all__ = ["SpeculativeConfig", "SpeculativeParams"]
