"""What a plugin's hooks return: frozen descriptions of parts, with a factory that builds each part when it is chosen.

Importing this module imports no torch, and a factory imports torch only when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from folo_core.sampling_params import SamplingType

API_VERSION = 1
"""Version of the plugin contract. A spec made for another major version is refused by name."""

NAME_PATTERN = r"^[a-z][a-z0-9]*([-_.][a-z0-9]+)*$"


def _as_flags(values: Iterable[str]) -> frozenset[str]:
    return frozenset(values)


def _as_sampling_types(values: Iterable[SamplingType]) -> frozenset[SamplingType]:
    return frozenset(values)


@attrs.frozen(kw_only=True)
class Spec:
    """What every part has: a name to choose it by, a factory, a line of help and the contract's version."""

    name: str = attrs.field(validator=attrs.validators.matches_re(NAME_PATTERN))
    """Chosen by this name, or by ``plugin:name`` when two plugins offer it."""
    help: str = attrs.field(validator=attrs.validators.min_len(1))
    """One line for ``folo plugins list``."""
    api_version: int = API_VERSION
    capabilities: frozenset[str] = attrs.field(factory=frozenset, converter=_as_flags)
    """Flags that the conformance kit and ``folo plugins show`` read. A sampler's are listed in
    ``folo_core.testing.capabilities``."""


@attrs.frozen(kw_only=True)
class SamplerSpec(Spec):
    """A decoding strategy. The class of a request's parameters, then its sampling type, picks it."""

    factory: Callable[..., Any]
    """``factory(context: SamplerContext) -> Sampler`` (see ``folo_core.sampling.interface``)."""
    params_type: type[SamplingParams] = SamplingParams
    """The strategy's own parameters: ``SamplingParams`` or a subclass of it."""
    sampling_types: frozenset[SamplingType] = attrs.field(factory=frozenset, converter=_as_sampling_types)
    """For samplers of plain SamplingParams: which sampling types they serve. Empty for a params class of its own."""
    examples: Callable[[], Sequence[SamplingParams]] | None = None
    """Parameters that show what the strategy can do, for the conformance kit to try besides the defaults."""
    example_sections: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict, hash=False)
    """Sections ``[plugins.NAME]`` of the configuration that the examples need, by name."""


@attrs.frozen(kw_only=True)
class ModelLoaderSpec(Spec):
    """Turns a model's name into weights and a tokenizer."""

    factory: Callable[..., Any]
    """``factory(config: EngineConfig) -> ModelLoader`` (see ``folo_core.execution.loading``)."""
    priority: int = 0
    """Among loaders whose ``can_load`` says yes, the highest priority wins; equal priorities are a conflict."""
    can_load: Callable[[str], bool]
    """Whether this loader takes the model (folder, file or hub id). Must not import torch."""


@attrs.frozen(kw_only=True)
class ModelAliasSpec(Spec):
    """A short model name, such as ``demo``, that stands for files an installed distribution carries."""

    factory: Callable[[], Path]
    """Return the local file or folder that the alias stands for."""


@attrs.frozen(kw_only=True)
class SchedulerSpec(Spec):
    """An admission and ordering policy."""

    factory: Callable[..., Any]
    """``factory(config: SchedulerConfig) -> Scheduler``."""


@attrs.frozen(kw_only=True)
class AttentionBackendSpec(Spec):
    """Attention over KV blocks for a kind of device."""

    factory: Callable[..., Any]
    """``factory(config: EngineConfig) -> AttentionBackend``."""
    supports: Callable[[str, str], str | None]
    """``supports(device, dtype)`` returns None if it can serve them, else the reason why not. No torch import."""
    priority: int = 0
    """With ``attention="auto"`` the supported backend of the highest priority is taken."""


@attrs.frozen(kw_only=True)
class ExecutorSpec(Spec):
    """Runs steps: in this process, or in workers."""

    factory: Callable[..., Any]
    """``factory(parts: ExecutorParts) -> Executor`` (see ``folo_core.components``)."""


@attrs.frozen(kw_only=True)
class LogitsProcessorSpec(Spec):
    """Edits logits before sampling. Runs in order of stage, then name; never of installation."""

    factory: Callable[..., Any]
    """``factory(vocab_size: int, device: torch.device) -> LogitsProcessor``."""
    stage: int = 500
    """Lower runs earlier. Folo's own: penalties 200, bias 300, min tokens 400, bad words 600, allowed ids 800."""
    serves: frozenset[str] = attrs.field(factory=frozenset, converter=_as_flags)
    """Fields of SamplingParams that mean nothing without this processor: a request that sets one which no
    installed processor serves is refused rather than answered as if it had not."""
    params_type: type[SamplingParams] = SamplingParams
    """The class whose fields the processor reads, for ``folo plugins show``; any sampler may serve it."""
    examples: Callable[[], Sequence[SamplingParams]] | None = None
    """Parameters that make the processor apply, for the conformance kit to try."""


@attrs.frozen(kw_only=True)
class ProposerSpec(Spec):
    """Drafts tokens for speculative decoding."""

    factory: Callable[..., Any]
    """``factory(context: SamplerContext) -> Proposer`` (see ``folo_core.sampling.interface``)."""


@attrs.frozen(kw_only=True)
class ObserverSpec(Spec):
    """Watches steps: metrics, traces."""

    factory: Callable[..., Any]
    """``factory(config: EngineConfig) -> Observer`` (see ``folo_core.engine.observer``)."""


@attrs.frozen(kw_only=True)
class ConfigSectionSpec(Spec):
    """A typed section ``[plugins.NAME]`` of the configuration, read into the plugin's own attrs class."""

    section_type: type
    """A frozen attrs class whose fields all have defaults."""


@attrs.frozen(kw_only=True)
class ConfigMigrationSpec(Spec):
    """Lifts an old plugin section by one version."""

    section: str
    from_version: int
    migrate: Callable[[Mapping[str, Any]], dict[str, Any]]


@attrs.frozen(kw_only=True)
class CommandSpec(Spec):
    """A subcommand of ``folo``."""

    factory: Callable[[], Any]
    """Return a ``typer.Typer`` app; imported only when the command is run."""
