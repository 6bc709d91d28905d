"""Fixtures that stand in ``tests/``, which is on the import path of every suite."""

from __future__ import annotations

from sites import make_site, site

__all__ = ["make_site", "site"]
