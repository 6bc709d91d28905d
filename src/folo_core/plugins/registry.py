"""What was found: every part that plugins offer, who offers it, and what is wrong with the rest.

A registry is built once (``folo_core.plugins.manager.load_registry``) and only read after that.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import attrs

from folo_core.errors import FoloError, PluginError
from folo_core.plugins import hookspecs, specs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pluggy

Manifest = tuple[tuple[str, str, str], ...]
"""``(plugin, distribution, version)`` of every loaded plugin, sorted."""


@functools.cache
def hook_kinds() -> Mapping[str, type[specs.Spec]]:
    """Kind (a hook's name without ``folo_``) to the spec class that the hook returns, read from hookspecs."""
    names = {**vars(specs), "Sequence": Sequence}
    return {
        hook.removeprefix("folo_"): get_args(get_type_hints(function, localns=names)["return"])[0]
        for hook, function in vars(hookspecs).items()
        if hook.startswith("folo_")
    }


@attrs.frozen(kw_only=True)
class Part:
    """One thing a plugin offers: its spec, and whose it is."""

    kind: str
    """The hook it came from, without ``folo_``: ``samplers``, ``model_loaders`` and so on."""
    spec: Any
    """The spec as the plugin returned it; its class is ``hook_kinds()[kind]``."""
    plugin: str
    distribution: str
    version: str

    @property
    def name(self) -> str:
        """The bare name, such as ``beam``."""
        return str(self.spec.name)

    @property
    def qualified_name(self) -> str:
        """The name that stays clear when several plugins offer the same one, such as ``folo-beam:beam``."""
        return f"{self.plugin}:{self.name}"

    def build(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 (each kind builds its own type)
        """Call the spec's factory.

        Raises:
            PluginError: the factory raised something of its own; the message names plugin and distribution.
            FoloError: the factory refused its input on purpose; passed on with a note that names the plugin.
        """
        where = f"{self.kind} {self.qualified_name} ({self.distribution} {self.version})"
        try:
            return self.spec.factory(*args, **kwargs)
        except FoloError as error:
            error.add_note(f"raised while building {where}")
            raise
        except Exception as error:
            message = f"{where}: its factory raised {type(error).__name__}: {error}"
            raise PluginError(message, plugin=self.plugin, distribution=self.distribution) from error


@attrs.frozen(kw_only=True)
class LoadedPlugin:
    """A plugin that loaded whole."""

    name: str
    distribution: str
    version: str
    summary: str = ""
    """The distribution's one-line description."""
    parts: tuple[Part, ...]
    plugin_object: Any = attrs.field(repr=False)
    """The module (or object) that holds the hook implementations."""
    imported_torch: bool = False
    """True if importing the plugin pulled in torch, which makes every command slow."""


@attrs.frozen(kw_only=True)
class BrokenPlugin:
    """A plugin that was left out, and why."""

    name: str
    distribution: str
    version: str
    problem: str
    """``import``, ``hooks`` (misspelt, unmarked, raising or returning the wrong thing), ``api-version`` or ``name``."""
    error: str
    """One line: the exception's type and message, or what to mend."""
    cause: BaseException | None = attrs.field(default=None, repr=False, eq=False)

    def __str__(self) -> str:
        return f"plugin {self.name} ({self.distribution} {self.version}) is broken: {self.error}"


@attrs.frozen(kw_only=True)
class BlockedPlugin:
    """A plugin that is installed and was not imported, because the user said so."""

    name: str
    distribution: str
    version: str
    reason: str


@attrs.frozen(kw_only=True)
class ShadowedDistribution:
    """A second copy of a distribution, further back on ``sys.path``; Python imports the first."""

    distribution: str
    version: str
    location: str
    used_version: str
    used_location: str


@attrs.frozen(kw_only=True)
class Clash:
    """Parts that want the same place. None of them wins by itself."""

    kind: str
    subject: str
    """The contested name, or what several samplers claim to serve."""
    parts: tuple[Part, ...]
    mend: str

    def __str__(self) -> str:
        owners = " and ".join(f"{p.qualified_name} ({p.distribution} {p.version})" for p in self.parts)
        return f"{self.kind}: {self.subject} is offered by {owners}: {self.mend}"


@attrs.frozen(kw_only=True)
class Registry:
    """Every part of every loaded plugin, in an order that no installation can change."""

    plugins: tuple[LoadedPlugin, ...]
    broken: tuple[BrokenPlugin, ...] = ()
    blocked: tuple[BlockedPlugin, ...] = ()
    shadowed: tuple[ShadowedDistribution, ...] = ()
    unknown_blocks: tuple[str, ...] = ()
    """Names asked to be blocked that no installed plugin has: probably misspelt."""
    plugin_manager: pluggy.PluginManager = attrs.field(repr=False, eq=False)
    """pluggy's manager, whose hooks have all been called already. Nothing calls one after this."""
    _parts: Mapping[str, tuple[Part, ...]] = attrs.field(init=False, repr=False, eq=False)
    clashes: tuple[Clash, ...] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        parts = sorted((part for plugin in self.plugins for part in plugin.parts), key=_order)
        by_kind = {kind: tuple(part for part in parts if part.kind == kind) for kind in hook_kinds()}
        object.__setattr__(self, "_parts", by_kind)
        object.__setattr__(self, "clashes", tuple(_find_clashes(by_kind)))

    def all(self, kind: str) -> tuple[Part, ...]:
        """All parts of a kind, ordered by stage (logits processors), then name, then plugin.

        Raises:
            PluginError: there is no such kind.
        """
        if kind not in self._parts:
            raise PluginError(f"{kind!r} is no kind of part: {_suggest(kind, self._parts)}")
        return self._parts[kind]

    def by_name(self, kind: str) -> dict[str, Part]:
        """All parts of a kind by bare name, for kinds of which every part is used.

        Raises:
            PluginError: two plugins offer one name.
        """
        return {part.name: self.get(kind, part.name) for part in self.all(kind)}

    def get(self, kind: str, name: str) -> Part:
        """The part called ``name``, bare or as ``plugin:name``.

        Raises:
            PluginError: no plugin offers it, or several do and the name does not say whose is meant.
        """
        parts = self.all(kind)
        found = [part for part in parts if name in {part.name, part.qualified_name}]
        if len(found) == 1:
            return found[0]
        if found:
            raise PluginError(str(_name_clash(kind, name, found)), plugin=found[0].plugin)
        known = [part.qualified_name if ":" in name else part.name for part in parts]
        absent = "".join(f"; {broken}" for broken in self.broken)
        absent += "".join(f"; plugin {plugin.name} is blocked by {plugin.reason}" for plugin in self.blocked)
        raise PluginError(f"{kind}: no plugin offers {name!r}: {_suggest(name, known)}{absent}")

    def manifest(self) -> Manifest:
        """Name, distribution and version of every loaded plugin, for workers to compare with."""
        return tuple(sorted((plugin.name, plugin.distribution, plugin.version) for plugin in self.plugins))

    def check_manifest(self, expected: Iterable[Sequence[str]]) -> None:
        """Refuse to go on with plugins other than another process's.

        Args:
            expected: the other process's ``manifest()``; lists, as JSON brings them, are fine.

        Raises:
            PluginError: a plugin is missing here, is extra here, or has another version or distribution.
        """
        theirs = {name: (distribution, version) for name, distribution, version in expected}
        ours = {name: (distribution, version) for name, distribution, version in self.manifest()}
        lines = [
            f"{name}: {_describe(ours.get(name))} here, {_describe(theirs.get(name))} expected"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name) != ours.get(name)
        ]
        if lines:
            raise PluginError("this process has other plugins than the one it works for: " + "; ".join(lines))

    def require_sound(self) -> None:
        """Strict mode: raise if anything is broken or contested.

        Raises:
            PluginError: one line per problem.
        """
        problems = [str(problem) for problem in (*self.broken, *self.clashes)]
        if problems:
            culprit = self.broken[0] if self.broken else self.clashes[0].parts[0]
            name = culprit.name if isinstance(culprit, BrokenPlugin) else culprit.plugin
            raise PluginError("\n".join(problems), plugin=name, distribution=culprit.distribution)


def _order(part: Part) -> tuple[int, str, str]:
    return getattr(part.spec, "stage", 0), part.name, part.plugin


def _suggest(name: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}available: {', '.join(known) or 'none'}"


def _describe(entry: tuple[str, str] | None) -> str:
    return "absent" if entry is None else " ".join(entry)


def _name_clash(kind: str, name: str, parts: Sequence[Part]) -> Clash:
    choices = " or ".join(f'"{part.qualified_name}"' for part in parts)
    return Clash(kind=kind, subject=repr(name), parts=tuple(parts), mend=f"choose with {choices}")


def _claims(part: Part) -> Iterable[str]:
    """What requests a sampler claims: sampling types of plain SamplingParams, or else its params class."""
    params_type = part.spec.params_type
    types = [f"SamplingParams with sampling type {kind.name}" for kind in part.spec.sampling_types]
    return types or [f"{params_type.__module__}.{params_type.__qualname__}"]


def _find_clashes(by_kind: Mapping[str, tuple[Part, ...]]) -> Iterable[Clash]:
    for kind, parts in by_kind.items():
        for name, group in itertools.groupby(sorted(parts, key=lambda p: (p.name, p.plugin)), key=lambda p: p.name):
            same = tuple(group)
            if len(same) > 1:
                yield _name_clash(kind, name, same)
    claims: dict[str, list[Part]] = {}
    for part in by_kind["samplers"]:
        for claim in _claims(part):
            claims.setdefault(claim, []).append(part)
    for claim, claimants in claims.items():
        if len(claimants) > 1:
            mend = "a request could go to either; block all but one with FOLO_BLOCK=PLUGIN"
            yield Clash(kind="samplers", subject=claim, parts=tuple(claimants), mend=mend)
