"""Folo's samplers, greedy and random, and its logits processors. Importing this package imports no torch."""
