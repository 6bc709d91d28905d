"""Decoding with a second model that guides. Importing this package imports no torch."""

from folo_guidance.params import GuidanceConfig, GuidanceParams

__all__ = ["GuidanceConfig", "GuidanceParams"]
