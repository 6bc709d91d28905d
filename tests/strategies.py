"""Hypothesis strategies for configurations and sampling parameters: valid ones, wrong fields, plain data."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from folo_core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from folo_core.sampling_params import RequestOutputKind, SamplingParams

INT64 = 2**63

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6)
names = st.text("abc09-_.", max_size=5).map(lambda name: f"x{name}")
few = settings(max_examples=max(25, settings.default.max_examples // 3))
"""For properties of whole configurations, each of which takes long to draw."""
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.integers(1, 10**6)
token_ids = st.integers(0, 200_000)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def plain_data(*, null: bool = True) -> st.SearchStrategy[Any]:
    """What JSON (and, without null, TOML) can hold."""
    leaves = st.booleans() | st.integers(-INT64, INT64 - 1) | finite | text | st.just("")
    leaves = leaves | st.none() if null else leaves
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=4
    )


def plain_tables(*, null: bool = True) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(text, plain_data(null=null), max_size=3)


model_configs = st.builds(
    ModelConfig,
    model=text,
    tokenizer=optional(text),
    dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16", "half", "bf16", "FP32", "torch.float16"]),
    quantization=st.sampled_from([None, "int8", "int4"]),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "mps"]),
    revision=optional(text),
    max_model_len=st.none(),
    seed=st.integers(0, INT64 - 1),
    skip_tokenizer_init=st.booleans(),
    loader=names,
    attention=names.map(lambda name: f"folo-x:{name}"),
    chat_template=optional(text),
)


@st.composite
def cache_configs(draw: st.DrawFn) -> CacheConfig:
    num_blocks = draw(optional(positive))
    prefix = draw(st.booleans())
    return CacheConfig(
        block_size=2 ** draw(st.integers(0, 8)),
        gpu_memory_utilization=draw(st.floats(0, 1, exclude_min=True)),
        num_blocks=num_blocks,
        kv_cache_bytes=draw(optional(positive)) if num_blocks is None else None,
        swap_space=draw(st.integers(0, 2**50)),
        kv_cache_dtype=draw(st.sampled_from(["auto", "fp8"])),
        enable_prefix_caching=prefix,
        prefix_cache_size=draw(optional(st.integers(1, num_blocks or 10**6))) if prefix else None,
    )


@st.composite
def scheduler_configs(draw: st.DrawFn, max_model_len: int | None = None) -> SchedulerConfig:
    chunked = draw(st.booleans())
    length = draw(optional(st.integers(1, max_model_len or 10**6)))
    seqs = draw(st.integers(1, 4096))
    longest = 0 if chunked else max(length or 0, max_model_len or 0)
    return SchedulerConfig(
        policy=draw(names),
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(max(seqs, longest), 2 * 10**6)),
        max_model_len=length,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=draw(optional(positive)) if chunked else None,
        max_waiting_requests=draw(optional(positive)),
    )


parallel_configs = st.builds(
    ParallelConfig,
    tensor_parallel_size=st.integers(1, 64),
    pipeline_parallel_size=st.integers(1, 64),
    data_parallel_size=st.integers(1, 64),
    executor=names,
)


@st.composite
def engine_configs(draw: st.DrawFn, *, null: bool = True) -> EngineConfig:
    """Whole configurations; ``null=False`` for those whose untyped data TOML can hold."""
    length = draw(optional(st.integers(1, 10**6)))
    model = draw(model_configs)
    kept = ("model", "dtype", "quantization", "device", "seed", "revision", "chat_template")
    fields = {name: getattr(model, name) for name in kept}
    return EngineConfig(
        model=ModelConfig(**fields, max_model_len=length),
        cache=draw(cache_configs()),
        scheduler=draw(scheduler_configs(length)),
        parallel=draw(parallel_configs),
        plugins=draw(st.dictionaries(names, plain_tables(null=null), max_size=2)),
        extra_config=draw(plain_tables(null=null)),
        max_logprobs=draw(st.integers(-1, 100)),
        max_sequences_per_request=draw(positive),
        step_timeout_s=draw(optional(st.floats(0, 1e9, exclude_min=True))),
        deterministic=draw(st.booleans()),
        strict_plugins=draw(st.booleans()),
        blocked_plugins=draw(st.lists(text, max_size=3)),
    )


@st.composite
def any_sampling_params(draw: st.DrawFn) -> SamplingParams:
    """SamplingParams over the whole range of every field, fan-out included."""
    n = draw(st.integers(1, 4))
    best_of = draw(optional(st.integers(n, 8)))
    greedy = (best_of or n) == 1 and draw(st.booleans())
    max_tokens = draw(optional(st.integers(1, 10**6)))
    detokenize = draw(st.booleans())
    ids = st.lists(token_ids, max_size=4)
    return SamplingParams(
        n=n,
        best_of=best_of,
        temperature=0.0 if greedy else draw(st.floats(1e-5, 10)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0, 10, exclude_min=True)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.integers(-1, 10**6)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(optional(st.integers(-INT64, INT64 - 1))),
        stop=draw(st.lists(text, max_size=3)) if detokenize else None,
        stop_token_ids=draw(ids),
        bad_words=draw(st.lists(text, max_size=3)),
        ignore_eos=draw(st.booleans()),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens or 10**6)),
        logprobs=draw(optional(st.integers(-1, 30))),
        prompt_logprobs=draw(optional(st.integers(-1, 30))),
        detokenize=detokenize,
        skip_special_tokens=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        output_kind=draw(st.sampled_from(RequestOutputKind)),
        logit_bias=draw(optional(st.dictionaries(token_ids, finite, max_size=4))),
        allowed_token_ids=draw(optional(st.lists(token_ids, min_size=1, max_size=4))),
    )


NAN, INF = float("nan"), float("inf")
NO_INT: list[Any] = [True, "1", 1.5, [], {}, b"1", object(), 1j]
NO_FLOAT: list[Any] = [True, "0.5", NAN, INF, -INF, [], {}, None, object(), 10**400]
NO_BOOL: list[Any] = [0, 1, "true", None, [], 1.0]
NO_TEXT: list[Any] = [123, "", b"demo", ["demo"], True, 1.5, "\ud800", "a\0b"]

BAD_FIELDS: dict[type, dict[str, list[Any]]] = {
    ModelConfig: {
        "model": [*NO_TEXT, None],
        "tokenizer": NO_TEXT,
        "dtype": [*NO_TEXT, None, "int8", "float64", "float16x"],
        "quantization": [*NO_TEXT, "int2", "INT8", "float32"],
        "device": [*NO_TEXT, None, "CUDA 0", "cuda:x", "0"],
        "revision": NO_TEXT,
        "max_model_len": [*NO_INT, 0, -1],
        "seed": [*NO_INT, None, -1, INT64],
        "skip_tokenizer_init": NO_BOOL,
        "loader": [*NO_TEXT, None, "a b", "-x"],
        "attention": [*NO_TEXT, None, "?"],
        "chat_template": NO_TEXT,
    },
    CacheConfig: {
        "block_size": [*NO_INT, None, 0, -16, 3, 24, 512],
        "gpu_memory_utilization": [*NO_FLOAT, 0, 0.0, -0.1, 1.0001],
        "kv_cache_bytes": [0, -1, "2 parsecs", "", "-1GiB", "1e9", "GiB", 1.5, True, [], INT64, "99999999999TiB"],
        "num_blocks": [*NO_INT, 0, -1],
        "kv_cache_dtype": [*NO_TEXT, None, "FP8", "fp8_e5m2", "int8"],
        "swap_space": [-1, "4 gig", None, 0.5, True, "nan"],
        "enable_prefix_caching": NO_BOOL,
        "prefix_cache_size": [*NO_INT, 0, -1],
    },
    SchedulerConfig: {
        "policy": [*NO_TEXT, None, "first come"],
        "max_num_seqs": [*NO_INT, None, 0, -1],
        "max_num_batched_tokens": [*NO_INT, None, 0, -1],
        "max_model_len": [*NO_INT, 0, -1],
        "enable_chunked_prefill": NO_BOOL,
        "long_prefill_token_threshold": [*NO_INT, 0, -1],
        "max_waiting_requests": [*NO_INT, 0, -1],
    },
    ParallelConfig: {
        "tensor_parallel_size": [*NO_INT, None, 0, -1],
        "pipeline_parallel_size": [*NO_INT, None, 0, -1],
        "data_parallel_size": [*NO_INT, None, 0, -1],
        "executor": [*NO_TEXT, None],
    },
    SamplingParams: {
        "n": [*NO_INT, None, 0, -1],
        "best_of": [*NO_INT, 0, -1],
        "presence_penalty": [*NO_FLOAT, -2.1, 2.1],
        "frequency_penalty": [*NO_FLOAT, -2.1, 2.1],
        "repetition_penalty": [*NO_FLOAT, 0, -1.0],
        "temperature": [*NO_FLOAT, -0.1],
        "top_p": [*NO_FLOAT, 0, -0.1, 1.1],
        "top_k": [*NO_INT, None, -2],
        "min_p": [*NO_FLOAT, -0.1, 1.1],
        "seed": [*NO_INT, INT64, -INT64 - 1],
        "stop": [5, [""], ["ok", 5], {"a": 1}, ["\ud800"], True, [None]],
        "stop_token_ids": [5, "12", ["12"], [-1], [1.0], [True], {1: 2}, [None], [INT64]],
        "bad_words": [5, [""], [5], [["a"]]],
        "ignore_eos": NO_BOOL,
        "max_tokens": [*NO_INT, 0, -1],
        "min_tokens": [*NO_INT, None, -1],
        "logprobs": [*NO_INT, -2],
        "prompt_logprobs": [*NO_INT, -2],
        "detokenize": NO_BOOL,
        "skip_special_tokens": NO_BOOL,
        "include_stop_str_in_output": NO_BOOL,
        "output_kind": ["sometimes", 0, None, True],
        "logit_bias": [
            5,
            [1],
            {"a": 1.0},
            {-1: 1.0},
            {1: NAN},
            {1: "x"},
            {1: INF},
            {1.5: 1.0},
            {"1": 1, 1: 2},
            {True: 1},
        ],
        "allowed_token_ids": [[], 5, "1", [-1], [True], [1.5], {}],
    },
}
"""For every field of every class, values that it must refuse."""


def bad_fields(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    """One to all fields of a class, each with a value it must refuse."""
    table = BAD_FIELDS[cls]
    chosen = st.lists(st.sampled_from(sorted(table)), min_size=1, unique=True)
    return chosen.flatmap(lambda fields: st.fixed_dictionaries({name: st.sampled_from(table[name]) for name in fields}))
