"""Every hook that a Folo plugin can implement, on one page.

A plugin is an installed distribution with an entry point in the group ``folo`` that names a light module.
In that module, functions marked with ``folo_core.plugins.hookimpl`` and named as below return specs
(``folo_core.plugins.specs``). Hooks are factories or registrations: they are called once, while an engine's
components are built, and never per request, step or token. A plugin with a hook that raises is reported with its
distribution and, unless strict mode is on, left out whole.
"""

# mypy: disable-error-code="empty-body"
# A hookspec is a signature and its documentation; pluggy never runs the body.

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.plugins.specs import (
        AttentionBackendSpec,
        CommandSpec,
        ConfigMigrationSpec,
        ConfigSectionSpec,
        ExecutorSpec,
        LogitsProcessorSpec,
        ModelAliasSpec,
        ModelLoaderSpec,
        ObserverSpec,
        ProposerSpec,
        SamplerSpec,
        SchedulerSpec,
    )

PROJECT = "folo"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def folo_samplers() -> Sequence[SamplerSpec]:
    """Decoding strategies. A request's params class, then its sampling type, picks one."""


@hookspec
def folo_model_loaders() -> Sequence[ModelLoaderSpec]:
    """Ways to turn a model name into weights and a tokenizer."""


@hookspec
def folo_model_aliases() -> Sequence[ModelAliasSpec]:
    """Short model names, such as ``demo``, for files that a distribution carries."""


@hookspec
def folo_schedulers() -> Sequence[SchedulerSpec]:
    """Policies that choose, step by step, which sequences run and how many tokens of each."""


@hookspec
def folo_attention_backends() -> Sequence[AttentionBackendSpec]:
    """Kernels that write keys and values into blocks and attend over them."""


@hookspec
def folo_executors() -> Sequence[ExecutorSpec]:
    """Places where steps run: this process, worker processes, other machines."""


@hookspec
def folo_logits_processors() -> Sequence[LogitsProcessorSpec]:
    """Edits of logits before sampling, ordered by stage and then name."""


@hookspec
def folo_proposers() -> Sequence[ProposerSpec]:
    """Drafters for speculative decoding."""


@hookspec
def folo_observers() -> Sequence[ObserverSpec]:
    """Watchers of steps, for metrics and traces. Called as plain objects after each step."""


@hookspec
def folo_config_sections() -> Sequence[ConfigSectionSpec]:
    """Typed sections that a plugin adds to EngineConfig under ``plugins.NAME``."""


@hookspec
def folo_config_migrations() -> Sequence[ConfigMigrationSpec]:
    """Functions that lift a plugin's section from one version to the next."""


@hookspec
def folo_commands() -> Sequence[CommandSpec]:
    """Subcommands of ``folo``."""
