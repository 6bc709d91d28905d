"""Locally typical sampling for Folo."""
