"""Discovery and description of plugins. This is the only package that knows pluggy."""

from folo_core.plugins.hookspecs import hookimpl

__all__ = ["hookimpl"]
