"""Every part of one engine, resolved. Below this line nobody knows about plugins: these are plain objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from folo_core.attention.interface import AttentionBackend
    from folo_core.config import EngineConfig
    from folo_core.engine.observer import Observer
    from folo_core.execution.interface import Executor, LoadedModel, ModelInfo
    from folo_core.execution.loading import Tokenizer
    from folo_core.execution.parts import NamedPart
    from folo_core.sampling_params import SamplingParams, SamplingType


@attrs.frozen(slots=True, kw_only=True)
class ExecutorParts:
    """What an executor's factory gets."""

    config: EngineConfig
    model: LoadedModel
    backend: AttentionBackend
    samplers: Mapping[str, NamedPart]
    processors: tuple[NamedPart, ...]
    num_blocks: int


@attrs.frozen(slots=True, kw_only=True)
class SamplerTable:
    """Which sampler serves which parameters: by their class, and for plain SamplingParams by their sampling type."""

    by_class: Mapping[type[SamplingParams], str]
    by_type: Mapping[SamplingType, str]

    def find(self, params: SamplingParams) -> str:
        """Return the sampler's name.

        Raises:
            ParamsError: no installed sampler serves these parameters.
        """
        name = self.by_class.get(type(params)) or self.by_type.get(params.sampling_type)
        if name is None:
            served = sorted({t.name for t in self.by_type} | {c.__name__ for c in self.by_class})
            message = (
                f"params: {type(params).__name__} with sampling type {params.sampling_type.name}: no installed sampler "
                f"serves it (served: {', '.join(served)}); n and best_of need folo-best-of, beam search folo-beam"
            )
            raise ParamsError(message)
        return name


@attrs.frozen(slots=True, kw_only=True)
class Components:
    """The parts an Engine runs on."""

    config: EngineConfig
    """Resolved: every fallback filled in."""
    model_info: ModelInfo
    tokenizer: Tokenizer | None
    scheduler: NamedPart
    executor: Executor
    processors: tuple[NamedPart, ...]
    sampler_table: SamplerTable
    kv_blocks: int
    """KV blocks, the null block included."""
    observers: tuple[Observer, ...] = ()

    def sampler_for(self, params: SamplingParams) -> str:
        """Return the name of the sampler that serves ``params``.

        Raises:
            ParamsError: none does.
        """
        return self.sampler_table.find(params)
