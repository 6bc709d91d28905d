"""A model without weights, for tests of everything around the model.

Its "keys and values" are the token ids themselves, kept in blocks like real ones. The next token's logits are a
fixed function of the tokens found through the block table, so a wrong table, a missed copy or a stale block shows
up as a wrong token. ``expected_tokens`` computes the same function without any cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from folo_core.attention.interface import KVCacheSpec
from folo_core.config import EngineConfig
from folo_core.execution.interface import ModelInfo
from folo_core.plugins.hookspecs import hookimpl
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import AttentionBackendSpec, ModelLoaderSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from folo_core.attention.interface import AttentionMetadata
    from folo_core.components import Components
    from folo_core.execution.loading import Tokenizer

FAKE_VOCAB = 64
_STATES = 509
"""Number of distinct logit rows; a prime, so that the hash below spreads well."""


class FakeTokenizer:
    """One byte-like token per character: token ``i`` is ``chr(32 + i)``, and the last one ends a text."""

    def __init__(self, vocab_size: int = FAKE_VOCAB) -> None:
        self.vocab_size = vocab_size
        self.eos_token_id: int | None = vocab_size - 1
        self.all_special_ids = [vocab_size - 1]

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Map characters to ids; unknown ones wrap around."""
        del add_special_tokens
        return [(ord(character) - 32) % (self.vocab_size - 1) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Map ids back to characters."""
        kept = (t for t in token_ids if not (skip_special_tokens and t == self.eos_token_id))
        return "".join(chr(32 + t) for t in kept)

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:  # noqa: ANN401
        """Join the messages with line-like marks."""
        del options
        return "".join(f"{message['role']}: {message['content']} / " for message in conversation)


class FakeBackend:
    """Keeps token ids in blocks; has no attention to compute."""

    wants_device_metadata = False

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Make room, filled with -1: reading an unwritten slot is caught."""
        del specs
        self.cache = torch.full((num_blocks, block_size), -1, dtype=torch.int64, device=device)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Nothing to prepare."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Raise: a fake model has no attention layers."""
        message = "a fake model calls no attention"
        raise AssertionError(message)

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks."""
        self.cache[destinations] = self.cache[sources]

    def zero_blocks(self, blocks: list[int]) -> None:
        """Forget what blocks held."""
        self.cache[blocks] = 0

    def allocate_host(self, num_blocks: int) -> None:
        """Make room on the "host", likewise filled with -1; block 0 is the null block there, too."""
        self.host = torch.full((num_blocks + 1, self.cache.shape[1]), -1, dtype=torch.int64)

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy blocks to the host."""
        self.host[host_blocks] = self.cache[device_blocks]

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy blocks back."""
        self.cache[device_blocks] = self.host[host_blocks]


class FakeModel:
    """Reads its own past from the blocks and maps it to logits. ``before_forward`` lets a test inject faults."""

    def __init__(self, vocab_size: int = FAKE_VOCAB, max_model_len: int = 256, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.kv_cache_specs = [KVCacheSpec(num_kv_heads=1, head_size=1, dtype=torch.float32)]
        self.info = ModelInfo(
            architecture="FakeForCausalLM",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_layers=1,
            kv_bytes_per_token=8,
            dtype="float32",
            device="cpu",
            eos_token_ids=(vocab_size - 1,),
            batch_invariant=True,
        )
        self.table = torch.randn((_STATES, vocab_size), generator=torch.Generator().manual_seed(seed))
        self.before_forward: Callable[[torch.Tensor], None] | None = None
        self.edit_logits: Callable[[torch.Tensor, list[list[int]]], torch.Tensor] | None = None
        self.backend: FakeBackend | None = None

    def bind(self, backend: FakeBackend) -> None:
        """Remember where the tokens are kept."""
        self.backend = backend

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Write the new tokens, read every wanted row's past through its block table, and look its logits up."""
        if self.before_forward is not None:
            self.before_forward(input_ids)
        assert self.backend is not None  # noqa: S101 (bound when the runner is built)
        self.backend.cache.view(-1)[metadata.slot_mapping] = input_ids
        pasts = [self._past(int(index), int(positions[index]), metadata) for index in logits_indices]
        logits = torch.stack(list(map(self.logits_after, pasts))) if pasts else self.table[:0]
        return logits if self.edit_logits is None else self.edit_logits(logits, pasts)

    def _past(self, index: int, position: int, metadata: AttentionMetadata) -> list[int]:
        assert self.backend is not None  # noqa: S101 (as in forward)
        row = int((metadata.query_start[1:] <= index).sum())
        blocks = torch.from_numpy(metadata.block_tables[row]).long()
        past: list[int] = self.backend.cache[blocks].flatten()[: position + 1].tolist()
        assert min(past) >= 0, f"row {row} reads a slot that nobody wrote: {past}"  # noqa: S101 (the fake's purpose)
        return past

    def logits_after(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the next token's logits, float32 ``[vocab]``, after these tokens."""
        state = 1
        for token in tokens:
            state = (state * 31 + token + 7) % _STATES
        return self.table[state].clone()

    def expected_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy continuation without any cache; stops after the end-of-sequence token."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits_after(tokens).argmax()))
            if tokens[-1] in self.info.eos_token_ids:
                break
        return tokens[len(prompt) :]


class FakePlugin:
    """Offers the loader and the attention backend called ``fake``, for one model instance and side models by name."""

    __name__ = "fake-model"

    def __init__(
        self, model: FakeModel, tokenizer: Tokenizer | None, side_models: Mapping[str, FakeModel] | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.side_models = dict(side_models or {})

    def load_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer this plugin was given."""
        return self.tokenizer

    def load_model(self, tokenizer: Tokenizer | None) -> FakeModel:
        """Return the model this plugin was given."""
        del tokenizer
        return self.model

    @hookimpl
    def folo_model_loaders(self) -> list[ModelLoaderSpec]:
        """Offer ``fake``."""
        return [
            ModelLoaderSpec(name="fake", help="a model without weights", factory=self._loader, can_load=lambda _: False)
        ]

    def _loader(self, config: EngineConfig) -> FakePlugin:
        side = self.side_models.get(config.model.model)
        return self if side is None else FakePlugin(side, self.tokenizer)

    @hookimpl
    def folo_attention_backends(self) -> list[AttentionBackendSpec]:
        """Offer ``fake``, only when asked for by name."""
        return [
            AttentionBackendSpec(
                name="fake",
                help="keeps token ids",
                factory=lambda _: FakeBackend(),
                supports=_only_by_name,
                capabilities=frozenset({"batch-invariant"}),
            )
        ]


def _only_by_name(device: str, dtype: str) -> None:
    del device, dtype


def fake_components(
    model: FakeModel | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    plugins: Iterable[object] = (),
    block: Iterable[str] = (),
    side_models: Mapping[str, FakeModel] | None = None,
    **options: Any,  # noqa: ANN401 (engine options)
) -> Components:
    """Build components around a fake model: ``Engine(fake_components(max_num_seqs=4, num_blocks=8))``.

    Args:
        model: a FakeModel to look into afterwards; a fresh one if None.
        tokenizer: a FakeTokenizer if None.
        plugins: more plugin objects, such as a sampler under test.
        block: names of installed plugins to leave out.
        side_models: models that samplers can open with ``context.side_model(name)``.
        options: flat engine options, as for ``LLM``.
    """
    from folo_core.plugins.assembly import build_components

    model = FakeModel() if model is None else model
    chosen: Tokenizer = FakeTokenizer(model.info.vocab_size) if tokenizer is None else tokenizer
    config = EngineConfig.from_options(
        **({"model": "fake", "loader": "fake", "attention": "fake", "num_blocks": 512, "block_size": 4} | options)
    )
    registry = load_registry(extra=[FakePlugin(model, chosen, side_models), *plugins], block=block)
    return build_components(config, registry)
