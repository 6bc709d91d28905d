from __future__ import annotations

import json
import logging
import sys
import textwrap
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folo_core.errors import ConfigError, FoloError, ModelLoadError, PluginError
from folo_core.plugins import hookimpl
from folo_core.plugins.manager import load_registry
from folo_core.plugins.registry import hook_kinds
from folo_core.plugins.specs import API_VERSION, LogitsProcessorSpec, ModelAliasSpec, SamplerSpec, SchedulerSpec
from folo_core.sampling_params import SamplingParams, SamplingType

SCHEDULER = """
    from folo_core.plugins import hookimpl
    from folo_core.plugins.specs import SchedulerSpec

    @hookimpl
    def folo_schedulers():
        return [SchedulerSpec(name="{name}", help="A policy.", factory=lambda config: config)]
"""


def plugin(name: str, **hooks) -> types.SimpleNamespace:
    """A plugin object whose hooks return what they are given, or call it."""

    def implement(answer):
        def hook():
            return answer() if callable(answer) else answer

        return hookimpl(hook)

    made = types.SimpleNamespace(**{f"folo_{kind}": implement(answer) for kind, answer in hooks.items()})
    made.__name__ = name
    return made


def scheduler(name: str, **more) -> SchedulerSpec:
    return SchedulerSpec(name=name, help="A policy.", **{"factory": lambda config: config, **more})


def sampler(name: str, **more) -> SamplerSpec:
    return SamplerSpec(name=name, help="A strategy.", factory=lambda vocab_size, device: (vocab_size, device), **more)


def load(*plugins, **options):
    return load_registry(extra=plugins, autoload=False, **options)


def only_broken(registry, name: str):
    found = [broken for broken in registry.broken if broken.name == name]
    assert len(found) == 1, registry.broken
    return found[0]


def loaded(registry, name: str):
    found = [plugin for plugin in registry.plugins if plugin.name == name]
    assert len(found) == 1, [plugin.name for plugin in registry.plugins]
    return found[0]


# --- discovery -------------------------------------------------------------------------------------------------------


def test_an_installed_distribution_is_a_plugin(site):
    site.install("acme-policies", SCHEDULER.format(name="acme"), version="2.5")
    registry = load_registry()
    part = registry.get("schedulers", "acme")
    assert (part.plugin, part.distribution, part.version) == ("acme-policies", "acme-policies", "2.5")
    assert loaded(registry, "acme-policies").summary == "About acme-policies."
    assert part.build("config") == "config"


def test_order_is_by_name_not_by_installation(make_site):
    second, first = make_site(), make_site()  # the later one stands in front on sys.path
    first.install("acme-zeta", SCHEDULER.format(name="zeta"))
    second.install("acme-alpha", SCHEDULER.format(name="alpha"))
    registry = load_registry()
    assert [p.name for p in registry.plugins if p.name.startswith("acme")] == ["acme-alpha", "acme-zeta"]
    assert [p.name for p in registry.all("schedulers") if p.plugin.startswith("acme")] == ["alpha", "zeta"]


BROKEN_IMPORTS = {
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "syntax": ("def folo_schedulers(:\n", "SyntaxError"),
    "raises": ("raise RuntimeError('boom at import')", "RuntimeError: boom at import"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "asserts": ("assert False, 'never'", "AssertionError: never"),
}


@pytest.mark.parametrize("case", BROKEN_IMPORTS)
def test_a_plugin_that_cannot_be_imported_is_named_and_isolated(site, case, caplog):
    code, error = BROKEN_IMPORTS[case]
    site.install("acme-broken", code, version="0.9")
    site.install("acme-good", SCHEDULER.format(name="good"))
    with caplog.at_level(logging.WARNING, logger="folo_core.plugins"):
        registry = load_registry()
    broken = only_broken(registry, "acme-broken")
    assert (broken.distribution, broken.version, broken.problem) == ("acme-broken", "0.9", "import")
    assert error in broken.error
    assert broken.cause is not None
    assert registry.get("schedulers", "good").plugin == "acme-good"
    assert any("acme-broken (acme-broken 0.9) is broken" in record.message for record in caplog.records)


def test_an_entry_point_without_its_attribute_is_named(site):
    site.install("acme-attribute", "x = 1", entries={"acme-attribute": "acme_attribute:missing"})
    assert "AttributeError" in only_broken(load_registry(), "acme-attribute").error


def test_an_entry_point_that_names_a_class_is_named(site):
    site.install("acme-class", "class Plugin: pass", entries={"acme-class": "acme_class:Plugin"})
    assert "name a module, or an object" in only_broken(load_registry(), "acme-class").error


def test_an_entry_point_can_name_an_object(site):
    code = SCHEDULER.format(name="bound") + (
        "\n    class Plugin:\n        @hookimpl\n        def folo_schedulers(self):\n"
        "            return [SchedulerSpec(name='object', help='h', factory=lambda config: 7)]\n    made = Plugin()\n"
    )
    site.install("acme-object", code, entries={"acme-object": "acme_object:made"})
    assert load_registry().get("schedulers", "acme-object:object").build(None) == 7


def test_ctrl_c_during_import_is_not_swallowed(site):
    site.install("acme-interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_registry()


def test_a_distribution_seen_twice_on_the_path_is_loaded_once(site, monkeypatch):
    site.install("acme-twice", SCHEDULER.format(name="twice"))
    monkeypatch.syspath_prepend(str(site.path))
    monkeypatch.syspath_prepend(str(site.path / ".." / site.path.name))
    assert sys.path.count(str(site.path)) == 2
    registry = load_registry()
    assert len([part for part in registry.all("schedulers") if part.name == "twice"]) == 1
    assert not [s for s in registry.shadowed if s.distribution == "acme-twice"]
    assert not [b for b in registry.broken if b.name == "acme-twice"]


def test_a_shadowed_copy_is_reported_and_the_first_is_used(make_site):
    old, new = make_site(), make_site()
    old.install("acme-copied", SCHEDULER.format(name="old"), version="1.0")
    new.install("acme-copied", SCHEDULER.format(name="new"), version="2.0")
    registry = load_registry()
    assert [part.name for part in registry.all("schedulers") if part.plugin == "acme-copied"] == ["new"]
    [shadow] = [s for s in registry.shadowed if s.distribution == "acme-copied"]
    assert (shadow.version, shadow.used_version) == ("1.0", "2.0")
    assert shadow.location == str(old.path.resolve())


def test_a_copy_behind_one_that_is_no_plugin_is_not_loaded(make_site):
    hidden, first = make_site(), make_site()
    hidden.install("acme-hidden", SCHEDULER.format(name="hidden"), version="1.0")
    first.install("acme-hidden", "x = 1", version="2.0", entry_points="")
    registry = load_registry()
    assert "acme-hidden" not in [plugin.name for plugin in registry.plugins]
    assert [s.used_version for s in registry.shadowed if s.distribution == "acme-hidden"] == ["2.0"]


def test_two_distributions_with_one_plugin_name_are_both_refused(site):
    site.install("acme-one", SCHEDULER.format(name="one"), entries={"acme": "acme_one"})
    site.install("acme-two", SCHEDULER.format(name="two"), entries={"acme": "acme_two"})
    registry = load_registry()
    found = [broken for broken in registry.broken if broken.name == "acme"]
    assert [broken.distribution for broken in found] == ["acme-one", "acme-two"]
    assert all("acme-one and acme-two" in broken.error for broken in found)
    assert "acme" not in [plugin.name for plugin in registry.plugins]


def test_one_module_under_two_names_is_loaded_once(site):
    entries = {"acme-a": "acme_aliased", "acme-b": "acme_aliased"}
    site.install("acme-aliased", SCHEDULER.format(name="aliased"), entries=entries)
    registry = load_registry()
    assert loaded(registry, "acme-a").distribution == "acme-aliased"
    assert "loaded already" in only_broken(registry, "acme-b").error


@pytest.mark.parametrize("name", ["Acme", "acme:colon", "-acme", "acme spaced"])
def test_a_plugin_name_that_cannot_be_told_apart_is_refused(site, name):
    site.install("acme-named", SCHEDULER.format(name="named"), entries={name: "acme_named"})
    broken = only_broken(load_registry(), name)
    assert (broken.problem, broken.distribution) == ("name", "acme-named")


def test_a_malformed_entry_point_file_breaks_its_own_distribution_only(site):
    site.install("acme-malformed", SCHEDULER.format(name="malformed"), entry_points="[folo]\nno equals sign\n")
    site.install("acme-good", SCHEDULER.format(name="good"))
    registry = load_registry()
    assert "entry_points.txt" in only_broken(registry, "acme-malformed").error
    assert registry.get("schedulers", "good")


def test_bytes_in_a_stranger_s_entry_points_are_survived(site):
    site.install("acme-good", SCHEDULER.format(name="good"))
    stranger = site.path / "stranger-1.0.dist-info"
    stranger.mkdir()
    (stranger / "entry_points.txt").write_bytes(b"\xff\xfe[console_scripts]")
    assert load_registry().get("schedulers", "good")


def test_a_distribution_without_metadata_still_loads(site):
    site.install("acme-bare", SCHEDULER.format(name="bare"))
    (site.path / "acme_bare-1.0.dist-info" / "METADATA").unlink()
    assert load_registry().get("schedulers", "bare").plugin == "acme-bare"


# --- what a hook may not do ------------------------------------------------------------------------------------------


def misspelt():
    made = plugin("misspelt")
    made.folo_sampler = hookimpl(fails(AssertionError("a misspelt hook was called")))
    return made


def unmarked():
    made = plugin("unmarked")
    made.folo_samplers = fails(AssertionError("an unmarked function was called"))
    return made


def with_argument():
    made = plugin("argument")
    made.folo_samplers = hookimpl(lambda vocab_size: [])
    return made


def wrapper():
    def wrap():
        return (yield)

    made = plugin("wrapper")
    made.folo_samplers = hookimpl(wrap, wrapper=True)
    return made


def fails(error: BaseException):
    def answer():
        raise error

    return answer


BROKEN_HOOKS = {
    "misspelt": (misspelt, "hooks", "unknown hook 'folo_sampler': did you mean 'folo_samplers'?"),
    "unmarked": (unmarked, "hooks", "folo_samplers is not marked: put @hookimpl"),
    "argument": (with_argument, "hooks", "vocab_size"),
    "wrapper": (wrapper, "hooks", "folo_samplers is a wrapper"),
    "empty": (lambda: plugin("empty"), "hooks", "implements no hook"),
    "raises": (lambda: plugin("raises", samplers=fails(KeyError("x"))), "hooks", "folo_samplers raised KeyError: 'x'"),
    "exits": (lambda: plugin("exits", samplers=fails(SystemExit(1))), "hooks", "folo_samplers raised SystemExit: 1"),
    "none": (lambda: plugin("none", samplers=None), "hooks", "returned NoneType: return a list of SamplerSpec"),
    "single": (lambda: plugin("single", samplers=sampler("x")), "hooks", "returned SamplerSpec: return a list"),
    "generator": (lambda: plugin("generator", samplers=lambda: iter([sampler("x")])), "hooks", "return a list"),
    "text": (lambda: plugin("text", samplers="abc"), "hooks", "returned str: return a list of SamplerSpec"),
    "item": (lambda: plugin("item", samplers=[scheduler("x")]), "hooks", "a list with SchedulerSpec: only SamplerSpec"),
    "twice": (lambda: plugin("twice", samplers=[sampler("x"), sampler("x")]), "hooks", "offers samplers 'x' twice"),
    "old": (lambda: plugin("old", samplers=[sampler("x", api_version=0)]), "api-version", "made for plugin API 0"),
    "new": (
        lambda: plugin("new", samplers=[sampler("x", api_version=API_VERSION + 1)]),
        "api-version",
        f"this folo-core has {API_VERSION}",
    ),
    "odd": (lambda: plugin("odd", samplers=[sampler("x", api_version="1")]), "api-version", "plugin API '1'"),
    "spec": (lambda: plugin("spec", samplers=lambda: [sampler("Not A Name")]), "hooks", "raised ValueError"),
}


@pytest.mark.parametrize("case", BROKEN_HOOKS)
def test_a_wrong_hook_is_named_and_its_plugin_left_out_whole(case):
    make, problem, message = BROKEN_HOOKS[case]
    culprit = make()
    if not hasattr(culprit, "folo_schedulers") and case != "empty":
        # Something right beside the wrong: none of it may get in.
        culprit.folo_schedulers = hookimpl(lambda: [scheduler("half")])
    registry = load(plugin("before", schedulers=[scheduler("first")]), culprit, plugin("then", samplers=[sampler("y")]))
    broken = only_broken(registry, culprit.__name__)
    assert broken.problem == problem
    assert message in broken.error
    assert [part.name for part in registry.all("schedulers")] == ["first"]
    assert [part.name for part in registry.all("samplers")] == ["y"]
    assert not registry.plugin_manager.is_registered(culprit)
    with pytest.raises(PluginError) as caught:
        load(make(), strict=True)
    assert message in str(caught.value)
    assert caught.value.plugin == culprit.__name__


def test_an_object_that_raises_at_every_touch_is_isolated(site):
    code = """
        class Hostile:
            def __getattribute__(self, name):
                raise ZeroDivisionError(name)
        made = Hostile()
    """
    site.install("acme-hostile", code, entries={"acme-hostile": "acme_hostile:made"})
    site.install("acme-later", SCHEDULER.format(name="later"))
    registry = load_registry()
    assert "ZeroDivisionError" in only_broken(registry, "acme-hostile").error
    assert registry.get("schedulers", "later")


def test_a_hook_can_have_another_function_name_and_two_functions():
    made = plugin("acme", samplers=[sampler("one")])
    made.more = hookimpl(lambda: [sampler("two")], specname="folo_samplers")
    assert [part.name for part in load(made).all("samplers")] == ["one", "two"]


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["acme-blocked", "ACME_Blocked", "acme-dist", "Acme.Dist"])
def test_a_blocked_plugin_is_not_even_imported(site, name):
    site.install("acme-dist", SCHEDULER.format(name="blocked"), entries={"acme-blocked": "acme_dist"})
    assert load_registry().get("schedulers", "blocked")
    del sys.modules["acme_dist"]
    registry = load_registry(block=[name])
    assert "acme_dist" not in sys.modules
    [blocked] = [b for b in registry.blocked if b.distribution == "acme-dist"]
    assert (blocked.name, blocked.version, blocked.reason) == ("acme-blocked", "1.0", "request")
    assert registry.unknown_blocks == ()
    with pytest.raises(PluginError, match="plugin acme-blocked is blocked by request"):
        registry.get("schedulers", "blocked")


def test_the_environment_blocks_by_a_list(site, monkeypatch):
    for name in ("acme-a", "acme-b", "acme-c"):
        site.install(name, SCHEDULER.format(name=name))
    monkeypatch.setenv("FOLO_BLOCK", " acme-a, ,acme-c,acme-misspelt")
    registry = load_registry()
    assert [b.name for b in registry.blocked] == ["acme-a", "acme-c"]
    assert {b.reason for b in registry.blocked} == {"FOLO_BLOCK"}
    assert registry.get("schedulers", "acme-b")
    assert registry.unknown_blocks == ("acme-misspelt",)


def test_a_broken_plugin_can_be_blocked(site):
    site.install("acme-broken", "import no_such_module_anywhere")
    site.install("acme-malformed", "", entry_points="[folo]\nno equals sign\n")
    registry = load_registry(block=["acme-broken", "acme-malformed"])
    assert not [broken for broken in registry.broken if broken.name.startswith("acme")]
    assert registry.unknown_blocks == ()


@pytest.mark.parametrize("switch", ["0", "false", "OFF"])
def test_without_autoload_only_what_is_asked_for_is_loaded(site, monkeypatch, switch):
    site.install("acme-a", SCHEDULER.format(name="a"))
    site.install("acme-b", SCHEDULER.format(name="b"))
    site.install("acme-malformed", "", entry_points="[folo]\nno equals sign\n")
    monkeypatch.setenv("FOLO_AUTOLOAD", switch)
    registry = load_registry(extra=["acme-b", plugin("given", schedulers=[scheduler("c")])])
    assert [p.name for p in registry.plugins] == ["folo-core", "acme-b", "given"]
    assert registry.broken == ()
    assert registry.get("executors", "in-process").distribution == "folo-core"
    assert "acme_a" not in sys.modules


def test_a_module_can_be_named_with_dots(site):
    (site.path / "acme_dotted").mkdir()
    (site.path / "acme_dotted" / "inner.py").write_text(textwrap.dedent(SCHEDULER.format(name="dotted")))
    registry = load("acme_dotted.inner")
    assert registry.get("schedulers", "acme_dotted.inner:dotted").distribution == "(none)"
    assert "ModuleNotFoundError" in only_broken(load("acme_dotted.outer"), "acme_dotted.outer").error


@pytest.mark.parametrize("variable", ["FOLO_AUTOLOAD", "FOLO_STRICT"])
def test_a_switch_takes_only_a_switch_s_values(monkeypatch, variable):
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(ConfigError, match=f"{variable}: 'maybe': set it to 0 or 1"):
        load()


def test_strict_mode_raises_every_problem_at_once(monkeypatch):
    culprits = [
        misspelt(),
        plugin("one", schedulers=[scheduler("same")]),
        plugin("two", schedulers=[scheduler("same")]),
    ]
    with pytest.raises(PluginError) as caught:
        load(*culprits, strict=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "did you mean 'folo_samplers'" in lines[0]
    assert "one:same" in lines[1]
    monkeypatch.setenv("FOLO_STRICT", "1")
    with pytest.raises(PluginError) as again:
        load(*culprits)
    assert str(again.value) == str(caught.value)
    assert load(culprits[1]).get("schedulers", "same")


# --- names -----------------------------------------------------------------------------------------------------------


def test_two_plugins_with_one_name_must_be_told_apart():
    one = plugin("acme-one", schedulers=[scheduler("same", factory=lambda _config: "one"), scheduler("own")])
    two = plugin("acme-two", schedulers=[scheduler("same", factory=lambda _config: "two")])
    for order in ([one, two], [two, one]):
        registry = load(*order)
        with pytest.raises(PluginError) as caught:
            registry.get("schedulers", "same")
        assert 'choose with "acme-one:same" or "acme-two:same"' in str(caught.value)
        assert registry.get("schedulers", "acme-one:same").build(None) == "one"
        assert registry.get("schedulers", "acme-two:same").build(None) == "two"
        assert registry.get("schedulers", "own").build(None) is None
        assert [part.qualified_name for part in registry.all("schedulers")] == [
            "acme-one:own",
            "acme-one:same",
            "acme-two:same",
        ]
        [clash] = registry.clashes
        assert (clash.kind, clash.subject) == ("schedulers", "'same'")
        with pytest.raises(PluginError, match='"acme-one:same" or "acme-two:same"'):
            registry.by_name("schedulers")
    assert [*load(one).by_name("schedulers")] == ["own", "same"]


def test_one_name_in_two_kinds_is_no_clash():
    registry = load(plugin("acme", schedulers=[scheduler("same")], samplers=[sampler("same")]))
    assert registry.clashes == ()


class OwnParams(SamplingParams):
    """A strategy's parameters."""


@pytest.mark.parametrize(
    ("claim", "subject"),
    [
        ({"sampling_types": {SamplingType.GREEDY}}, "SamplingParams with sampling type GREEDY"),
        ({"params_type": OwnParams}, f"{__name__}.OwnParams"),
    ],
)
def test_two_samplers_for_the_same_requests_clash_whatever_their_names(claim, subject):
    registry = load(
        plugin("acme-one", samplers=[sampler("alpha", **claim)]),
        plugin("acme-two", samplers=[sampler("beta", **claim), sampler("other", sampling_types={SamplingType.RANDOM})]),
    )
    [clash] = registry.clashes
    assert clash.subject == subject
    assert [part.qualified_name for part in clash.parts] == ["acme-one:alpha", "acme-two:beta"]
    assert "FOLO_BLOCK" in str(clash)
    assert registry.get("samplers", "alpha")


def test_an_unknown_name_gets_a_suggestion_and_the_choice():
    registry = load(plugin("acme", samplers=[sampler("beam"), sampler("greedy")]))
    with pytest.raises(PluginError) as caught:
        registry.get("samplers", "baem")
    assert str(caught.value) == "samplers: no plugin offers 'baem': did you mean 'beam'? available: beam, greedy"
    with pytest.raises(PluginError, match="did you mean 'acme:beam'"):
        registry.get("samplers", "amce:beam")
    with pytest.raises(PluginError, match="'sampler' is no kind of part: did you mean 'samplers'"):
        registry.get("sampler", "beam")
    with pytest.raises(PluginError, match="no plugin offers 'x': available: none"):
        registry.get("proposers", "x")


def test_a_missing_name_points_at_the_broken_plugin():
    registry = load(plugin("acme", samplers=fails(ImportError("no fancy"))))
    with pytest.raises(PluginError, match=r"plugin acme .* is broken: folo_samplers raised ImportError: no fancy"):
        registry.get("samplers", "fancy")


STAGED = [("late", 800), ("early", 100), ("b-same", 300), ("a-same", 300)]


@given(order=st.permutations(range(len(STAGED))))
def test_processors_run_by_stage_then_name_in_any_order_of_installation(order):
    plugins = [
        plugin(
            f"acme-{number}",
            logits_processors=[LogitsProcessorSpec(name=name, help="h", factory=lambda v, d: (v, d), stage=stage)],
        )
        for number, (name, stage) in enumerate(STAGED)
    ]
    registry = load(*[plugins[number] for number in order])
    assert [part.name for part in registry.all("logits_processors")] == ["early", "a-same", "b-same", "late"]


# --- hooks are called once -------------------------------------------------------------------------------------------


def test_each_hook_is_called_once_and_none_after_the_registry_is_built():
    calls = dict.fromkeys(hook_kinds(), 0)

    def count(kind):
        def answer():
            calls[kind] += 1
            return []

        return answer

    registry = load(
        plugin("counting", **{kind: count(kind) for kind in hook_kinds()}),
        plugin("other", samplers=[sampler("x")], schedulers=[scheduler("y")]),
    )
    assert set(calls.values()) == {1}

    class Poison:
        def __getattribute__(self, name):
            raise AssertionError(f"hook {name} was touched")

    registry.plugin_manager.hook = Poison()
    for kind in hook_kinds():
        registry.all(kind)
    assert registry.get("samplers", "x").build(1, 2) == (1, 2)
    registry.check_manifest(registry.manifest())
    assert set(calls.values()) == {1}
    with pytest.raises(AssertionError, match="was touched"):
        registry.plugin_manager.hook.folo_samplers()


# --- building a part -------------------------------------------------------------------------------------------------


def test_a_factory_that_raises_is_named_with_plugin_and_distribution(site):
    code = SCHEDULER.format(name="raising").replace("lambda config: config", "lambda config: 1 / config")
    site.install("acme-raising", code, version="3.1")
    part = load_registry().get("schedulers", "raising")
    with pytest.raises(PluginError) as caught:
        part.build(0)
    assert "acme-raising:raising (acme-raising 3.1): its factory raised ZeroDivisionError" in str(caught.value)
    assert (caught.value.plugin, caught.value.distribution) == ("acme-raising", "acme-raising")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert part.build(2) == 0.5


def test_a_factory_s_deliberate_refusal_keeps_its_type():
    def missing():
        raise ModelLoadError("model: 'demo': not downloaded")

    spec = ModelAliasSpec(name="demo", help="h", factory=missing)
    part = load(plugin("acme", model_aliases=[spec])).get("model_aliases", "demo")
    with pytest.raises(ModelLoadError, match="not downloaded") as caught:
        part.build()
    assert "model_aliases acme:demo" in caught.value.__notes__[0]
    assert isinstance(caught.value, FoloError)


# --- manifests -------------------------------------------------------------------------------------------------------


def test_a_worker_with_the_same_plugins_agrees(site):
    site.install("acme-a", SCHEDULER.format(name="a"), version="1.5")
    manifest = load_registry().manifest()
    assert ("acme-a", "acme-a", "1.5") in manifest
    assert list(manifest) == sorted(manifest)
    load_registry().check_manifest(json.loads(json.dumps(manifest)))


DIFFERENCES = {
    "missing here": ([("ghost", "ghost-dist", "1.0")], [], "ghost: absent here, ghost-dist 1.0 expected"),
    "extra here": ([], ["acme-a"], "acme-a: acme-a 1.5 here, absent expected"),
    "other version": ([("acme-a", "acme-a", "1.6")], ["acme-a"], "acme-a 1.5 here, acme-a 1.6 expected"),
    "other distribution": ([("acme-a", "fork", "1.5")], ["acme-a"], "acme-a 1.5 here, fork 1.5 expected"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_worker_with_other_plugins_refuses(site, case):
    added, dropped, message = DIFFERENCES[case]
    site.install("acme-a", SCHEDULER.format(name="a"), version="1.5")
    registry = load_registry()
    expected = [entry for entry in registry.manifest() if entry[0] not in dropped] + added
    with pytest.raises(PluginError) as caught:
        registry.check_manifest(expected)
    assert message in str(caught.value)
    assert str(caught.value).count(";") == 0
