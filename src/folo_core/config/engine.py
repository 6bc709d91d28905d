"""EngineConfig: the sections together, and the rules that hold between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from folo_core.config.cache import CacheConfig
from folo_core.config.migrations import CURRENT_VERSION, lift
from folo_core.config.model import ModelConfig
from folo_core.config.parallel import ParallelConfig
from folo_core.config.scheduler import SchedulerConfig, whole_prompt_fits
from folo_core.config.sections import HINTS, MAX_DEPTH, as_section, fields_of, freeze, structure, suggest, unstructure
from folo_core.errors import ConfigError
from folo_core.validation import (
    Checked,
    FrozenMap,
    Rejected,
    Relation,
    are_texts,
    as_float,
    as_int,
    boolean,
    integer,
    is_text,
    rule,
    show,
    under,
)

if TYPE_CHECKING:
    from folo_core.config.migrations import Migration
    from folo_core.validation import Data

SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
}


def _model(value: ModelConfig | Mapping[str, Any] | str) -> ModelConfig:
    return as_section(ModelConfig, {"model": value} if isinstance(value, str) else value)


def _cache(value: CacheConfig | Mapping[str, Any]) -> CacheConfig:
    return as_section(CacheConfig, value)


def _scheduler(value: SchedulerConfig | Mapping[str, Any]) -> SchedulerConfig:
    return as_section(SchedulerConfig, value)


def _parallel(value: ParallelConfig | Mapping[str, Any]) -> ParallelConfig:
    return as_section(ParallelConfig, value)


def _names(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _is(cls: type) -> dict[str, Any]:
    return rule(lambda value: isinstance(value, cls), f"must be a {cls.__name__} or a table of its fields")


def _is_timeout(value: object) -> bool:
    return type(value) is float and 0 < value < math.inf


_PLAIN = f"JSON values (text keys; text, finite numbers, true, false, lists and tables up to {MAX_DEPTH} deep)"


def _are_sections(value: object) -> bool:
    return isinstance(value, FrozenMap) and are_texts(tuple(value)) and all(map(_is_section, value.values()))


def _is_section(value: object) -> bool:
    return attrs.has(type(value)) or _is_table(value)


def _is_table(value: object) -> bool:
    return isinstance(value, FrozenMap) and _is_plain(value)


def _is_plain(value: object) -> bool:
    """Whether frozen data survives a round trip through JSON."""
    if isinstance(value, FrozenMap):
        return all(_is_plain(key) and type(key) is str and _is_plain(item) for key, item in value.items())
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if type(value) is str:
        return value == "" or is_text(value)
    return value is None or type(value) in {bool, int} or (type(value) is float and math.isfinite(value))


def _lengths_agree(config: EngineConfig) -> str | None:
    own, model = config.scheduler.max_model_len, config.model.max_model_len
    if own is None or model is None or own <= model:
        return None
    return f"scheduler.max_model_len: {own}: must be <= model.max_model_len ({model})"


def _prompt_fits(config: EngineConfig) -> str | None:
    if config.scheduler.max_model_len is not None:
        return None  # the scheduler section has checked its own length
    line = whole_prompt_fits(config.scheduler, config.model.max_model_len)
    return None if line is None else under("scheduler", line)


def _swap_has_space(config: EngineConfig) -> str | None:
    if config.scheduler.preemption != "swap" or config.cache.swap_space:
        return None
    return "scheduler.preemption: 'swap': has no room to swap to; set cache.swap_space, such as '4GiB'"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class EngineConfig(Checked):
    """Everything an engine is built from. Sections may be given as mappings, and the model as its name alone.

    Raises:
        ConfigError: one ``path: value: mend`` line for every problem in any section.
    """

    RELATIONS = (
        Relation(("model", "scheduler"), _lengths_agree),
        Relation(("model", "scheduler"), _prompt_fits),
        Relation(("cache", "scheduler"), _swap_has_space),
    )

    model: ModelConfig = attrs.field(converter=_model, metadata=_is(ModelConfig))
    cache: CacheConfig = attrs.field(factory=CacheConfig, converter=_cache, metadata=_is(CacheConfig))
    scheduler: SchedulerConfig = attrs.field(
        factory=SchedulerConfig, converter=_scheduler, metadata=_is(SchedulerConfig)
    )
    parallel: ParallelConfig = attrs.field(factory=ParallelConfig, converter=_parallel, metadata=_is(ParallelConfig))
    plugins: Mapping[str, Any] = attrs.field(
        factory=FrozenMap,
        converter=freeze,
        metadata=rule(_are_sections, f"must map plugin section names to tables of {_PLAIN}"),
    )
    """Plugin section name to the plugin's own attrs object, or to a plain table until ``with_sections`` types it."""
    extra_config: Mapping[str, Any] = attrs.field(
        factory=FrozenMap, converter=freeze, metadata=rule(_is_table, f"must be a table of {_PLAIN}")
    )
    """Anything that no section claims; read it with ``extra_config.get(name, default)``."""
    max_logprobs: int = attrs.field(default=20, converter=as_int, metadata=integer(low=-1))
    """Most log probabilities a request may ask for at each position; -1 for the whole vocabulary."""
    max_sequences_per_request: int = attrs.field(default=256, converter=as_int, metadata=integer(low=1))
    """Cap on n, best_of and beam width."""
    step_timeout_s: float | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(as_float),
        metadata=rule(_is_timeout, "must be a number of seconds > 0", optional=True),
    )
    """Seconds after which a step counts as hung; None for never."""
    deterministic: bool = attrs.field(default=False, metadata=boolean())
    """Give a request the same token ids and log probabilities, bit for bit, whatever shares its steps and however its
    prompt is cut. Takes a model and an attention backend that promise it: the ``hf`` loader on a CPU in float32."""
    strict_plugins: bool = attrs.field(default=False, metadata=boolean())
    """Refuse to start when any installed plugin is broken or clashes."""
    blocked_plugins: tuple[str, ...] = attrs.field(
        default=(), converter=_names, metadata=rule(are_texts, "must be a list of plugin names")
    )
    """Plugins to leave out."""
    config_version: int = attrs.field(
        default=CURRENT_VERSION,
        metadata=rule(lambda value: type(value) is int and value == CURRENT_VERSION, f"must be {CURRENT_VERSION}"),
    )
    """Version of the field names; ``folo_core.config.load`` lifts older tables."""

    @property
    def max_model_len(self) -> int | None:
        """Longest sequence in tokens that is configured: the scheduler's, else the model's, else None."""
        return self.model.max_model_len if self.scheduler.max_model_len is None else self.scheduler.max_model_len

    def resolve(self, model_max_len: int) -> EngineConfig:
        """A copy for a loaded model, in which both ``max_model_len`` are set.

        Args:
            model_max_len: longest sequence in tokens that the model's positions allow.

        Raises:
            ConfigError: a configured length is longer, or the resolved budgets contradict each other.
        """
        limits = {"model": self.model.max_model_len, "scheduler": self.scheduler.max_model_len}
        problems = [
            f"{section}.max_model_len: {limit}: must be <= {model_max_len}, the longest the model's positions allow"
            for section, limit in limits.items()
            if limit is not None and limit > model_max_len
        ]
        if problems:
            raise ConfigError(problems)
        model = attrs.evolve(self.model, max_model_len=limits["model"] or model_max_len)
        table = unstructure(self.scheduler) | {"max_model_len": limits["scheduler"] or model.max_model_len}
        return attrs.evolve(self, model=model, scheduler=table)

    def with_sections(
        self, sections: Mapping[str, type], migrations: Mapping[tuple[str, int], Migration] | None = None
    ) -> EngineConfig:
        """A copy in which every plugin section is an object of its plugin's class, defaults included.

        A class says its version with ``CONFIG_VERSION`` (1 without it), and a table with ``config_version``.

        Args:
            sections: section name to attrs class, of all installed plugins.
            migrations: (section name, old version) to the function that lifts a table by one version.

        Raises:
            ConfigError: one line for every bad field and for every section that no plugin claims.
        """
        typed, problems = typed_sections(self.plugins, sections, migrations or {})
        if problems:
            raise ConfigError(problems)
        return attrs.evolve(self, plugins=typed)

    @classmethod
    def from_options(cls, **options: Data) -> EngineConfig:
        """Build a config from flat keywords with vLLM's names, each routed to its section.

        A whole section (``cache=...``) may be given beside flat keywords, which win. A plain number for
        ``swap_space`` counts GiB, as in vLLM; text such as ``"512MiB"`` says its own unit.

        Raises:
            ConfigError: one line for every bad or unknown keyword.
        """
        return build(*tables_of_options(options))


def build(tables: Mapping[str, Any], problems: list[str]) -> EngineConfig:
    """The config of nested tables, unless there are problems: those found before are reported with its own."""
    config = as_section(EngineConfig, {"model": {}} | dict(tables))
    problems = problems + (config.problems if isinstance(config, Rejected) else [])
    if problems:
        raise ConfigError(problems)
    return config


def typed_sections(
    given: Mapping[str, Any], sections: Mapping[str, type], migrations: Mapping[tuple[str, int], Migration]
) -> tuple[dict[str, Any], list[str]]:
    """Every plugin section as an object of its class, and the problems of those that cannot be."""
    problems = [
        f"plugins.{name}: {show(table)}: {suggest(name, sections)}; is the plugin installed?"
        for name, table in given.items()
        if name not in sections
    ]
    typed: dict[str, Any] = {}
    for name, cls in sections.items():
        try:
            typed[name] = _typed(name, cls, given.get(name, {}), migrations)
        except ConfigError as error:
            problems += [under(f"plugins.{name}", line.removeprefix(cls.__name__)) for line in error.problems]
    return typed, problems


def _typed(name: str, cls: type, value: Data, migrations: Mapping[tuple[str, int], Migration]) -> Data:
    if not isinstance(value, Mapping):
        return structure(cls, value)
    current: int = getattr(cls, "CONFIG_VERSION", 1)
    return structure(cls, lift(value, current, lambda old: migrations.get((name, old)), owner=f"plugin section {name}"))


ALIASES = {
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "num_gpu_blocks_override": "num_blocks",
    "distributed_executor_backend": "executor",
    "scheduling_policy": "policy",
    "attention_backend": "attention",
}
"""vLLM's names of fields that have another name here."""
_MOST_GIB = 65536


def option_routes() -> dict[str, tuple[str, ...]]:
    """Every flat keyword to the path of its field. Where two sections share a name, the first has it."""
    routes: dict[str, tuple[str, ...]] = {name: (name,) for name in fields_of(EngineConfig)}
    for section, cls in SECTIONS.items():
        for name in fields_of(cls):
            routes.setdefault(name, (section, name))
    routes["model"] = ("model", "model")
    return routes | {alias: routes[name] for alias, name in ALIASES.items()}


def tables_of_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Nested tables of flat keywords, and the problems of keywords that have no place in them."""
    routes = option_routes()
    problems: list[str] = []
    wholes = {name: given for name, given in options.items() if name in SECTIONS and not _is_model_name(name, given)}
    tables: dict[str, Any] = {
        name: dict(unstructure(given)) if isinstance(given, (Mapping, SECTIONS[name])) else given
        for name, given in wholes.items()
    }
    for name, value in options.items():
        path = routes.get(name)
        if name in wholes or (name == "trust_remote_code" and value is False):
            continue
        if path is None:
            problems.append(f"{name}: {show(value)}: {suggest(name, routes)}")
        elif len(path) == 1:
            tables[name] = value
        elif isinstance(tables.setdefault(path[0], {}), dict):
            tables[path[0]][path[1]] = _gibibytes(value) if name == "swap_space" else value
            if path[1] != name and path[1] in options:
                problems.append(f"{name}: {show(value)}: means {path[1]}, which is given too; keep one of them")
    return tables, problems


def _is_model_name(name: str, given: object) -> bool:
    return name == "model" and not isinstance(given, (Mapping, ModelConfig))


def _gibibytes(value: Data) -> Data:
    """A plain ``swap_space`` counts GiB, as vLLM's does; one too large for that was meant in bytes, and is refused."""
    if type(value) not in {int, float} or not 0 <= value < math.inf:
        return value
    if value > _MOST_GIB:
        return Rejected([f": {value}: a plain number counts GiB here, as in vLLM; write a size such as '512MiB'"])
    return round(value * 2**30)


HINTS |= {
    name: f"unknown here; it is a field of [{path[0]}]" for name, path in option_routes().items() if len(path) > 1
}
