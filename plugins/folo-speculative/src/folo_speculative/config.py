"""The plugin's section of the configuration, ``[plugins.folo-speculative]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.validation import Checked, text

if TYPE_CHECKING:
    from folo_core.config import EngineConfig

SECTION = "folo-speculative"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class SpeculativeConfig(Checked):
    """What speculation needs when the engine starts."""

    draft_model: str | None = attrs.field(
        default=None, metadata=text(optional=True, mend="must be a model: a folder, a GGUF file, a hub id or an alias")
    )
    """The small model of the proposer ``draft-model``; it must share the main model's tokenizer. None for none."""


def section_of(config: EngineConfig | None) -> SpeculativeConfig:
    """Return the plugin's section, or its defaults where there is no engine."""
    found = None if config is None else config.plugins.get(SECTION)
    return found if isinstance(found, SpeculativeConfig) else SpeculativeConfig()
