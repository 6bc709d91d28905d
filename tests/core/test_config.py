"""The config's sections: defaults, rules of a field, between fields and between sections, and flat options."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_core.config import (
    CURRENT_VERSION,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    unstructure,
)
from folo_core.config.cache import as_bytes
from folo_core.config.engine import ALIASES, SECTIONS, option_routes
from folo_core.errors import ConfigError
from folo_core.validation import FrozenMap, show
from strategies import BAD_FIELDS, bad_fields, cache_configs, engine_configs, few, model_configs, scheduler_configs

REQUIRED = {ModelConfig: {"model": "demo"}, EngineConfig: {"model": "demo"}}
ENGINE_BAD = {
    "max_logprobs": [-2, True, "20", 1.5, None],
    "max_sequences_per_request": [0, True, "1", None],
    "step_timeout_s": [0, -1.0, float("nan"), float("inf"), "1", True],
    "deterministic": [1, "yes", None],
    "strict_plugins": [1, "yes", None],
    "blocked_plugins": [[""], [5], 5, {"a": 1}, None],
    "config_version": [1, CURRENT_VERSION + 1, "2", True, None],
    "plugins": [5, [], {"beam": 5}, {5: {}}, {"": {}}, {"beam": {"x": float("nan")}}],
    "extra_config": [
        5,
        [],
        {5: 1},
        {"a": float("inf")},
        {"a": object()},
        {"a": {1: 2}},
        {"a": ["\ud800"]},
        {"a": b"x"},
    ],
    "model": [5, [], None, object()],
    "cache": [5, [], None, ModelConfig(model="demo")],
    "scheduler": [5, "fcfs"],
    "parallel": [2],
}
CASES = [
    (cls, f, v)
    for cls, fields in BAD_FIELDS.items()
    if cls in SECTIONS.values()
    for f, vs in fields.items()
    for v in vs
]
CASES += [(EngineConfig, field, value) for field, values in ENGINE_BAD.items() for value in values]


def problems(cls, **fields):
    with pytest.raises(ConfigError) as caught:
        cls(**(REQUIRED.get(cls, {}) | fields))
    return caught.value.problems


def paths(lines):
    return [line.split(": ")[0] for line in lines]


class TestFields:
    def test_the_defaults_that_requirements_name(self):
        cache, scheduler, parallel = CacheConfig(), SchedulerConfig(), ParallelConfig()
        assert (cache.block_size, cache.gpu_memory_utilization, cache.enable_prefix_caching) == (16, 0.9, False)
        assert (cache.swap_space, cache.prefix_cache_size, cache.kv_cache_bytes) == (0, None, None)
        assert (scheduler.policy, scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == ("fcfs", 64, 2048)
        assert (scheduler.max_model_len, scheduler.enable_chunked_prefill) == (None, True)
        assert (parallel.world_size, parallel.executor) == (1, "in-process")
        assert EngineConfig(model="demo").config_version == CURRENT_VERSION

    @pytest.mark.parametrize(("cls", "field", "value"), CASES)
    def test_every_field_refuses_what_does_not_fit(self, cls, field, value):
        [problem] = problems(cls, **{field: value})
        assert problem.startswith((f"{field}: ", f"{field}."))

    @pytest.mark.parametrize("cls", SECTIONS.values())
    @few
    @given(data=st.data())
    def test_k_bad_fields_give_k_problems(self, cls, data):
        fields = data.draw(bad_fields(cls))
        assert sorted(paths(problems(cls, **fields))) == sorted(fields)

    def test_a_wrong_type_names_field_value_and_mend(self):
        assert problems(ModelConfig, model=123) == [
            "model: 123: must be a model: a folder, a GGUF file, a hub id or an alias such as 'demo'"
        ]

    @pytest.mark.parametrize("cls", [*SECTIONS.values(), EngineConfig])
    def test_sections_are_frozen_slotted_and_keyword_only(self, cls):
        section = cls(**REQUIRED.get(cls, {}))
        field = attrs.fields(cls)[0].name
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(section, field, getattr(section, field))
        assert not hasattr(section, "__dict__")
        with pytest.raises(TypeError):
            cls("demo")

    @pytest.mark.parametrize(
        ("given_dtype", "name"),
        [
            (torch.float16, "float16"),
            (torch.bfloat16, "bfloat16"),
            (torch.float32, "float32"),
            ("half", "float16"),
            ("float", "float32"),
            ("BF16", "bfloat16"),
            ("fp16", "float16"),
            ("fp32", "float32"),
            ("torch.float32", "float32"),
            ("auto", "auto"),
        ],
    )
    def test_dtypes_are_one_name_however_they_are_given(self, given_dtype, name):
        assert ModelConfig(model="demo", dtype=given_dtype).dtype == name

    def test_other_dtypes_are_shown_as_given(self):
        assert problems(ModelConfig, dtype=torch.int8)[0].startswith("dtype: torch.int8: must be one of auto")

    @pytest.mark.parametrize(
        ("given_word", "mend"),
        [
            ("int_8", "must be one of int8, int4, fp8 or None; did you mean 'int8'?"),
            ("int44", "must be one of int8, int4, fp8 or None; did you mean 'int4'?"),
            ("awq", "must be one of int8, int4, fp8 or None"),
            (8, "must be one of int8, int4, fp8 or None"),
        ],
    )
    def test_an_unknown_quantization_is_refused_with_the_word_that_was_meant(self, given_word, mend):
        assert problems(ModelConfig, quantization=given_word) == [f"quantization: {given_word!r}: {mend}"]

    def test_devices_of_torch_are_names(self):
        assert ModelConfig(model="demo", device=torch.device("cuda", 1)).device == "cuda:1"

    @pytest.mark.parametrize(
        ("size", "count"),
        [
            ("2GiB", 2 * 2**30),
            ("512 MiB", 512 * 2**20),
            ("1.5gib", 3 * 2**29),
            (" 4GB ", 4 * 10**9),
            ("10 kb", 10_000),
            ("7", 7),
            ("7B", 7),
            ("1TiB", 2**40),
            (4096, 4096),
            ("9007199254740993B", 2**53 + 1),
        ],
    )
    def test_sizes(self, size, count):
        assert as_bytes(size) == count
        assert CacheConfig(kv_cache_bytes=size, swap_space=size).kv_cache_bytes == count

    @given(st.integers(0, 10**6), st.sampled_from(["KiB", "MiB", "GiB"]))
    def test_sizes_are_exact(self, count, unit):
        assert as_bytes(f"{count}{unit}") == count * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]

    @given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
    def test_world_size_is_the_product(self, tensor, pipeline, data):
        parallel = ParallelConfig(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data)
        assert parallel.world_size == tensor * pipeline * data


class TestRelations:
    @pytest.mark.parametrize(
        ("cls", "fields", "start"),
        [
            (
                CacheConfig,
                {"num_blocks": 4, "kv_cache_bytes": 4096},
                "num_blocks: 4: contradicts kv_cache_bytes (4096)",
            ),
            (CacheConfig, {"prefix_cache_size": 4}, "prefix_cache_size: 4: has no effect; set enable_prefix_caching"),
            (
                CacheConfig,
                {"prefix_cache_size": 9, "num_blocks": 8, "enable_prefix_caching": True},
                "prefix_cache_size: 9: must be <= num_blocks (8)",
            ),
            (
                SchedulerConfig,
                {"max_num_seqs": 10, "max_num_batched_tokens": 9},
                "max_num_batched_tokens: 9: must be >= max_num_seqs (10)",
            ),
            (
                SchedulerConfig,
                {"max_model_len": 2049, "enable_chunked_prefill": False},
                "max_num_batched_tokens: 2048: must be >= max_model_len (2049)",
            ),
            (
                SchedulerConfig,
                {"long_prefill_token_threshold": 5, "enable_chunked_prefill": False},
                "long_prefill_token_threshold: 5: has no effect; set enable_chunked_prefill",
            ),
        ],
    )
    def test_within_a_section(self, cls, fields, start):
        [problem] = problems(cls, **fields)
        assert problem.startswith(start)

    def test_a_bad_field_silences_only_the_relations_it_is_part_of(self):
        lines = problems(CacheConfig, block_size=3, prefix_cache_size=4, num_blocks="x", kv_cache_bytes=5)
        assert paths(lines) == ["block_size", "num_blocks", "prefix_cache_size"]

    @given(cache_configs(), scheduler_configs(), model_configs)
    def test_what_a_valid_section_promises(self, cache, scheduler, model):
        assert cache.block_size in {1, 2, 4, 8, 16, 32, 64, 128, 256}
        assert 0 < cache.gpu_memory_utilization <= 1
        assert cache.num_blocks is None or cache.kv_cache_bytes is None
        assert scheduler.max_num_batched_tokens >= scheduler.max_num_seqs >= 1
        assert scheduler.enable_chunked_prefill or scheduler.max_num_batched_tokens >= (scheduler.max_model_len or 0)
        assert model.dtype in {"auto", "float32", "float16", "bfloat16"}

    def test_the_schedulers_length_must_fit_the_models(self):
        lines = problems(EngineConfig, model={"model": "demo", "max_model_len": 64}, scheduler={"max_model_len": 65})
        assert lines == ["scheduler.max_model_len: 65: must be <= model.max_model_len (64)"]

    def test_without_chunks_the_models_length_must_fit_a_step(self):
        lines = problems(
            EngineConfig,
            model={"model": "demo", "max_model_len": 4096},
            scheduler={"enable_chunked_prefill": False},
        )
        assert lines[0].startswith("scheduler.max_num_batched_tokens: 2048: must be >= max_model_len (4096)")


class TestEngineConfig:
    def test_every_bad_field_of_every_section_at_once(self):
        lines = problems(
            EngineConfig,
            model={"model": 123, "dtype": "int4", "modle": 1},
            cache={"block_size": 7},
            scheduler={"max_num_seqs": 0},
            parallel={"data_parallel_size": -1},
            max_logprobs="many",
        )
        assert sorted(paths(lines)) == [
            "cache.block_size",
            "max_logprobs",
            "model.dtype",
            "model.model",
            "model.modle",
            "parallel.data_parallel_size",
            "scheduler.max_num_seqs",
        ]

    def test_sections_may_be_objects_mappings_or_a_models_name(self):
        whole = EngineConfig(model=ModelConfig(model="demo"), cache=CacheConfig(block_size=32))
        assert EngineConfig(model="demo", cache={"block_size": 32}) == whole
        assert EngineConfig(model={"model": "demo"}, cache=CacheConfig(block_size=32)) == whole

    def test_prefix_caching_is_accepted(self):
        assert CacheConfig(enable_prefix_caching=True, prefix_cache_size=8).enable_prefix_caching is True

    def test_max_model_len_falls_back_to_the_models(self):
        model = ModelConfig(model="demo", max_model_len=64)
        assert EngineConfig(model=model).max_model_len == 64
        assert EngineConfig(model=model, scheduler={"max_model_len": 32}).max_model_len == 32
        assert EngineConfig(model="demo").max_model_len is None

    @few
    @given(engine_configs(), st.integers(1, 10**6))
    def test_resolve_builds_a_copy_with_every_length(self, config, model_max_len):
        before = copy.deepcopy(config)
        limits = [config.model.max_model_len, config.scheduler.max_model_len]
        length = config.max_model_len or model_max_len
        fits = all(limit is None or limit <= model_max_len for limit in limits)
        fits = fits and (config.scheduler.enable_chunked_prefill or config.scheduler.max_num_batched_tokens >= length)
        try:
            resolved = config.resolve(model_max_len)
        except ConfigError:
            assert not fits
        else:
            assert fits
            assert resolved.model.max_model_len == (limits[0] or model_max_len)
            assert resolved.scheduler.max_model_len == length <= resolved.model.max_model_len
            assert resolved.resolve(model_max_len) == resolved
            assert attrs.evolve(resolved, model=config.model, scheduler=config.scheduler) == config
        assert config == before

    def test_resolve_names_every_length_that_is_too_long(self):
        config = EngineConfig(model=ModelConfig(model="demo", max_model_len=100), scheduler={"max_model_len": 90})
        with pytest.raises(ConfigError) as caught:
            config.resolve(80)
        assert caught.value.problems == [
            "model.max_model_len: 100: must be <= 80, the longest the model's positions allow",
            "scheduler.max_model_len: 90: must be <= 80, the longest the model's positions allow",
        ]

    def test_resolve_checks_the_budgets_against_the_models_length(self):
        config = EngineConfig(model="demo", scheduler={"enable_chunked_prefill": False})
        with pytest.raises(ConfigError, match=r"scheduler.max_num_batched_tokens: 2048: must be >= max_model_len"):
            config.resolve(4096)

    @few
    @given(engine_configs())
    def test_configs_survive_every_copy(self, config):
        for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), attrs.evolve(config)):  # noqa: S301
            assert twin == config
            assert hash(twin) == hash(config)

    def test_repr_tells_what_differs_from_the_defaults(self):
        config = EngineConfig(model="demo", cache={"block_size": 32})
        assert repr(config) == "EngineConfig(model=ModelConfig(model='demo'), cache=CacheConfig(block_size=32))"


class TestExtraConfig:
    def test_get(self):
        extra = EngineConfig(model="demo", extra_config={"trace": {"depth": 3}, "tags": ["a"]}).extra_config
        assert extra.get("trace")["depth"] == 3
        assert extra.get("tags") == ("a",)
        assert extra.get("missing", 5) == 5
        assert len(extra) == 2

    def test_it_is_a_deep_and_frozen_copy(self):
        source = {"trace": {"depth": 3}, "tags": ["a"]}
        config = EngineConfig(model="demo", extra_config=source)
        source["trace"]["depth"] = 4
        source["tags"].append("b")
        assert config.extra_config == {"trace": {"depth": 3}, "tags": ("a",)}
        with pytest.raises(TypeError):
            config.extra_config["new"] = 1

    def test_nesting_beyond_reason_is_refused(self):
        deep = shallow = {}
        for _ in range(100_000):
            deep = {"a": deep}
        for _ in range(30):
            shallow = {"a": [shallow]} if _ % 3 == 0 else {"a": shallow}
        assert paths(problems(EngineConfig, extra_config=deep)) == ["extra_config"]
        assert paths(problems(EngineConfig, extra_config={"a": shallow})) == ["extra_config"]
        while deep:  # taken apart step by step: freeing it at once would recurse as deeply
            deep = deep.pop("a")

    def test_frozen_maps_are_hashable_values(self):
        assert {FrozenMap({"a": 1}): 2}[FrozenMap({"a": 1})] == 2
        assert FrozenMap() == {}
        assert repr(FrozenMap({1: "x"})) == "{1: 'x'}"


class TestFromOptions:
    def test_flat_keywords_go_to_their_sections(self):
        config = EngineConfig.from_options(
            model="demo",
            dtype="half",
            seed=7,
            max_model_len=128,
            max_num_seqs=8,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            tensor_parallel_size=2,
            gpu_memory_utilization=0.5,
            swap_space=4,
            block_size=32,
            max_logprobs=5,
            trust_remote_code=False,
        )
        assert config == EngineConfig(
            model=ModelConfig(model="demo", dtype="float16", seed=7, max_model_len=128, skip_tokenizer_init=True),
            cache=CacheConfig(
                block_size=32, gpu_memory_utilization=0.5, swap_space=4 * 2**30, enable_prefix_caching=True
            ),
            scheduler=SchedulerConfig(max_num_seqs=8),
            parallel=ParallelConfig(tensor_parallel_size=2),
            max_logprobs=5,
        )

    @few
    @given(engine_configs())
    def test_every_field_can_be_given_flat(self, config):
        flat = {f: value for section in SECTIONS for f, value in unstructure(getattr(config, section)).items()}
        flat |= {f: value for f, value in unstructure(config).items() if f not in SECTIONS}
        flat |= {"max_model_len": config.model.max_model_len, "swap_space": f"{config.cache.swap_space}B"}
        flat["scheduler"] = {"max_model_len": config.scheduler.max_model_len}
        assert EngineConfig.from_options(**flat) == config

    def test_every_problem_at_once(self):
        with pytest.raises(ConfigError) as caught:
            EngineConfig.from_options(
                model=3, block_size=7, seeed=1, max_num_seqs=-1, trust_remote_code=True, swap_space=2**34, cach={}
            )
        assert caught.value.problems == [
            "seeed: 1: unknown; did you mean 'seed'?",
            "trust_remote_code: True: Folo runs no code from a model's folder; choose an architecture of transformers",
            "cach: {}: unknown; did you mean 'cache'?",
            "model.model: 3: must be a model: a folder, a GGUF file, a hub id or an alias such as 'demo'",
            "cache.block_size: 7: must be a power of two from 1 to 256",
            f"cache.swap_space: {2**34}: a plain number counts GiB here, as in vLLM; write a size such as '512MiB'",
            "scheduler.max_num_seqs: -1: must be an integer >= 1",
        ]

    def test_a_model_must_be_named(self):
        with pytest.raises(ConfigError, match=r"^model\.model: missing: must be a model: a folder"):
            EngineConfig.from_options()

    def test_an_unknown_name_far_from_all_lists_them(self):
        with pytest.raises(ConfigError, match="zzzzzz: 1: unknown; known are attention, attention_backend, block_size"):
            EngineConfig.from_options(model="demo", zzzzzz=1)

    @pytest.mark.parametrize(("alias", "name"), ALIASES.items())
    def test_names_of_vllm(self, alias, name):
        value = {"num_blocks": 5, "kv_cache_bytes": 4096}.get(name, "other")
        config = EngineConfig.from_options(model="demo", **{alias: value})
        path = option_routes()[name]
        assert getattr(getattr(config, path[0]), path[1]) == value
        with pytest.raises(ConfigError, match=f"{alias}: .*: means {name}, which is given too"):
            EngineConfig.from_options(model="demo", **{alias: value, name: value})

    def test_whole_sections_mix_with_flat_keywords(self):
        config = EngineConfig.from_options(model={"model": "demo"}, cache=CacheConfig(block_size=8), num_blocks=4)
        assert config.cache == CacheConfig(block_size=8, num_blocks=4)
        config = EngineConfig.from_options(model=ModelConfig(model="demo"), seed=3, scheduler={"max_num_seqs": 2})
        assert (config.model.seed, config.scheduler.max_num_seqs) == (3, 2)

    def test_a_section_of_the_wrong_type_is_named(self):
        with pytest.raises(ConfigError) as caught:
            EngineConfig.from_options(model="demo", cache=5, block_size=8)
        assert caught.value.problems == ["cache: 5: must be a CacheConfig or a table of its fields"]

    @pytest.mark.parametrize(("size", "count"), [(0, 0), (0.5, 2**29), ("1GiB", 2**30), (4, 2**32)])
    def test_swap_space_counts_gibibytes_unless_it_says_its_unit(self, size, count):
        assert EngineConfig.from_options(model="demo", swap_space=size).cache.swap_space == count

    @pytest.mark.parametrize("size", [-1, float("nan"), float("inf"), True, None, "much"])
    def test_swap_space_that_is_no_size(self, size):
        with pytest.raises(ConfigError, match=r"^cache.swap_space: .*: must be a size"):
            EngineConfig.from_options(model="demo", swap_space=size)


def test_show_never_fails():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert show(Broken()).startswith("<Broken")
    assert show(10**5000) == "<int>"
    assert len(show(["x" * 1000] * 1000)) < 1000


def test_importing_and_building_needs_no_torch():
    code = (
        "import sys; from folo_core.config import EngineConfig, dumps_toml, load\n"
        "assert 'cattrs' not in sys.modules, 'an import costs what only loading needs'\n"
        "config = EngineConfig.from_options(model='demo', dtype='bf16'); dumps_toml(config.resolve(128))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pluggy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
