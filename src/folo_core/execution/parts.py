"""A built part with the name of who made it, so that its faults can be reported as its own."""

from __future__ import annotations

from typing import Any

import attrs

from folo_core.errors import PluginError


@attrs.frozen(slots=True)
class NamedPart:
    """An object that a plugin's factory built."""

    name: str
    part: Any
    plugin: str = "folo-core"
    distribution: str = "folo-core"

    def fault(self, kind: str, error: Exception) -> PluginError:
        """Describe ``error``, raised by this part in a step, as the plugin's."""
        message = (
            f"{kind} {self.name!r} of plugin {self.plugin!r} (distribution {self.distribution!r}) failed in a step: "
            f"{type(error).__name__}: {error}; its requests end in error, the rest go on"
        )
        fault = PluginError(message, plugin=self.plugin, distribution=self.distribution)
        fault.__cause__ = error
        return fault
