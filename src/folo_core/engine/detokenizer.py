"""Token ids to text, token by token, in linear time, and stop strings on the way.

A token's text can depend on its neighbours: a character may need several tokens, and some tokenizers drop a
leading space at the start of a text. So a short window is decoded with and without the new tokens, and the
difference is what they add. Streamed pieces join to the final text by construction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.execution.loading import Tokenizer

REPLACEMENT = "\ufffd"
PROMPT_CONTEXT = 6
"""Prompt tokens before the first output token that give the window its left context."""
MOST_PENDING = 8
"""Tokens held back for an unfinished character. UTF-8 needs at most 4; beyond, the bytes are no character."""
WINDOW = 16
"""Tokens of a window that begins anew with what was shown last: until then one decoding serves as two."""
MOST_CONTEXT = 64
"""Tokens of left context kept while nothing visible is decoded (a run of special tokens)."""


class Detokenizer:
    """One sequence's text so far. Tokens that are only pushed are decoded, all at once, when the text is asked for."""

    __slots__ = ("_ids", "_known", "_pushed", "_read", "_skip_special", "_text", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._ids = list(prompt_token_ids[-PROMPT_CONTEXT:])
        """The window: left context, and from ``_read`` on what is held back for an unfinished character."""
        self._read = len(self._ids)
        self._known: str | None = None
        """What the window decodes to up to ``_read``; None until that is needed."""
        self._pushed: list[int] = []
        self._text = ""

    def fork(self) -> Self:
        """Return an independent copy."""
        child = object.__new__(type(self))
        child._tokenizer, child._skip_special = self._tokenizer, self._skip_special
        child._ids, child._read, child._known = self._ids.copy(), self._read, self._known
        child._pushed, child._text = self._pushed.copy(), self._text
        return child

    @property
    def text(self) -> str:
        """What is certain of the text."""
        self._decode_pushed()
        return self._text

    def cut_text(self, length: int) -> None:
        """Keep the first ``length`` characters."""
        self._text = self.text[:length]

    def push(self, token_id: int) -> None:
        """Add a token; it is decoded when somebody asks for the text."""
        self._pushed.append(token_id)

    def append(self, token_id: int) -> str:
        """Add a token and return the text that became certain with it, perhaps none."""
        self._decode_pushed()
        return self._append(token_id)

    def flush(self) -> str:
        """Return what was held back for a character that will not be finished now."""
        self._decode_pushed()
        return "" if self._read == len(self._ids) else self._emit(self._before(), self._decode(self._ids))

    def _append(self, token_id: int) -> str:
        before = self._before()
        self._ids.append(token_id)
        after = self._decode(self._ids)
        if after.endswith(REPLACEMENT) and len(self._ids) - self._read < MOST_PENDING:
            return ""
        return self._emit(before, after)

    def _decode_pushed(self) -> None:
        """Decode what was pushed; one by one if a character in it is broken: the steps decide how that is shown."""
        pushed, self._pushed = self._pushed, []
        if len(pushed) > 1 and self._read == len(self._ids):
            before, after = self._before(), self._decode(self._ids + pushed)
            if after.startswith(before) and REPLACEMENT not in after[len(before) :]:
                self._ids += pushed
                self._emit(before, after)
                return
        for token_id in pushed:
            self._append(token_id)

    def _before(self) -> str:
        if self._known is None:
            self._known = self._decode(self._ids[: self._read])
        return self._known

    def _emit(self, before: str, after: str) -> str:
        """Take the whole window's text ``after``, of which ``before`` was certain, for certain."""
        piece, begin = after[len(before) :], self._read
        self._text += piece
        self._known, self._read = after, len(self._ids)
        if self._read > (WINDOW if piece else MOST_CONTEXT) or REPLACEMENT in piece:
            del self._ids[:begin]
            self._known, self._read = None, len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special) if ids else ""


def find_stop_string(text: str, new_chars: int, stop: Sequence[str]) -> tuple[int, str] | None:
    """Find the stop string that ends first in ``text``, looking only where the last ``new_chars`` could complete one.

    Returns:
        ``(position where it begins, the stop string)``, or None.
    """
    best: tuple[int, int, str] | None = None
    for string in stop:
        begin = text.find(string, max(0, len(text) - new_chars - len(string) + 1))
        if begin >= 0 and (best is None or (begin + len(string), begin) < best[:2]):
            best = (begin + len(string), begin, string)
    return None if best is None else (best[1], best[2])


def held_back(text: str, stop: Sequence[str]) -> int:
    """Return how many last characters of ``text`` could be the beginning of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
