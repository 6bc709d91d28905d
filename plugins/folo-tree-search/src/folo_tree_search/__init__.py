"""Best-first tree search over segments of text. Importing this package imports no torch."""

from folo_tree_search.params import Node, TreeSearchParams, mean_logprob

__all__ = ["Node", "TreeSearchParams", "mean_logprob"]
