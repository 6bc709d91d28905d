"""What the plugin machinery costs: once per engine, and what it would cost per token if hooks were called there.

Building a registry imports each plugin once and calls every hook once. After that a part is a plain object:
its call is compared with a pluggy call that does the same work.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pluggy

from folo_core.plugins.manager import load_registry
from timing import measure, show

ROWS = 32
"""Rows of a decode step, for the last line."""
marker_spec = pluggy.HookspecMarker("bench")
marker_impl = pluggy.HookimplMarker("bench")


class Spec:
    """One hook that stands for a call per token."""

    @marker_spec(firstresult=True)
    def choose(self, row: int, position: int) -> int:  # type: ignore[empty-body]
        """Choose a token."""


class Chooser:
    """The same work, once as a hook and once as a method."""

    @marker_impl
    def choose(self, row: int, position: int) -> int:
        """Return something that depends on both arguments."""
        return row ^ position


def build_manager(plugins: int) -> pluggy.PluginManager:
    """Return a manager with ``plugins`` implementations of the hook."""
    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Spec)
    for _ in range(plugins):
        manager.register(Chooser())
    return manager


def cold_start() -> float:
    """Seconds of a fresh process in which the first registry is built, imports of plugins included."""
    code = (
        "import time; from folo_core.plugins.manager import load_registry; start = time.perf_counter();"
        "registry = load_registry(); print(time.perf_counter() - start); assert registry.plugins"
    )
    return min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )


def main() -> None:
    """Print one line per way to call."""
    start = time.perf_counter()
    registry = load_registry()
    first = time.perf_counter() - start
    parts = sum(len(plugin.parts) for plugin in registry.plugins)
    print(f"first registry here {first * 1e3:.1f} ms, in a fresh process {cold_start() * 1e3:.1f} ms: ", end="")
    print(f"{len(registry.plugins)} plugins, {parts} parts, {len(registry.broken)} broken")
    again, again_best = measure(load_registry, calls=1, repeats=9)
    show("registry built again", again, again_best, "once per engine")

    chooser = Chooser()
    expected = 3 ^ 5
    assert chooser.choose(3, 5) == expected
    direct, direct_best = measure(lambda: chooser.choose(row=3, position=5), calls=20_000)
    show("method of a part", direct, direct_best)
    for plugins in (1, 5):
        hook = build_manager(plugins).hook
        assert hook.choose(row=3, position=5) == expected
        hooked, hooked_best = measure(lambda h=hook: h.choose(row=3, position=5), calls=5_000)
        show(f"pluggy hook, {plugins} implementation(s)", hooked, hooked_best, f"{hooked_best / direct_best:.0f} times")
        extra = (hooked_best - direct_best) * ROWS * 1e6
        print(f"  per row of a step with {ROWS} rows it would add {extra:.0f} us to every step")


if __name__ == "__main__":
    main()
