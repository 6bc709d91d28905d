"""Paged attention through FlashInfer. Importing this package imports no torch."""
