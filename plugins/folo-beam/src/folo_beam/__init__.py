"""Beam search for Folo: plain, diverse and constrained. Importing this package imports no torch."""

from folo_beam.params import BeamParams

__all__ = ["BeamParams"]
