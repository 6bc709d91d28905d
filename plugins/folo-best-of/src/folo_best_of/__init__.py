"""Several answers to one prompt, the best ones returned. Importing this package imports no torch."""

from folo_best_of.params import BestOfParams

__all__ = ["BestOfParams"]
