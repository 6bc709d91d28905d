"""Choosing parts: aliases, loaders, backends, samplers, memory, and what is refused by name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from engines import ProcessorPlugin, SamplerPlugin, TreeParams, TreeSampler, assert_clean, greedy, make_engine, run
from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.errors import ConfigError, ModelLoadError, ParamsError, PluginError
from folo_core.plugins import hookimpl
from folo_core.plugins.assembly import build_components
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import (
    AttentionBackendSpec,
    ConfigMigrationSpec,
    ConfigSectionSpec,
    ExecutorSpec,
    LogitsProcessorSpec,
    ModelAliasSpec,
    ModelLoaderSpec,
    SamplerSpec,
)
from folo_core.sampling_params import SamplingParams, SamplingType
from folo_core.testing.fakes import FakeBackend, FakeModel, FakePlugin, FakeTokenizer, fake_components

if TYPE_CHECKING:
    from pathlib import Path


class LoaderPlugin(FakePlugin):
    """A fake loader that takes every model, at a given priority, and remembers what it was asked to load."""

    def __init__(self, name: str = "greedy-loader", priority: int = 100) -> None:
        super().__init__(FakeModel(), FakeTokenizer())
        self.__name__ = name
        self.priority = priority
        self.asked: list[str] = []

    def build(self, config: EngineConfig) -> LoaderPlugin:
        self.asked.append(config.model.model)
        return self

    @hookimpl
    def folo_model_loaders(self) -> list[ModelLoaderSpec]:
        return [
            ModelLoaderSpec(
                name=self.__name__,
                help="takes all",
                factory=self.build,
                can_load=lambda _: True,
                priority=self.priority,
            )
        ]

    @hookimpl
    def folo_attention_backends(self) -> list[AttentionBackendSpec]:
        return [
            AttentionBackendSpec(
                name=f"{self.__name__}-attention",
                help="keeps token ids",
                factory=lambda _: FakeBackend(),
                supports=lambda device, dtype: None if dtype == "float32" else "float32 only",
                priority=self.priority,
            )
        ]


class AliasPlugin:
    __name__ = "alias-plugin"

    def __init__(self, path: Path) -> None:
        self.path = path

    @hookimpl
    def folo_model_aliases(self) -> list[ModelAliasSpec]:
        return [ModelAliasSpec(name="pet", help="a short name", factory=lambda: self.path)]


def build(*plugins: object, block: tuple[str, ...] = (), **options: Any) -> Any:
    config = EngineConfig.from_options(**({"num_blocks": 64, "block_size": 4} | options))
    return build_components(config, load_registry(extra=plugins, block=block))


def test_the_loader_of_the_highest_priority_that_can_load_is_taken() -> None:
    low, high = LoaderPlugin("low", 50), LoaderPlugin("high", 60)
    components = build(low, high, model="anything")
    assert (low.asked, high.asked) == ([], ["anything"])
    assert components.model_info.architecture == "FakeForCausalLM"


def test_loaders_of_equal_priority_are_the_users_to_choose_between() -> None:
    plugins = LoaderPlugin("one", 50), LoaderPlugin("two", 50)
    with pytest.raises(PluginError, match=r'loader="one:one" or loader="two:two"'):
        build(*plugins, model="x")
    build(*plugins, model="x", loader="two:two", attention="two-attention")
    assert plugins[1].asked == ["x"]


def test_an_alias_stands_for_its_path_unless_a_path_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = LoaderPlugin()
    build(loader, AliasPlugin(tmp_path / "weights"), model="pet")
    assert loader.asked == [str(tmp_path / "weights")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pet").mkdir()
    build(loader, AliasPlugin(tmp_path / "weights"), model="pet")
    assert loader.asked[-1] == "pet"


def test_without_the_demo_model_the_error_says_which_command_installs_it() -> None:
    with pytest.raises(ModelLoadError, match=r'pip install "folo-core\[demo\]"'):
        build(LoaderPlugin(), model="demo", block=("folo-demo-model",))


def test_a_backend_that_cannot_serve_says_why() -> None:
    loader = LoaderPlugin()
    object.__setattr__(loader.model.info, "dtype", "bfloat16")
    with pytest.raises(ConfigError, match="float32 only"):
        build(loader, model="x", attention="greedy-loader-attention")


class InvariantBackend:
    """A backend that promises the same bits in any batch; ``auto`` would not take it otherwise."""

    __name__ = "invariant"
    capabilities = frozenset({"batch-invariant"})

    @hookimpl
    def folo_attention_backends(self) -> list[AttentionBackendSpec]:
        return [
            AttentionBackendSpec(
                name="steady",
                help="keeps token ids",
                factory=lambda _: FakeBackend(),
                supports=lambda _device, _dtype: None,
                priority=-5,
                capabilities=self.capabilities,
            )
        ]


def test_deterministic_takes_a_backend_that_promises_it_whatever_the_priorities() -> None:
    class Marked(FakeBackend):
        pass

    plugin = InvariantBackend()
    spec = attrs.evolve(plugin.folo_attention_backends()[0], factory=lambda _: Marked())
    plugin.folo_attention_backends = hookimpl(lambda: [spec])
    for deterministic in (False, True):
        loader = LoaderPlugin()
        build(loader, plugin, model="x", deterministic=deterministic)
        assert isinstance(loader.model.backend, Marked) is deterministic
    build(LoaderPlugin(), plugin, model="x", attention="steady", deterministic=True)


def test_deterministic_refuses_a_named_backend_that_does_not_promise_it() -> None:
    with pytest.raises(ConfigError, match=r"'greedy-loader-attention'.*'batch-invariant'.*'steady'"):
        build(LoaderPlugin(), InvariantBackend(), model="x", attention="greedy-loader-attention", deterministic=True)


def test_deterministic_needs_some_backend_that_promises_it() -> None:
    with pytest.raises(PluginError, match="no installed plugin can serve float32 on cpu deterministically"):
        build(LoaderPlugin(), model="x", deterministic=True, block=("folo-attention",))


def test_deterministic_refuses_a_model_that_does_not_promise_it() -> None:
    loader = LoaderPlugin()
    loader.model.info = attrs.evolve(loader.model.info, batch_invariant=False, dtype="bfloat16", device="cuda:0")
    with pytest.raises(ConfigError, match=r"deterministic: True: .*FakeForCausalLM, bfloat16 on cuda:0.*float32"):
        build(loader, InvariantBackend(), model="x", deterministic=True)


def test_quantization_is_refused_where_the_loader_passes_it_over() -> None:
    loader = LoaderPlugin()
    with pytest.raises(ConfigError, match=r"quantization: 'int4': the loader of model 'x' gave weights in float32"):
        build(loader, model="x", quantization="int4")
    loader.model.info = attrs.evolve(loader.model.info, quantization="int8")
    with pytest.raises(ConfigError, match="gave weights in int8"):
        build(loader, model="x", quantization="int4")
    assert build(loader, model="x", quantization="int8").model_info.quantization == "int8"
    assert build(loader, model="x").model_info.quantization == "int8", "a loader may bring rounded weights of its own"


class Float8Backend(InvariantBackend):
    """A backend that stores keys and values in float8; ``auto`` would not take it otherwise."""

    __name__ = "float8"
    capabilities = frozenset({"fp8-kv"})


def rounding_loader() -> LoaderPlugin:
    loader = LoaderPlugin()
    loader.model.info = attrs.evolve(loader.model.info, kv_cache_dtype="fp8")
    return loader


def test_keys_and_values_in_float8_are_refused_where_the_loader_passes_them_over() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: 'fp8': the loader of model 'x' wants .* in float32"):
        build(LoaderPlugin(), Float8Backend(), model="x", kv_cache_dtype="fp8")


def test_keys_and_values_in_float8_take_a_backend_that_stores_them() -> None:
    components = build(rounding_loader(), Float8Backend(), model="x", kv_cache_dtype="fp8")
    assert components.model_info.kv_cache_dtype == "fp8"
    build(rounding_loader(), Float8Backend(), model="x", attention="steady", kv_cache_dtype="fp8")
    with pytest.raises(PluginError, match="can serve float32 on cpu with keys and values in float8"):
        build(rounding_loader(), InvariantBackend(), model="x", kv_cache_dtype="fp8")
    words = r"'greedy-loader-attention': lacks the capability 'fp8-kv', which kv_cache_dtype='fp8' needs: .*'steady'"
    with pytest.raises(ConfigError, match=words):
        build(rounding_loader(), Float8Backend(), model="x", attention="greedy-loader-attention", kv_cache_dtype="fp8")


def test_an_unknown_part_is_named_with_what_there_is() -> None:
    with pytest.raises(PluginError, match="did you mean 'fcfs'"):
        make_engine(policy="fcsf")


def test_several_devices_need_an_executor_that_spans_them() -> None:
    with pytest.raises(ConfigError, match="world size 2"):
        make_engine(tensor_parallel_size=2)


class NamedExecutor:
    __name__ = "ray-like"

    def __init__(self) -> None:
        self.parts: Any = None

    @hookimpl
    def folo_executors(self) -> list[ExecutorSpec]:
        return [ExecutorSpec(name="ray-like", help="spans devices", factory=self.build)]

    def build(self, parts: Any) -> Any:
        from folo_core.plugins.builtin import _in_process

        self.parts = parts
        return _in_process(parts)


def test_an_executor_plugin_gets_all_parts() -> None:
    plugin = NamedExecutor()
    engine, model = make_engine(plugins=[plugin], executor="ray-like", tensor_parallel_size=2)
    assert plugin.parts.model is model
    engine.add_request("a", [1, 2], greedy())
    assert run(engine)["a"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)


def test_parameters_pick_the_sampler_by_class_then_by_type() -> None:
    engine, _ = make_engine(plugins=[SamplerPlugin(TreeSampler())])
    find = engine.components.sampler_for
    assert find(SamplingParams(temperature=0)) == "folo-sampling:greedy"
    assert find(SamplingParams()) == "folo-sampling:random"
    assert find(TreeParams(temperature=0)) == "test-sampler:test"


def test_a_params_class_nobody_serves_is_refused_by_name() -> None:
    engine, _ = make_engine(block=["folo-best-of"])
    with pytest.raises(ParamsError, match="TreeParams"):
        engine.add_request("a", [1], TreeParams())
    with pytest.raises(ParamsError, match=r"FAN_OUT.*folo-best-of"):
        engine.add_request("a", [1], SamplingParams(n=2))


class SecondGreedy:
    __name__ = "second-greedy"

    @hookimpl
    def folo_samplers(self) -> list[SamplerSpec]:
        return [
            SamplerSpec(
                name="other", help="also greedy", factory=lambda *_: TreeSampler(), sampling_types={SamplingType.GREEDY}
            )
        ]


def test_two_samplers_for_one_kind_of_request_are_the_users_to_choose_between() -> None:
    engine, _ = make_engine(plugins=[SecondGreedy()])
    with pytest.raises(ParamsError, match="folo-sampling:greedy and second-greedy:other both serve it"):
        engine.add_request("a", [1], greedy())
    engine.add_request("b", [1], SamplingParams(max_tokens=1))
    blocked, model = make_engine(plugins=[SecondGreedy()], block=["second-greedy"])
    blocked.add_request("a", [1, 2], greedy())
    assert run(blocked)["a"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)


def test_a_request_that_its_sampler_refuses_leaves_nothing_behind() -> None:
    class Refusing(TreeSampler):
        def add_request(self, request: Any) -> None:
            raise ParamsError("width: 4: not today")

    engine, _ = make_engine(plugins=[SamplerPlugin(Refusing())])
    with pytest.raises(ParamsError, match="not today"):
        engine.add_request("a", [1], TreeParams())
    assert_clean(engine)


def test_a_params_class_of_two_strategies_is_refused_with_both_names() -> None:
    import attrs

    @attrs.frozen(slots=False, kw_only=True)
    class WideParams(SamplingParams):
        pass

    @attrs.frozen(slots=False, kw_only=True)
    class BothParams(TreeParams, WideParams):
        pass

    wide = SamplerPlugin(TreeSampler(), WideParams)
    wide.__name__ = "wide"
    engine, _ = make_engine(plugins=[SamplerPlugin(TreeSampler()), wide])
    both = r"TreeParams \(sampler test-sampler:test\) and WideParams \(sampler wide:test\): strategies cannot be comb"
    with pytest.raises(ParamsError, match=both):
        engine.add_request("a", [1], BothParams())
    engine.add_request("a", [1], TreeParams(max_tokens=2))
    engine.add_request("b", [1], WideParams(max_tokens=2))


class FailingSampler(SecondGreedy):
    __name__ = "failing-sampler"

    @hookimpl
    def folo_samplers(self) -> list[SamplerSpec]:
        def fail(*_: Any) -> Any:
            message = "no licence"
            raise RuntimeError(message)

        return [SamplerSpec(name="other", help="fails", factory=fail, params_type=TreeParams)]


def test_a_sampler_that_cannot_be_built_is_left_out_and_named_or_stops_a_strict_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        engine, model = make_engine(plugins=[FailingSampler()])
    assert "failing-sampler:other" in caplog.text
    assert "no licence" in caplog.text
    engine.add_request("a", [1, 2], greedy())
    assert run(engine)["a"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)
    with pytest.raises(PluginError, match="no licence"):
        make_engine(plugins=[FailingSampler()], strict_plugins=True)


class FailingProcessor(ProcessorPlugin):
    @hookimpl
    def folo_logits_processors(self) -> list[LogitsProcessorSpec]:
        def fail(*_: Any) -> Any:
            message = "no licence"
            raise RuntimeError(message)

        return [LogitsProcessorSpec(name="test", help="fails", factory=fail)]


def test_a_processor_that_cannot_be_built_stops_the_start() -> None:
    with pytest.raises(PluginError, match="no licence"):
        make_engine(plugins=[FailingProcessor(lambda _: True, lambda logits, _: logits)])


@pytest.mark.parametrize(
    "field", [{"presence_penalty": 1.0}, {"logit_bias": {1: 2.0}}, {"min_tokens": 2}, {"allowed_token_ids": [1]}]
)
def test_a_field_that_no_installed_processor_serves_is_refused_rather_than_ignored(field: dict[str, Any]) -> None:
    engine, _ = make_engine(block=["folo-sampling"], plugins=[SecondGreedy()])
    with pytest.raises(ParamsError, match=next(iter(field))):
        engine.add_request("a", [1], greedy(**field))
    served, _ = make_engine()
    served.add_request("a", [1], greedy(**field))


def test_the_cache_is_sized_by_bytes_or_blocks_and_bounds_the_length(caplog: pytest.LogCaptureFixture) -> None:
    by_bytes = fake_components(num_blocks=None, kv_cache_bytes=8 * 4 * 100)
    assert by_bytes.kv_blocks == 101
    with caplog.at_level(logging.WARNING):
        short = fake_components(num_blocks=10)
    assert short.config.scheduler.max_model_len == 40
    assert "max_model_len is 40" in caplog.text
    with pytest.raises(ConfigError, match="max_model_len: 200"):
        fake_components(num_blocks=10, max_model_len=200)
    with pytest.raises(ConfigError, match="300"):
        fake_components(max_model_len=300)


def test_the_default_cache_is_what_the_longest_sequences_need_at_most() -> None:
    components = fake_components(num_blocks=None, max_num_seqs=3)
    assert components.kv_blocks == 3 * 256 // 4 + 1


class SectionPlugin:
    __name__ = "section-plugin"

    @hookimpl
    def folo_config_sections(self) -> list[ConfigSectionSpec]:
        import attrs

        @attrs.frozen(kw_only=True)
        class Section:
            CONFIG_VERSION = 2
            depth: int = 3

        return [ConfigSectionSpec(name="deep", help="a section", section_type=Section)]

    @hookimpl
    def folo_config_migrations(self) -> list[ConfigMigrationSpec]:
        return [
            ConfigMigrationSpec(
                name="deep-1", help="level became depth", section="deep", from_version=1,
                migrate=lambda table: {"depth": table["level"]},
            )
        ]  # fmt: skip


def test_plugin_sections_are_typed_and_migrated() -> None:
    config = EngineConfig(model="x", plugins={"deep": {"level": 5, "config_version": 1}})
    loader = LoaderPlugin()
    built = build_components(config, load_registry(extra=[loader, SectionPlugin()]))
    assert built.config.plugins["deep"].depth == 5
    with pytest.raises(ConfigError, match="plugins"):
        build_components(EngineConfig(model="x", plugins={"nobody": {}}), load_registry(extra=[loader]))


def test_an_engine_needs_no_tokenizer() -> None:
    plugin = LoaderPlugin()
    plugin.tokenizer = None
    engine = Engine(build(plugin, model="x", skip_tokenizer_init=True))
    engine.add_request("a", [1, 2], greedy())
    assert run(engine)["a"].outputs[0].text == ""
    with pytest.raises(ParamsError, match="skip_tokenizer_init"):
        engine.add_request("b", [1, 2], greedy(stop="x"))
    from folo_core.errors import RequestError

    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        engine.add_request("c", "text", greedy())
