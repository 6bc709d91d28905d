"""Every hook is typed, documented and tried. A hook added without one of these fails here."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import attrs
import pytest

from folo_core.plugins import hookimpl, hookspecs, specs
from folo_core.plugins.manager import load_registry
from folo_core.plugins.registry import hook_kinds

HOOKS = [name for name in vars(hookspecs) if name.startswith("folo_")]


def nothing(*_arguments):
    return None


EXAMPLES = {
    "folo_samplers": specs.SamplerSpec(name="example", help="h", factory=nothing),
    "folo_model_loaders": specs.ModelLoaderSpec(name="example", help="h", factory=nothing, can_load=nothing),
    "folo_model_aliases": specs.ModelAliasSpec(name="example", help="h", factory=nothing),
    "folo_schedulers": specs.SchedulerSpec(name="example", help="h", factory=nothing),
    "folo_attention_backends": specs.AttentionBackendSpec(name="example", help="h", factory=nothing, supports=nothing),
    "folo_executors": specs.ExecutorSpec(name="example", help="h", factory=nothing),
    "folo_logits_processors": specs.LogitsProcessorSpec(name="example", help="h", factory=nothing),
    "folo_proposers": specs.ProposerSpec(name="example", help="h", factory=nothing),
    "folo_observers": specs.ObserverSpec(name="example", help="h", factory=nothing),
    "folo_config_sections": specs.ConfigSectionSpec(name="example", help="h", section_type=object),
    "folo_config_migrations": specs.ConfigMigrationSpec(
        name="example", help="h", section="example", from_version=1, migrate=dict
    ),
    "folo_commands": specs.CommandSpec(name="example", help="h", factory=nothing),
}
"""One plugin answer per hook; ``test_a_hook_s_answer_reaches_the_registry`` tries each."""


def test_there_are_hooks():
    assert len(HOOKS) == len(hook_kinds()) >= 12


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented(hook):
    doc = inspect.getdoc(getattr(hookspecs, hook)) or ""
    assert len(doc.split()) >= 3
    assert doc.endswith(".")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_returns_a_sequence_of_one_kind_of_spec(hook):
    signature = inspect.signature(getattr(hookspecs, hook))
    assert not signature.parameters
    assert signature.return_annotation.startswith("Sequence[")
    spec = hook_kinds()[hook.removeprefix("folo_")]
    assert issubclass(spec, specs.Spec)
    assert spec.__name__ in signature.return_annotation
    assert attrs.has(spec)
    assert inspect.getdoc(spec)


def test_no_two_hooks_share_a_spec():
    assert len(set(hook_kinds().values())) == len(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_named_by_a_test_and_its_answer_reaches_the_registry(hook):
    spec = EXAMPLES[hook]
    plugin = types.SimpleNamespace(__name__="acme", **{hook: hookimpl(lambda: [spec])})
    registry = load_registry(autoload=False, extra=[plugin], strict=True)
    kind = hook.removeprefix("folo_")
    part = registry.get(kind, "acme:example")
    assert part.spec is spec
    assert part in registry.all(kind)
    assert part.kind == kind


@pytest.mark.parametrize("spec", hook_kinds().values(), ids=lambda spec: spec.__name__)
def test_a_spec_s_fields_are_documented(spec):
    from folo_core.plugins.fields import field_docs

    docs = field_docs(spec)
    undocumented = {field.name for field in attrs.fields(spec)} - docs.keys() - {"api_version"}
    assert undocumented <= {"section", "from_version", "migrate"}
    assert "name" in docs


@pytest.mark.parametrize("name", ["Upper", "1st", "two words", "a:b", "", "trailing-", "-lead", "a--b"])
def test_a_part_s_name_is_checked(name):
    with pytest.raises(ValueError, match="name"):
        specs.SchedulerSpec(name=name, help="h", factory=nothing)


def test_a_part_needs_a_line_of_help():
    with pytest.raises(ValueError, match="help"):
        specs.SchedulerSpec(name="x", help="", factory=nothing)


DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_page_is_read_off_the_hooks_and_specs():
    page = (DOCS / "reference" / "hooks.md").read_text(encoding="utf-8")
    for module in (hookspecs, specs):
        directive = page.split(f".. automodule:: {module.__name__}\n")[1].split("..")[0]
        assert ":members:" in directive
    excluded = page.split(":exclude-members:")[1].splitlines()[0]
    assert set(excluded.replace(",", " ").split()).isdisjoint(HOOKS)


def test_the_how_to_lists_every_hook_with_its_spec_and_no_other():
    lines = (DOCS / "plugins.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `folo_")
    ]
    assert [row[0] for row in rows] == HOOKS
    for hook, spec_name, arguments, built in rows:
        spec = hook_kinds()[hook.removeprefix("folo_")]
        assert spec_name == spec.__name__
        has_factory = "factory" in attrs.fields_dict(spec)
        assert (arguments == "(no factory)") == (not has_factory)
        assert built


def test_the_plugin_modules_import_no_torch():
    modules = ["manager", "registry", "discovery", "fields", "specs", "hookspecs", "builtin"]
    code = f"import sys\nfor name in {modules}: __import__('folo_core.plugins.' + name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_type_hints_of_the_registry_resolve():
    hints = typing.get_type_hints(load_registry, localns={"Iterable": list, "Registry": object})
    assert hints["strict"] is bool
