"""Loads tokenizers and mends what they lack (R12)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from folo_core.errors import ModelLoadError, RequestError
from folo_hf.quiet import quiet
from folo_hf.source import check_tokenizer_files
from folo_hf.templates import TemplateRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"  # noqa: S105 (a token of text)


class HfTokenizer:
    """A transformers tokenizer whose chat template is rendered within limits. Everything else is the tokenizer's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, renderer: TemplateRenderer | None = None) -> None:
        self.wrapped = tokenizer
        self._renderer = renderer or TemplateRenderer()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the tokenizer has)
        if name == "wrapped":  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __len__(self) -> int:
        return len(self.wrapped)

    # Named here although they are the tokenizer's: a protocol check looks for them on the class.
    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        token: int | None = self.wrapped.eos_token_id
        return token

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return list(self.wrapped.all_special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self.wrapped.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids, with no space removed or added."""
        text = self.wrapped.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,  # noqa: ANN401 (whatever the template reads)
    ) -> str | list[int]:
        """Lay a conversation out as one text, or as its token ids.

        Args:
            conversation: messages, each with ``role`` and ``content``.
            tokenize: return token ids rather than text.
            add_generation_prompt: end with the words that open the assistant's answer.
            chat_template: a template, or the path of a file that holds one, in place of the model's own.
            tools: JSON schemas of functions that the model may call.
            variables: more names for the template.

        Raises:
            RequestError: the template refuses the conversation or exceeds the limits of time and size.
        """
        if not conversation:
            raise RequestError("messages: empty: give at least one message")
        # Many templates would print a None where a key is simply absent.
        messages = [{key: value for key, value in each.items() if value is not None} for each in conversation]
        names = {
            **self.wrapped.special_tokens_map,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self.wrapped.get_chat_template(_read_template(chat_template), tools)
        text = self._renderer.render(template, names)
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _read_template(template: str | None) -> str | None:
    """A template given by itself, or the content of the file it names."""
    if template is None or "{" in template or "\n" in template:
        return template
    try:
        path = Path(template).expanduser()
        return path.read_text(encoding="utf-8") if path.is_file() else template
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"chat_template: {template!r}: {error}") from error


def load_tokenizer(folder: Path) -> HfTokenizer:
    """Load the folder's tokenizer and give it what it lacks.

    Raises:
        ModelLoadError: there is none, it is broken, or it is code of its own.
    """
    check_tokenizer_files(folder)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if "trust_remote_code" in text:
            text = "it is code of its own (auto_map), and Folo runs no code that comes with a model"
        raise ModelLoadError(
            f"tokenizer: '{folder}': {text}; name another with tokenizer=, or set skip_tokenizer_init=True"
        ) from error
    mend(tokenizer)
    return HfTokenizer(tokenizer)


def mend(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer a padding token and left padding, and warn of special tokens it lacks."""
    for name, effect in (("bos", "prompts begin without it"), ("eos", "answers end by length or stop strings alone")):
        if getattr(tokenizer, f"{name}_token_id") is None:
            logger.warning("tokenizer: has no %s token: %s", name, effect)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is not None:
            tokenizer.pad_token = tokenizer.eos_token
            logger.warning("tokenizer: has no pad token: its eos token %r pads", tokenizer.eos_token)
        else:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
            logger.warning("tokenizer: has neither pad nor eos token: added %r", PAD_TOKEN)
    tokenizer.padding_side = "left"
