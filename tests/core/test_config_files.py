"""Reading and writing configurations: round trips, layers, versions, plugin sections, and files that are wrong."""

from __future__ import annotations

import json
import tomllib
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from folo_core.config import (
    CURRENT_VERSION,
    EngineConfig,
    ModelConfig,
    describe_fields,
    dumps_env,
    dumps_json,
    dumps_toml,
    load,
    structure,
    unstructure,
)
from folo_core.config.engine import SECTIONS
from folo_core.config.migrations import MIGRATIONS, migrate
from folo_core.config.sections import HINTS
from folo_core.errors import ConfigError
from folo_core.validation import Checked, integer
from strategies import engine_configs, few, plain_data, plain_tables, text

if TYPE_CHECKING:
    from decimal import Decimal


def problems(function, *args, **options):
    with pytest.raises(ConfigError) as caught:
        function(*args, **options)
    return caught.value.problems


def attempt(*args, **options):
    """What load gives: the config, or None and its problems."""
    try:
        return load(*args, **options), []
    except ConfigError as error:
        return None, error.problems


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = 3


class Mode(Enum):
    FAST = "fast"
    EXACT = "exact"


@attrs.frozen(kw_only=True)
class TraceSection:
    """A plugin's section as its author would write it: plain attrs, with validators."""

    CONFIG_VERSION = 3

    width: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    ratio: float = attrs.field(default=0.5, validator=[attrs.validators.gt(0), attrs.validators.lt(1)])
    enabled: bool = True
    mode: Mode = Mode.FAST
    kind: Literal["a", "b"] = "a"
    tags: tuple[str, ...] = ()
    folder: Path | None = None
    inner: Inner = attrs.field(factory=Inner)
    limits: dict[str, int] = attrs.field(factory=dict)


@attrs.frozen(slots=True, kw_only=True)
class BeamSection(Checked):
    width: int = attrs.field(default=4, metadata=integer(low=1))
    groups: int = 1

    def check(self):
        return [*super().check(), *(["groups: must divide width"] if self.width % self.groups else [])]


PLUGINS = {"folo-trace": TraceSection, "beam": BeamSection}
TRACE_MIGRATIONS = {
    ("folo-trace", 1): lambda table: {("size" if name == "wide" else name): value for name, value in table.items()},
    ("folo-trace", 2): lambda table: {("width" if name == "size" else name): value for name, value in table.items()},
}


class TestRoundTrips:
    @few
    @given(engine_configs())
    def test_json(self, config):
        assert load(json.loads(dumps_json(config))) == config

    @few
    @given(engine_configs(null=False))
    def test_toml(self, config):
        assert load(tomllib.loads(dumps_toml(config))) == config

    @few
    @given(engine_configs())
    def test_environment(self, config):
        env = dumps_env(config)
        assert all(name.startswith("FOLO_") and value for name, value in env.items())
        assert load(env=env) == config

    @few
    @given(engine_configs())
    def test_mappings(self, config):
        assert structure(EngineConfig, unstructure(config)) == config

    @given(plain_tables())
    def test_values_keep_their_types(self, extra):
        config = EngineConfig(model="demo", extra_config=extra)
        assert json.dumps(unstructure(load(json.loads(dumps_json(config))).extra_config)) == json.dumps(extra)

    @pytest.mark.parametrize(("suffix", "dumps"), [(".toml", dumps_toml), (".json", dumps_json), (".TOML", dumps_toml)])
    def test_files(self, tmp_path, suffix, dumps):
        config = EngineConfig(model="demo", cache={"block_size": 32}, extra_config={"é": "✓"})
        path = tmp_path / f"folo{suffix}"
        path.write_text(dumps(config), encoding="utf-8")
        assert load(path) == load(str(path)) == config
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark, as some editors write
        assert load(path) == config

    def test_typed_plugin_sections(self):
        sections = {
            "folo-trace": {"width": 7, "mode": "exact", "tags": ["x"], "folder": "traces", "inner": {"depth": 1}},
            "beam": {"width": 6, "groups": 2},
        }
        config = load({"model": "demo", "plugins": sections}, sections=PLUGINS)
        assert config.plugins["folo-trace"] == TraceSection(
            width=7,
            mode=Mode.EXACT,
            tags=("x",),
            folder=Path("traces"),
            inner=Inner(depth=1),
        )
        for text_of, parse in ((dumps_json, json.loads), (dumps_toml, tomllib.loads)):
            tables = parse(text_of(config))
            assert tables["plugins"]["folo-trace"]["config_version"] == 3
            assert load(tables, sections=PLUGINS) == config
        assert load(env=dumps_env(config), sections=PLUGINS) == config

    def test_toml_refuses_a_null_that_leaving_out_would_change(self):
        @attrs.frozen(kw_only=True)
        class Odd:
            limit: int | None = 5

        config = EngineConfig(model="demo", plugins={"odd": Odd(limit=None)}, extra_config={"a": [1, None], "b": None})
        assert problems(dumps_toml, config) == [
            "plugins.odd.limit: None: TOML has no null; leave it out, or write JSON",
            "extra_config.a[1]: None: TOML has no null; leave it out, or write JSON",
            "extra_config.b: None: TOML has no null; leave it out, or write JSON",
        ]
        assert load(json.loads(dumps_json(config)), sections={"odd": Odd}) == config


class TestLayers:
    def test_options_win_over_the_environment_over_the_file(self, tmp_path):
        path = tmp_path / "folo.toml"
        path.write_text('[model]\nmodel = "a"\nseed = 1\n[cache]\nblock_size = 8\nnum_blocks = 9\n', encoding="utf-8")
        env = {"FOLO_MODEL__MODEL": "b", "FOLO_CACHE__BLOCK_SIZE": "32", "FOLO_MODEL__SEED": ""}
        config = load(path, env=env, options={"model": "c", "max_num_seqs": 3})
        assert (config.model.model, config.model.seed) == ("c", 1)
        assert (config.cache.block_size, config.cache.num_blocks) == (32, 9)
        assert config.scheduler.max_num_seqs == 3
        assert load(path, env=env).model.model == "b"
        assert load(path, env=env, options={"cache": {"num_blocks": 5}}).cache.block_size == 32

    def test_a_model_by_its_name_alone_takes_further_layers(self):
        config = load({"model": "demo"}, env={"FOLO_MODEL__SEED": "4"}, options={"dtype": "half"})
        assert (config.model.model, config.model.seed, config.model.dtype) == ("demo", 4, "float16")

    def test_quantization_comes_from_files_the_environment_and_options(self, tmp_path):
        path = tmp_path / "folo.toml"
        path.write_text('[model]\nmodel = "a"\nquantization = "int8"\n', encoding="utf-8")
        assert load(path).model.quantization == "int8"
        assert load(path, env={"FOLO_MODEL__QUANTIZATION": "int4"}).model.quantization == "int4"
        assert load(path, options={"quantization": None}).model.quantization is None

    def test_the_environment_is_read_only_where_it_is_given(self, monkeypatch):
        monkeypatch.setenv("FOLO_CACHE__BLOCK_SIZE", "7")
        assert load({"model": "demo"}).cache.block_size == 16

    @pytest.mark.parametrize(
        ("variable", "value", "path", "read"),
        [
            ("FOLO_MODEL", "demo2", "model.model", "demo2"),
            ("FOLO_CACHE__KV_CACHE_BYTES", "2GiB", "cache.kv_cache_bytes", 2**31),
            ("FOLO_CACHE__ENABLE_PREFIX_CACHING", "yes", "cache.enable_prefix_caching", True),
            ("FOLO_SCHEDULER__ENABLE_CHUNKED_PREFILL", "0", "scheduler.enable_chunked_prefill", False),
            ("FOLO_CACHE__GPU_MEMORY_UTILIZATION", "0.25", "cache.gpu_memory_utilization", 0.25),
            ("FOLO_STEP_TIMEOUT_S", "2", "step_timeout_s", 2.0),
            ("FOLO_BLOCKED_PLUGINS", "a, b", "blocked_plugins", ("a", "b")),
            ("FOLO_BLOCKED_PLUGINS", '["a,b"]', "blocked_plugins", ("a,b",)),
            ("FOLO_EXTRA_CONFIG", '{"a": 1}', "extra_config", {"a": 1}),
            ("FOLO_EXTRA_CONFIG__DEPTH__LIMIT", "3", "extra_config", {"depth": {"limit": 3}}),
            ("FOLO_EXTRA_CONFIG__NAME", "plain words", "extra_config", {"name": "plain words"}),
            ("FOLO_PLUGINS__BEAM__WIDTH", "8", "plugins", {"beam": {"width": 8}}),
        ],
    )
    def test_variables(self, variable, value, path, read):
        found = load({"model": "demo"}, env={variable: value})
        for name in path.split("."):
            found = getattr(found, name)
        assert found == read

    def test_variables_reach_typed_sections_under_a_shells_name(self):
        env = {
            "FOLO_PLUGINS__FOLO_TRACE__WIDTH": "8",
            "FOLO_PLUGINS__FOLO_TRACE__TAGS": "a,b",
            "FOLO_PLUGINS__FOLO_TRACE__ENABLED": "off",
            "FOLO_PLUGINS__FOLO_TRACE__INNER": '{"depth": 9}',
            "FOLO_PLUGINS__FOLO_TRACE__MODE": "exact",
        }
        trace = load({"model": "demo"}, env=env, sections=PLUGINS).plugins["folo-trace"]
        assert trace == TraceSection(width=8, tags=("a", "b"), enabled=False, inner=Inner(depth=9), mode=Mode.EXACT)

    def test_a_variable_inside_a_table_given_as_json_refines_it(self):
        env = {"FOLO_EXTRA_CONFIG": '{"a": 1, "b": {"c": 2}}', "FOLO_EXTRA_CONFIG__B__D": "3"}
        assert load({"model": "demo"}, env=env).extra_config == {"a": 1, "b": {"c": 2, "d": 3}}

    @pytest.mark.parametrize("variable", ["FOLO_HOME", "FOLO_CACHE", "FOLO_LOG", "FOLOX_CACHE__BLOCK_SIZE", "PATH"])
    def test_other_variables_are_left_alone(self, variable):
        assert load({"model": "demo"}, env={variable: "anything"}) == EngineConfig(model="demo")

    def test_bad_variables_are_all_named(self):
        env = {
            "FOLO_CACHE__BLOCK_SIZE": "many",
            "FOLO_CACHE__BLOK_SIZE": "16",
            "FOLO_STRICT_PLUGINS": "perhaps",
            "FOLO_CASH__SIZE": "1",
        }
        assert sorted(problems(load, {"model": "demo"}, env=env)) == [
            "cache.block_size: 'many': must be a power of two from 1 to 256",
            "cache.blok_size: 16: unknown; did you mean 'block_size'?",
            "cash: {'size': 1}: unknown; did you mean 'cache'?",
            "strict_plugins: 'perhaps': must be true or false",
        ]

    def test_a_layer_does_not_cover_up_a_section_of_the_wrong_type(self):
        assert problems(load, {"cache": 5}, options={"model": "demo"}) == [
            "cache: 5: must be a CacheConfig or a table of its fields"
        ]

    def test_nothing_at_all_asks_for_a_model(self):
        for lines in (problems(load), problems(load, env={}, options={})):
            assert [line.split(": ")[:2] for line in lines] == [["model.model", "missing"]]

    def test_problems_of_all_layers_come_together(self):
        lines = problems(
            load,
            {"model": "demo", "cache": {"block_size": 3}, "plugins": {"beem": {}, "beam": {"width": 0}}},
            env={"FOLO_SCHEDULER__MAX_NUM_SEQS": "-1"},
            options={"seeed": 3},
            sections=PLUGINS,
        )
        assert [line.split(": ")[0] for line in lines] == [
            "seeed",
            "plugins.beem",
            "plugins.beam.width",
            "cache.block_size",
            "scheduler.max_num_seqs",
        ]


class TestVersions:
    @few
    @given(engine_configs(null=False))
    def test_a_file_of_version_1_loads(self, config):
        tables = tomllib.loads(dumps_toml(config))
        tables["gpu_memory_fraction"] = tables["cache"].pop("gpu_memory_utilization")
        tables["config_version"] = 1
        before = json.dumps(tables)
        assert load(tables) == config
        assert json.dumps(tables) == before  # the caller's tables are not touched

    @given(plain_tables())
    def test_migrating_what_is_current_changes_nothing(self, tables):
        tables.pop("config_version", None)
        assert migrate(tables) == tables | {"config_version": CURRENT_VERSION}

    def test_every_version_has_its_migration(self):
        assert sorted(MIGRATIONS) == list(range(1, CURRENT_VERSION))

    def test_without_a_version_a_file_is_current_and_old_names_are_explained(self):
        [line] = problems(load, {"model": "demo", "gpu_memory_fraction": 0.5})
        assert (
            line == "gpu_memory_fraction: 0.5: the version 1 name of cache.gpu_memory_utilization; give that one alone"
        )

    def test_an_old_name_beside_the_new_one_is_not_decided(self):
        tables = {"config_version": 1, "model": "demo", "gpu_memory_fraction": 0.5}
        assert problems(load, tables | {"cache": {"gpu_memory_utilization": 0.7}})[0].startswith(
            "gpu_memory_fraction: 0.5"
        )
        assert len(problems(load, tables | {"cache": 5})) == 2

    def test_a_newer_version_is_refused_with_the_mend(self):
        newer = CURRENT_VERSION + 1
        assert problems(load, {"config_version": newer, "novelty": 1}) == [
            f"config_version: {newer}: newer than folo-core understands ({CURRENT_VERSION}); upgrade folo-core"
        ]

    @pytest.mark.parametrize("version", [0, -1, "2", True, 1.0, None, []])
    def test_a_version_that_is_none(self, version):
        [line] = problems(load, {"model": "demo", "config_version": version})
        assert line.endswith(f"must be an integer from 1 to {CURRENT_VERSION}")

    def test_plugin_sections_have_versions_of_their_own(self):
        def trace(**table):
            config = load(
                {"model": "demo", "plugins": {"folo-trace": table}}, sections=PLUGINS, migrations=TRACE_MIGRATIONS
            )
            return config.plugins["folo-trace"]

        assert trace(config_version=1, wide=9) == trace(config_version=2, size=9) == trace(config_version=3, width=9)
        assert trace(width=9).width == 9
        assert problems(trace, config_version=4)[0].startswith(
            "plugins.folo-trace.config_version: 4: newer than plugin section folo-trace understands (3)"
        )

    def test_a_missing_migration_is_named(self):
        tables = {"model": "demo", "plugins": {"folo-trace": {"config_version": 1}}}
        assert problems(load, tables, sections=PLUGINS) == [
            "plugins.folo-trace.config_version: 1: plugin section folo-trace has no migration from it; write version 3"
        ]


class TestPluginSections:
    def test_without_classes_sections_stay_tables_until_they_are_typed(self):
        config = load({"model": "demo", "plugins": {"beam": {"width": 6}}})
        assert config.plugins["beam"] == {"width": 6}
        typed = config.with_sections(PLUGINS)
        assert typed.plugins["beam"] == BeamSection(width=6)
        assert typed.plugins["folo-trace"] == TraceSection()
        assert typed.with_sections(PLUGINS) == typed
        assert config.plugins["beam"] == {"width": 6}

    def test_an_unclaimed_section_is_refused_with_the_closest_name(self):
        config = load({"model": "demo", "plugins": {"folo_trace": {}}})
        assert problems(config.with_sections, PLUGINS) == [
            "plugins.folo_trace: {}: unknown; did you mean 'folo-trace'?; is the plugin installed?"
        ]

    @pytest.mark.parametrize(
        ("table", "line"),
        [
            ({"width": "7"}, "width: '7': must be int"),
            ({"width": True}, "width: True: must be int"),
            ({"ratio": "x"}, "ratio: 'x': must be float"),
            ({"enabled": 1}, "enabled: 1: must be bool"),
            ({"mode": "slow"}, "mode: 'slow': must be Mode"),
            ({"kind": "c"}, "kind: 'c': must be Literal['a', 'b']"),
            ({"tags": [1]}, "tags: (1,): must be tuple[str, ...]"),
            ({"inner": {"depth": "x"}}, "inner.depth: 'x': must be int"),
            ({"inner": 5}, "inner: 5: must be a table with the fields depth"),
            ({"inner": {"dept": 1}}, "inner.dept: 1: unknown; did you mean 'depth'?"),
            ({"width": 0}, "width: 0: 'width' must be >= 1: 0"),
            ({"ratio": 1.0}, "ratio: 1.0: 'ratio' must be < 1: 1.0"),
        ],
    )
    def test_a_plain_attrs_class_is_judged_field_by_field(self, table, line):
        config = load({"model": "demo", "plugins": {"folo-trace": table}})
        assert problems(config.with_sections, PLUGINS) == [f"plugins.folo-trace.{line}"]

    def test_all_its_problems_come_at_once(self):
        table = {"width": 0, "ratio": 2.0, "mode": "slow", "inner": {"depth": "x"}, "other": 1}
        lines = problems(load({"model": "demo", "plugins": {"folo-trace": table}}).with_sections, PLUGINS)
        assert sorted(line.split(": ")[0].removeprefix("plugins.folo-trace.") for line in lines) == [
            "inner.depth",
            "mode",
            "other",
            "ratio",
            "width",
        ]

    def test_a_section_that_is_no_table(self):
        config = load({"model": "demo"})
        config = attrs.evolve(config, plugins={"beam": Inner()})
        [line] = problems(config.with_sections, {"beam": BeamSection})
        assert line == "plugins.beam: Inner(depth=3): must be a table with the fields width, groups"

    def test_validators_that_need_the_object_are_run_with_it(self):
        @attrs.frozen(kw_only=True)
        class Pair:
            low: int = 0
            high: int = attrs.field(default=1)

            @high.validator
            def _ordered(self, _attribute, value):
                if value < self.low:
                    message = f"high must be >= low ({self.low})"
                    raise ValueError(message)

        assert structure(Pair, {"low": 1, "high": 2}) == Pair(low=1, high=2)
        assert problems(structure, Pair, {"low": 3, "high": 2}) == [
            "Pair: {'high': 2, 'low': 3}: high must be >= low (3)"
        ]

    def test_missing_fields_are_named(self):
        @attrs.frozen(kw_only=True)
        class Needs:
            path: Path
            size: int

        assert problems(structure, Needs, {"size": "x"}) == ["path: missing: must be Path", "size: 'x': must be int"]

    def test_annotations_that_do_not_exist_at_run_time_are_explained(self):
        @attrs.frozen(kw_only=True)
        class Hidden:
            ratio: Decimal = 0

        [line] = problems(structure, Hidden, {"ratio": 1})
        assert line.startswith("Hidden: name 'Decimal' is not defined: import what its annotations name at run time")

    def test_fields_without_annotation_take_anything(self):
        loose = attrs.make_class("Loose", {"value": attrs.field(default=None)}, kw_only=True)
        assert structure(loose, {"value": [1]}) == loose(value=[1])


class TestWrongFiles:
    def write(self, tmp_path, name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.toml", "[model\nmodel = 1", "mend the file's syntax (UTF-8 TOML)"),
            ("a.toml", b'[model]\nmodel = "\xff"', "can't decode byte 0xff"),
            ("a.toml", "[model]\n[model]", "mend the file's syntax"),
            ("a.json", '{"model": "demo"', "mend the file's syntax (UTF-8 JSON)"),
            ("a.json", '{"model": "a", "model": "b"}', "given twice: model"),
            ("a.json", '{"max_logprobs": NaN}', "NaN is no JSON number"),
            ("a.json", "[" * 100_000, "nested too deeply"),
            ("a.toml", "a = " + "[" * 100_000, "nested too deeply"),
            ("a.json", '{"max_logprobs": ' + "9" * 5000 + "}", "mend the file's syntax"),
            ("a.json", "[1, 2]", "must be a table of sections such as model, cache"),
            ("a.json", "", "mend the file's syntax"),
            ("a.yaml", "model: demo", "name the file .toml or .json"),
            ("folo", "", "no suffix: name the file .toml or .json"),
            ("a.toml", b"#" * (2**20 + 1), "too long for a configuration file"),
        ],
    )
    def test_the_file_and_the_reason_are_named(self, tmp_path, name, content, reason):
        path = self.write(tmp_path, name, content)
        [line] = problems(load, path)
        assert line.startswith(f"{path}: ")
        assert reason in line
        assert len(line) < 1000

    @pytest.mark.parametrize("path", ["missing.toml", ".", "a\0b.toml"])
    def test_a_file_that_cannot_be_read(self, path):
        [line] = problems(load, path)
        assert "give a readable .toml or .json file" in line

    @pytest.mark.parametrize("dumps", [dumps_json, dumps_toml])
    def test_a_file_cut_off_anywhere_is_refused_or_still_a_configuration(self, tmp_path, dumps):
        content = dumps(EngineConfig(model="demo", extra_config={"a": [1, {"b": "é"}]})).encode()
        path = tmp_path / f"a.{dumps.__name__.removeprefix('dumps_')}"
        refused = 0
        for end in range(len(content)):
            path.write_bytes(content[:end])
            config, lines = attempt(path)
            assert config is None or isinstance(config, EngineConfig)
            assert all(line.count(": ") >= 2 for line in lines)
            refused += config is None
        assert refused > len(content) // 3

    @given(content=st.binary(max_size=60) | text.map(str.encode), suffix=st.sampled_from([".json", ".toml"]))
    def test_any_bytes_are_refused_or_a_configuration(self, tmp_path_factory, content, suffix):
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        path.write_bytes(content)
        config, lines = attempt(path)
        assert bool(lines) is (config is None)

    known = st.sampled_from(
        [*(f.name for cls in (EngineConfig, *SECTIONS.values()) for f in attrs.fields(cls)), "gpu_memory_fraction"]
    )

    @given(st.dictionaries(known, plain_data() | st.dictionaries(known | text, plain_data(), max_size=4), max_size=5))
    @example({"config_version": 10**30})
    @example({"plugins": {"": {}}})
    def test_any_tables_are_refused_with_paths_or_a_configuration(self, tables):
        config, lines = attempt(tables)
        assert all(": " in line for line in lines)
        assert len(set(lines)) == len(lines)
        assert bool(lines) is (config is None)
        assert config is None or load(json.loads(dumps_json(config))) == config

    def test_unknown_fields_have_suggestions(self):
        lines = problems(
            load,
            {
                "model": {"model": "demo", "dtpye": "auto", "trust_remote_code": True},
                "cache": {"max_num_seqs": 3},
                "block_size": 8,
                "schedular": {},
            },
        )
        assert lines == [
            "block_size: 8: unknown here; it is a field of [cache]",
            "schedular: {}: unknown; did you mean 'scheduler'?",
            "model.dtpye: 'auto': unknown; did you mean 'dtype'?",
            f"model.trust_remote_code: True: {HINTS['trust_remote_code']}",
            "cache.max_num_seqs: 3: unknown here; it is a field of [scheduler]",
        ]


def test_describe_fields_lists_every_field_with_its_default():
    rows = {row["field"]: row for row in describe_fields(EngineConfig)}
    assert rows["cache.block_size"] == {
        "field": "cache.block_size",
        "default": 16,
        "required": False,
        "accepts": "must be a power of two from 1 to 256",
    }
    assert rows["model.model"]["required"] is True
    assert rows["plugins"]["default"] == {}
    leaves = {f"{s}.{field.name}" for s, cls in SECTIONS.items() for field in attrs.fields(cls)}
    assert set(rows) == leaves | {field.name for field in attrs.fields(EngineConfig)} - SECTIONS.keys()
    assert {row["accepts"] for row in describe_fields(TraceSection)} >= {"must be int", "must be Mode"}


def test_structure_takes_an_object_of_the_class_as_it_is():
    model = ModelConfig(model="demo")
    assert structure(ModelConfig, model) is model
    assert problems(structure, ModelConfig, 5)[0].startswith("ModelConfig: 5: must be a table with the fields model,")
