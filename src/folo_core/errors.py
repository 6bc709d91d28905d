"""Every error Folo raises on purpose.

Each message names the field, plugin or request at fault, shows the offending value and says the mend.
"""

from __future__ import annotations


class FoloError(Exception):
    """Base of all of Folo's errors."""


class ConfigError(FoloError):
    """One or more configuration fields are invalid.

    ``problems`` holds one line per bad field (``path: value: mend``), so that a caller sees them all at once.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ParamsError(FoloError, ValueError):
    """A sampling parameter is out of its range, or contradicts another or the model."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RequestError(FoloError, ValueError):
    """A request cannot be accepted: its prompt, its id or its size is at fault.

    ``code`` is a short machine-readable reason such as ``context_length_exceeded`` or ``duplicate_request_id``.
    """

    def __init__(self, message: str, *, code: str = "invalid_request") -> None:
        self.code = code
        super().__init__(message)


class ModelLoadError(FoloError):
    """A model folder, file or hub id could not be turned into a runnable model."""


class UnsupportedModelError(ModelLoadError):
    """The model loads, but Folo would run it wrongly, so it is refused by name."""


class PluginError(FoloError):
    """A plugin is at fault. ``plugin`` and ``distribution`` say whose code it is."""

    def __init__(self, message: str, *, plugin: str = "?", distribution: str = "?") -> None:
        self.plugin = plugin
        self.distribution = distribution
        super().__init__(message)


class IllegalTransitionError(FoloError):
    """A sequence was asked to move between two statuses that its state machine does not connect."""


class BlockPoolError(FoloError):
    """The block pool's books were about to be broken: a double free, or a reference to a free block."""


class OutOfBlocksError(FoloError):
    """An allocation wants more free blocks than there are. Nothing was allocated."""


class SchedulerError(FoloError):
    """A scheduling policy asked its planner for what would break a promise."""


class StepOutOfMemoryError(FoloError):
    """A step did not fit the device's memory. The engine tries again with smaller steps before a request is failed."""


class EngineDeadError(FoloError):
    """The engine stopped after an unrecoverable error; ``__cause__`` holds it."""


class StepTimeoutError(FoloError):
    """One engine step ran past ``step_timeout_s``; the message names the part that was running."""
