"""Every part of one engine, resolved. Below this line nobody knows about plugins: these are plain objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.errors import ParamsError
from folo_core.sampling_params import SamplingParams, SamplingType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from folo_core.attention.interface import AttentionBackend
    from folo_core.config import EngineConfig
    from folo_core.engine.observer import Observer
    from folo_core.execution.interface import Executor, LoadedModel, ModelInfo
    from folo_core.execution.loading import Tokenizer
    from folo_core.execution.parts import NamedPart


PROCESSOR_FIELDS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
)
"""Fields of SamplingParams that only a logits processor can honour."""


@attrs.frozen(slots=True, kw_only=True)
class ExecutorParts:
    """What an executor's factory gets."""

    config: EngineConfig
    model: LoadedModel
    backend: AttentionBackend
    samplers: Mapping[str, NamedPart]
    processors: tuple[NamedPart, ...]
    num_blocks: int
    """Device blocks, the null block included."""
    num_host_blocks: int = 0
    """Host blocks to swap to, likewise; 0 for none."""


@attrs.frozen(slots=True, kw_only=True)
class SamplerTable:
    """Which sampler serves which parameters: by their class, and for plain SamplingParams by their sampling type."""

    claims: Mapping[type[SamplingParams] | SamplingType, tuple[str, ...]]
    """Params class or SamplingType to the qualified names of the samplers that claim it."""
    plain: frozenset[type[SamplingParams]] = frozenset({SamplingParams})
    """Classes served by their sampling type: SamplingParams, and those that logits processors add fields to it with."""

    def find(self, params: SamplingParams) -> str:
        """Return the sampler's qualified name.

        Raises:
            ParamsError: no installed sampler serves these parameters, or more than one does.
        """
        asked = f"params: {type(params).__name__} with sampling type {params.sampling_type.name}"
        plain = type(params) in self.plain
        names = self.claims.get(params.sampling_type if plain else type(params), ())
        if len(names) == 1:
            return names[0]
        if names:
            message = f"{asked}: {' and '.join(names)} both serve it: block one with FOLO_BLOCK=PLUGIN"
            raise ParamsError(message)
        bases = [claim for claim in self.claims if isinstance(claim, type) and isinstance(params, claim)]
        strategies = [base for base in bases if base not in self.plain]
        if len(strategies) > 1:
            kinds = " and ".join(f"{c.__name__} (sampler {', '.join(self.claims[c])})" for c in strategies)
            message = f"{asked}: it is both {kinds}: strategies cannot be combined: use one of these classes itself"
            raise ParamsError(message)
        served = sorted(claim.name if isinstance(claim, SamplingType) else claim.__name__ for claim in self.claims)
        message = (
            f"{asked}: no installed sampler serves it (served: {', '.join(served)}); "
            "n and best_of need a fan-out sampler such as folo-best-of, other classes their own plugin"
        )
        raise ParamsError(message)


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
    served_fields: frozenset[str] = frozenset()
    """Fields of SamplingParams that some installed logits processor serves."""
    kv_blocks: int
    """KV blocks, the null block included."""
    host_blocks: int = 0
    """Host blocks to swap to; 0 for none."""
    block_bytes: int = 0
    """Bytes of one block's keys and values over all layers."""
    observers: tuple[Observer, ...] = ()

    def sampler_for(self, params: SamplingParams) -> str:
        """Return the name of the sampler that serves ``params``.

        Raises:
            ParamsError: none does.
        """
        return self.sampler_table.find(params)

    def check_served(self, params: SamplingParams) -> None:
        """Refuse parameters that no installed logits processor would honour.

        Raises:
            ParamsError: one line for every such field.
        """
        defaults = attrs.fields_dict(SamplingParams)
        problems = [
            f"{name}: {getattr(params, name)!r}: no installed logits processor serves it; "
            "install folo-sampling or unblock it"
            for name in PROCESSOR_FIELDS
            if name not in self.served_fields and getattr(params, name) != defaults[name].default
        ]
        if problems:
            raise ParamsError(problems)
