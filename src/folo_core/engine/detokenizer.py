"""Token ids to text, token by token, in linear time, and stop strings on the way.

A token's text can depend on its neighbours: a character may need several tokens, and some tokenizers drop a
leading space at the start of a text. So each step decodes a short window twice, with and without the new tokens,
and takes the difference. Streamed pieces join to the final text by construction.
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
MOST_CONTEXT = 64
"""Tokens of left context kept while nothing visible is decoded (a run of special tokens)."""


class Detokenizer:
    """One sequence's text so far.

    ``text`` is final, except that ``sendable`` of it may be streamed while a stop string could still begin
    in the rest.
    """

    __slots__ = ("_ids", "_prefix", "_read", "_skip_special", "_tokenizer", "text")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._ids = list(prompt_token_ids[-PROMPT_CONTEXT:])
        self._prefix = 0
        self._read = len(self._ids)
        self.text = ""

    def fork(self) -> Self:
        """Return an independent copy."""
        child = object.__new__(type(self))
        child._tokenizer, child._skip_special = self._tokenizer, self._skip_special
        child._ids, child._prefix, child._read = self._ids.copy(), self._prefix, self._read
        child.text = self.text
        return child

    def append(self, token_id: int) -> str:
        """Add a token and return the text that became certain with it, perhaps none."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        pending = len(self._ids) - self._read
        if after.endswith(REPLACEMENT) and pending < MOST_PENDING:
            return ""
        return self._emit(before, after)

    def flush(self) -> str:
        """Return what was held back for a character that will not be finished now."""
        if self._read == len(self._ids):
            return ""
        return self._emit(self._decode(self._ids[self._prefix : self._read]), self._decode(self._ids[self._prefix :]))

    def _emit(self, before: str, after: str) -> str:
        piece = after[len(before) :]
        if piece or len(self._ids) - self._prefix > MOST_CONTEXT:
            self._prefix = self._read
        self._read = len(self._ids)
        if self._prefix:
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        self.text += piece
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
