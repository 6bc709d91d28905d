"""Loads each plugin by itself and calls every hook once.

Loading wraps pluggy's own entry-point loading, which stops at the first broken plugin, follows installation order
and lets a misspelt hook pass. Here a plugin is loaded whole or left out by name, and the others go on.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import pluggy

from folo_core.errors import ConfigError
from folo_core.plugins import hookspecs
from folo_core.plugins.discovery import Source, canonical, discover
from folo_core.plugins.registry import BlockedPlugin, BrokenPlugin, LoadedPlugin, Part, Registry, hook_kinds
from folo_core.plugins.specs import API_VERSION, Spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BUILTIN = "folo_core.plugins.builtin"
_ON = {"1", "true", "yes", "on"}
_OFF = {"0", "false", "no", "off", ""}

logger = logging.getLogger(__name__)


class _Flaw(Exception):  # noqa: N818 (never leaves this module)
    """Why a plugin is left out."""

    def __init__(self, problem: str, message: str) -> None:
        self.problem = problem
        super().__init__(message)


def load_registry(
    *,
    block: Iterable[str] = (),
    autoload: bool = True,
    strict: bool = False,
    extra: Iterable[object] = (),
) -> Registry:
    """Load every installed plugin and collect what they offer.

    Args:
        block: names of plugins or distributions to leave out, besides those in ``FOLO_BLOCK`` (comma-separated).
        autoload: False (or ``FOLO_AUTOLOAD=0``) loads only Folo's built-in parts and ``extra``.
        strict: True (or ``FOLO_STRICT=1``) raises if any plugin is broken or any name is contested.
        extra: more plugins: modules or objects with hookimpls, names of installed plugins (loaded even when
            ``autoload`` is off), or dotted names of modules.

    Raises:
        PluginError: in strict mode, one line per problem.
        ConfigError: an environment variable holds something else than a switch.
    """
    autoload = _switch("FOLO_AUTOLOAD", default=True) and autoload
    strict = _switch("FOLO_STRICT", default=False) or strict
    reasons = dict.fromkeys(_environment_block(), "FOLO_BLOCK") | dict.fromkeys(map(canonical, block), "request")
    given, found = list(extra), discover()
    installed = {source.name for source in found.sources}
    sources = [_builtin_source()]
    named = {item for item in given if isinstance(item, str)}
    sources += [source for source in found.sources if autoload or source.name in named]
    sources += [_given_source(item) for item in given if not (isinstance(item, str) and item in installed)]
    unreadable = [broken for broken in found.broken if autoload and not _names(broken) & reasons.keys()]
    loader = _Loader(reasons, unreadable)
    for source in sources:
        loader.load(source)
    candidates: list[Source | BrokenPlugin] = [*sources, *found.sources, *found.broken]
    known = {name for candidate in candidates for name in _names(candidate)}
    registry = Registry(
        plugins=tuple(loader.plugins),
        broken=tuple(loader.broken),
        blocked=tuple(loader.blocked),
        shadowed=tuple(found.shadowed),
        unknown_blocks=tuple(sorted(reasons.keys() - known)),
        plugin_manager=loader.manager,
    )
    if strict:
        registry.require_sound()
    for problem in (*registry.broken, *registry.clashes):
        logger.warning("%s", problem)
    return registry


def _environment_block() -> list[str]:
    return [canonical(name) for name in os.environ.get("FOLO_BLOCK", "").split(",") if name.strip()]


def _switch(variable: str, *, default: bool) -> bool:
    value = os.environ.get(variable)
    if value is None:
        return default
    if value.strip().lower() not in _ON | _OFF:
        raise ConfigError(f"{variable}: {value!r}: set it to 0 or 1")
    return value.strip().lower() in _ON


def _names(plugin: Source | BrokenPlugin) -> set[str]:
    """What a plugin can be blocked by."""
    return {canonical(plugin.name), canonical(plugin.distribution)}


def _builtin_source() -> Source:
    try:
        version = metadata.version("folo-core")
    except metadata.PackageNotFoundError:
        version = "?"
    return Source(
        name="folo-core",
        distribution="folo-core",
        version=version,
        summary="Parts that come with the core.",
        load=lambda: importlib.import_module(BUILTIN),
    )


def _given_source(item: object) -> Source:
    if isinstance(item, str):
        return Source(name=item, load=lambda: importlib.import_module(item))
    return Source(name=str(getattr(item, "__name__", type(item).__name__)), load=lambda: item)


class _Loader:
    """Loads sources one by one into one pluggy manager; what fails is unregistered and remembered."""

    def __init__(self, reasons: dict[str, str], broken: list[BrokenPlugin]) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.reasons = reasons
        self.plugins: list[LoadedPlugin] = []
        self.broken = broken
        self.blocked: list[BlockedPlugin] = []

    def load(self, source: Source) -> None:
        blocked_by = _names(source) & self.reasons.keys()
        identity = {"name": source.name, "distribution": source.distribution, "version": source.version}
        if blocked_by:
            self.blocked.append(BlockedPlugin(**identity, reason=self.reasons[min(blocked_by)]))
            return
        had_torch = "torch" in sys.modules
        try:
            plugin = _import(source)
            parts = self._register(plugin, source)
        except Exception as error:  # noqa: BLE001 (a plugin can be an object that raises at every touch)
            problem = error.problem if isinstance(error, _Flaw) else "hooks"
            text = str(error) if isinstance(error, _Flaw) else f"{type(error).__name__}: {error}"
            self.broken.append(BrokenPlugin(**identity, problem=problem, error=text, cause=error.__cause__ or error))
            return
        self.plugins.append(
            LoadedPlugin(
                **identity,
                summary=source.summary,
                parts=parts,
                plugin_object=plugin,
                imported_torch=not had_torch and "torch" in sys.modules,
            )
        )

    def _register(self, plugin: object, source: Source) -> tuple[Part, ...]:
        if self.manager.is_registered(plugin) or self.manager.has_plugin(source.name):
            raise _Flaw("name", f"{source.name!r} was loaded already, from this or another entry point: remove one")
        try:
            return self._collect(plugin, source)
        except Exception:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            raise

    def _collect(self, plugin: object, source: Source) -> tuple[Part, ...]:
        _refuse_unmarked(plugin)
        try:
            self.manager.register(plugin, source.name)
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise _Flaw("hooks", _explain(self.manager, error)) from error
        hooks = [caller.name for caller in self.manager.get_hookcallers(plugin) or []]
        if not hooks:
            raise _Flaw("hooks", "it implements no hook: mark functions with folo_core.plugins.hookimpl")
        parts = [part for hook in sorted(set(hooks)) for part in self._call(hook, plugin, source)]
        twice = [key for key, count in Counter((part.kind, part.name) for part in parts).items() if count > 1]
        if twice:
            raise _Flaw("hooks", f"it offers {twice[0][0]} {twice[0][1]!r} twice: give each its own name")
        return tuple(parts)

    def _call(self, hook: str, plugin: object, source: Source) -> Iterator[Part]:
        """Ask one plugin alone: in pluggy's call of all, one that raises takes the others' answers with it."""
        kind = hook.removeprefix("folo_")
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            if implementation.wrapper or implementation.hookwrapper:
                raise _Flaw("hooks", f"{hook} is a wrapper, but a plugin registers for itself alone: drop wrapper=True")
            try:
                answer = implementation.function()
            except (Exception, SystemExit) as error:
                raise _Flaw("hooks", f"{hook} raised {type(error).__name__}: {error}") from error
            for spec in _checked(hook, answer, hook_kinds()[kind]):
                yield Part(
                    kind=kind,
                    spec=spec,
                    plugin=source.name,
                    distribution=source.distribution,
                    version=source.version,
                )


def _import(source: Source) -> object:
    try:
        plugin = source.load()
    except (Exception, SystemExit) as error:  # a module that calls sys.exit() must not end the program
        raise _Flaw("import", f"{type(error).__name__}: {error}") from error
    if plugin is None or inspect.isclass(plugin):
        raise _Flaw("import", f"its entry point names {plugin!r}: name a module, or an object with methods")
    return plugin


def _refuse_unmarked(plugin: object) -> None:
    """A hook's name without its marker is as silent a mistake as a misspelt name."""
    for kind in hook_kinds():
        member = getattr(plugin, f"folo_{kind}", None)
        if inspect.isroutine(member) and not hasattr(member, f"{hookspecs.PROJECT}_impl"):
            raise _Flaw("hooks", f"folo_{kind} is not marked: put @hookimpl (from folo_core.plugins) above it")


def _explain(manager: pluggy.PluginManager, error: pluggy.PluginValidationError) -> str:
    """Say which hook is misspelt and what it may have meant."""
    hooks = [f"folo_{kind}" for kind in hook_kinds()]
    for caller in manager.get_hookcallers(error.plugin) or []:
        if not caller.has_spec():
            close = difflib.get_close_matches(caller.name, hooks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(hooks)}"
            return f"unknown hook {caller.name!r}: {hint}"
    return " ".join(str(error).split())


def _checked(hook: str, answer: object, spec_type: type[Spec]) -> Sequence[Spec]:
    """The specs of one hook of one plugin, or the reason why they cannot be used."""
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        raise _Flaw("hooks", f"{hook} returned {type(answer).__name__}: return a list of {spec_type.__name__}")
    for spec in answer:
        if isinstance(spec, Spec) and spec.api_version != API_VERSION:
            text = f"{hook}: {spec.name!r} is made for plugin API {spec.api_version!r}"
            raise _Flaw("api-version", f"{text}, this folo-core has {API_VERSION}: install versions that agree")
        if not isinstance(spec, spec_type):
            text = f"{hook} returned a list with {type(spec).__name__}"
            raise _Flaw("hooks", f"{text}: only {spec_type.__name__} belongs there")
    return answer
