"""Folo's own subcommands. Each is imported when it is run."""
