"""What a model loader and a tokenizer are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from folo_core.execution.interface import LoadedModel


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that Folo calls."""

    eos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:  # noqa: ANN401 (transformers' own signature)
        """Text or token ids of a conversation, with the model's own template."""

    def __len__(self) -> int:
        """Number of tokens, added ones included."""


@runtime_checkable
class ModelLoader(Protocol):
    """Built for one EngineConfig; loads its model and tokenizer."""

    def load_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, mended (pad, eos), or None if it has none and the config skips it.

        Raises:
            ModelLoadError: the tokenizer is missing or broken, and ``skip_tokenizer_init`` is False.
        """

    def load_model(self, tokenizer: Tokenizer | None) -> LoadedModel:
        """The model on its device in its resolved dtype, in evaluation mode.

        Raises:
            ModelLoadError: files are missing, truncated or of an unknown kind.
            UnsupportedModelError: the architecture cannot run through paged attention.
        """


class Peer(Protocol):
    """Another engine over the same weights, dtype and device, for ``folo bench --against``."""

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Continue all prompts greedily as one batch, past end-of-sequence; return ``max_tokens[i]`` tokens of each."""


@runtime_checkable
class PeerOpener(Protocol):
    """A ModelLoader that can also open its model in engines other than Folo."""

    def open_peer(self, name: str) -> Peer:
        """Load the model into the engine ``name``.

        Raises:
            ModelLoadError: no such engine is known; the message names those that are.
        """
