"""Attention backends of Folo."""
