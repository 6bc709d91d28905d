"""A side model gives what its model gives from scratch, and computes only what it has not read yet."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest
import torch

from engines import TreeParams, TreeSampler
from folo_core.attention.interface import AttentionMetadata
from folo_core.config import EngineConfig
from folo_core.errors import ConfigError, ModelLoadError, OutOfBlocksError, PluginError, RequestError
from folo_core.execution.side_model import SideModel, common_prefix
from folo_core.kv_cache.block_pool import BlockPool
from folo_core.kv_cache.block_table import BlockTable
from folo_core.plugins import hookimpl
from folo_core.plugins.assembly import sampler_context
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import SamplerSpec
from folo_core.testing.fakes import FakeBackend, FakeModel, FakePlugin, FakeTokenizer, fake_components


def make_side(num_blocks: int = 64, block_size: int = 4, **options: Any) -> tuple[SideModel, FakeModel]:
    model = FakeModel(seed=3)
    return SideModel(model, FakeBackend(), BlockTable(BlockPool(num_blocks + 1), block_size), **options), model


def assert_right(side: SideModel, model: FakeModel, keys: list[Any], histories: list[Any]) -> None:
    logits = side.logits(keys, histories)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.stack([model.logits_after(history) for history in histories]))
    side.check_integrity()


def test_only_new_tokens_are_computed() -> None:
    side, model = make_side()
    assert_right(side, model, ["a", "b"], [[1, 2, 3], [4, 5, 6, 7, 8]])
    assert side.num_computed_tokens == 8
    assert_right(side, model, ["b", "a"], [[4, 5, 6, 7, 8, 9], (1, 2, 3, 4, 5)])
    assert side.num_computed_tokens == 8 + 3
    assert_right(side, model, ["a"], [[1, 2, 9]])
    assert side.num_computed_tokens == 11 + 1, "what differs is computed anew, what is shared is not"
    assert_right(side, model, ["a"], [[1, 2, 9]])
    assert side.num_computed_tokens == 13, "the newest token always runs: its logits are wanted"
    assert_right(side, model, ["a"], [[1]])


def test_a_new_key_shares_the_blocks_of_the_longest_prefix_and_never_changes_it() -> None:
    side, model = make_side()
    trunk = list(range(1, 11))
    assert_right(side, model, ["short", "trunk"], [trunk[:5], trunk])
    before = side.num_computed_tokens
    used = side._empty.pool.num_usable - side._empty.pool.num_free
    assert_right(side, model, ["left", "right"], [[*trunk, 40], [*trunk, 41]])
    assert side.num_computed_tokens == before + 2
    assert side._empty.pool.num_usable - side._empty.pool.num_free == used + 2, "only the tail block is copied"
    assert_right(side, model, ["trunk"], [[*trunk, 42]])
    assert_right(side, model, ["left", "right", "trunk"], [[*trunk, 40, 1], [*trunk, 41, 1], [*trunk, 42, 1]])
    assert side.num_computed_tokens == before + 2 + 1 + 3


def test_a_prefix_shorter_than_a_block_is_not_shared() -> None:
    side, model = make_side()
    assert_right(side, model, ["a"], [[1, 2, 3]])
    assert_right(side, model, ["b"], [[1, 2, 3, 4]])
    assert side.num_computed_tokens == 7


def test_forgotten_keys_return_their_blocks() -> None:
    side, model = make_side()
    keys = ["r", ("r", 0), ("r", 1), ("s", 0)]
    assert_right(side, model, keys, [[n] * 9 for n in range(1, 5)])
    side.forget("nobody")
    side.forget_request("r")
    side.check_integrity()
    assert side._empty.pool.num_usable - side._empty.pool.num_free == 3
    side.forget(("s", 0))
    assert side._empty.pool.num_free == side._empty.pool.num_usable


def test_the_keys_used_longest_ago_are_dropped_when_blocks_run_out() -> None:
    side, model = make_side(num_blocks=6)
    for n in (1, 2, 3):
        assert_right(side, model, [n], [[n] * 8])
    assert_right(side, model, [1], [[1] * 8])
    before = side.num_computed_tokens
    assert_right(side, model, [4], [[4] * 5])
    assert_right(side, model, [1, 3], [[1] * 8, [3] * 8])
    assert side.num_computed_tokens == before + 5 + 2, "2 was dropped, 1 and 3 were not"
    assert_right(side, model, [2], [[2] * 8])
    assert side.num_computed_tokens == before + 7 + 8


def test_a_call_that_cannot_fit_says_so_and_leaves_the_books_in_order() -> None:
    side, model = make_side(num_blocks=4)
    assert_right(side, model, ["old"], [[9] * 4])
    with pytest.raises(OutOfBlocksError, match=r"6 blocks wanted for 2 rows.*lower max_num_seqs"):
        side.logits(["a", "b"], [[1] * 12, [2] * 12])
    side.check_integrity()
    assert side._empty.pool.num_free == 4
    assert_right(side, model, ["a"], [[1] * 16])


def test_a_pass_that_fails_is_forgotten() -> None:
    side, model = make_side()
    assert_right(side, model, ["a", "b"], [[1] * 6, [2] * 6])

    def boom(_: torch.Tensor) -> None:
        raise RuntimeError("boom")

    model.before_forward = boom
    with pytest.raises(RuntimeError, match="boom"):
        side.logits(["a"], [[1] * 9])
    model.before_forward = None
    side.check_integrity()
    assert_right(side, model, ["a", "b"], [[1] * 10, [2] * 7])


@pytest.mark.parametrize(
    ("keys", "histories", "match"),
    [(["a", "a"], [[1], [2]], "key of its own"), (["a"], [[]], "from 0"), (["a"], [[1] * 300], "1 to 256")],
)
def test_wrong_calls_are_refused_by_name(keys: Any, histories: Any, match: str) -> None:
    side, _ = make_side()
    with pytest.raises(RequestError, match=match):
        side.logits(keys, histories)
    side.check_integrity()


def test_no_rows_are_no_work() -> None:
    side, _ = make_side()
    assert side.logits([], []).shape == (0, 64)
    assert side.num_computed_tokens == 0


@pytest.mark.parametrize("num_blocks", [12, 200])
def test_any_course_of_calls_gives_what_the_model_gives_from_scratch(num_blocks: int) -> None:
    rng = random.Random(num_blocks)
    side, model = make_side(num_blocks=num_blocks)
    histories: dict[int, list[int]] = {}
    computed = whole = 0
    for _ in range(300):
        key = rng.randrange(8)
        base = histories.get(rng.randrange(8), [rng.randrange(64)])
        history = base[: rng.randint(1, len(base))] + [rng.randrange(64) for _ in range(rng.randint(0, 4))]
        histories[key] = history[-20:]
        chosen = {key, rng.choice(list(histories))}
        before = side.num_computed_tokens
        assert_right(side, model, list(chosen), [histories[c] for c in chosen])
        computed += side.num_computed_tokens - before
        whole += sum(len(histories[c]) for c in chosen)
        if rng.random() < 0.1:
            side.forget(rng.randrange(8))
    assert computed < 0.7 * whole, "much was not computed again"
    for key in range(8):
        side.forget(key)
    assert side._empty.pool.num_free == num_blocks


def test_padding_of_the_vocabulary_is_cut_or_filled_up() -> None:
    side, model = make_side(vocab_size=60)
    assert torch.equal(side.logits(["a"], [[1, 2]]), model.logits_after([1, 2])[None, :60])
    side, model = make_side(vocab_size=70)
    logits = side.logits(["a"], [[1, 66]])
    assert torch.equal(logits[0, :64], model.logits_after([1, 0])), "an id that the model lacks is read as token 0"
    assert logits[0, 64:].tolist() == [model.logits_after([1, 0]).min()] * 6


def test_device_metadata_is_given_to_backends_that_want_it() -> None:
    class Wanting(FakeBackend):
        wants_device_metadata = True

        def plan(self, metadata: AttentionMetadata) -> None:
            assert metadata.query_start_device.tolist() == metadata.query_start.tolist()
            assert metadata.seq_lens_device.tolist() == metadata.seq_lens.tolist()
            assert metadata.block_tables_device.tolist() == metadata.block_tables.tolist()
            self.planned = True

    backend, model = Wanting(), FakeModel()
    side = SideModel(model, backend, BlockTable(BlockPool(9), 4))
    assert_right(side, model, ["a", "b"], [[1, 2, 3, 4, 5], [1]])
    assert backend.planned


def test_common_prefix() -> None:
    assert [common_prefix([1, 2, 3], other) for other in ([], [1], [1, 2, 3, 4], [1, 2, 4], [2])] == [0, 1, 3, 2, 0]
    rng = random.Random(0)
    for _ in range(200):
        one = [rng.randrange(2) for _ in range(rng.randrange(12))]
        other = one[: rng.randrange(12)] + [rng.randrange(2) for _ in range(rng.randrange(5))]
        plain = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))  # noqa: B905
        assert common_prefix(one, other) == plain


def open_side(side: FakeModel, *, tokenizer: Any = None, **options: Any) -> SideModel:
    main, main_tokenizer = FakeModel(), FakeTokenizer()
    registry = load_registry(extra=[SidePlugin(main, main_tokenizer, side, tokenizer or main_tokenizer)])
    settings = {"model": "fake", "loader": "fake", "attention": "fake", "num_blocks": 32, "block_size": 4}
    config = EngineConfig.from_options(**(settings | options)).resolve(main.info.max_model_len)
    without = config.model.skip_tokenizer_init
    context = sampler_context(
        registry, vocab_size=64, device=main.device, config=config, tokenizer=None if without else main_tokenizer
    )
    return context.side_model("draft")


class SidePlugin(FakePlugin):
    """The main model, and a side model with a tokenizer that may differ."""

    __name__ = "fake-model"

    def __init__(self, main: FakeModel, tokenizer: Any, side: FakeModel, side_tokenizer: Any) -> None:
        super().__init__(main, tokenizer)
        self.side, self.side_tokenizer = side, side_tokenizer
        self.asked: list[EngineConfig] = []

    def _loader(self, config: EngineConfig) -> FakePlugin:
        self.asked.append(config)
        tokenizer = None if config.model.skip_tokenizer_init else self.side_tokenizer
        return FakePlugin(self.side if config.model.model == "draft" else self.model, tokenizer)


def test_a_context_opens_a_side_model_by_name() -> None:
    model = FakeModel(seed=5)
    side = open_side(model)
    assert (side.vocab_size, side.max_model_len, side._empty.pool.num_usable) == (64, 256, 32)
    assert_right(side, model, ["a"], [[1, 2, 3]])


def test_its_weights_are_quantised_as_the_engines_are() -> None:
    with pytest.raises(ConfigError, match="quantization: 'int4': the loader of model 'draft'"):
        open_side(FakeModel(), quantization="int4")
    model = FakeModel(seed=5)
    model.info = attrs.evolve(model.info, quantization="int4")
    assert_right(open_side(model, quantization="int4"), model, ["a"], [[1, 2, 3]])


def test_its_memory_is_bounded_by_default() -> None:
    side = open_side(FakeModel(), num_blocks=None, max_num_seqs=3)
    assert side._empty.pool.num_usable == 3 * 256 // 4
    model = FakeModel()
    model.info = attrs.evolve(model.info, kv_bytes_per_token=2**40)
    side = open_side(model, num_blocks=None, max_num_seqs=3)
    assert side._empty.pool.num_usable == 256 // 4, "one longest sequence always fits"


def test_another_vocabulary_is_refused_and_another_padding_is_not() -> None:
    with pytest.raises(ConfigError, match="'draft': its vocabulary of 70 is not the engine's of 64"):
        open_side(FakeModel(vocab_size=70), tokenizer=FakeTokenizer(70))
    with pytest.raises(ConfigError, match="same tokenizer"):
        open_side(FakeModel(vocab_size=70), skip_tokenizer_init=True)
    padded = FakeModel(vocab_size=72)
    side = open_side(padded)
    assert torch.equal(side.logits(["a"], [[5]]), padded.logits_after([5])[None, :64])

    class Listing(FakeTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {chr(32 + i): i for i in range(64)}

    with pytest.raises(ConfigError, match="same tokenizer"):
        open_side(FakeModel(), tokenizer=Listing())


def test_a_side_model_that_reads_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len: 256: model 'draft' reads 100 tokens"):
        open_side(FakeModel(max_model_len=100))
    assert open_side(FakeModel(max_model_len=100), max_model_len=80).max_model_len == 100


def test_outside_an_engine_and_for_unknown_models_the_error_says_so() -> None:
    registry = load_registry()
    context = sampler_context(registry, vocab_size=64, device=torch.device("cpu"))
    with pytest.raises(PluginError, match="needs an engine's configuration"):
        context.side_model("x")
    config = EngineConfig.from_options(model="fake")
    context = sampler_context(registry, vocab_size=64, device=torch.device("cpu"), config=config)
    with pytest.raises(ModelLoadError):
        context.side_model("/nowhere/at-all")


def test_a_sampler_opens_a_side_model_while_the_engine_is_built() -> None:
    opened: list[SideModel] = []

    class Opens:
        __name__ = "opens"

        @hookimpl
        def folo_samplers(self) -> list[SamplerSpec]:
            return [SamplerSpec(name="opens", help="h", factory=self.build, params_type=TreeParams)]

        def build(self, context: Any) -> TreeSampler:
            opened.append(context.side_model("draft"))
            return TreeSampler()

    model = FakeModel(seed=9)
    fake_components(side_models={"draft": model}, plugins=[Opens()])
    assert_right(opened[0], model, ["a"], [[7, 8]])
