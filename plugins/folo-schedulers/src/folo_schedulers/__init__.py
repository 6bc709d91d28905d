"""Folo's schedulers: first come first served, and by priority."""
