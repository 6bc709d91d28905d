"""Phrases that must appear: dynamic beam allocation (Post and Vilar, NAACL 2018). Imports torch only in use.

A candidate belongs to the bank of hypotheses that have as many tokens of phrases as it has. The beam is dealt out
evenly over the banks, so hypotheses that are on their way to a phrase survive beside likelier ones that are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from folo_core.errors import ParamsError
from folo_core.validation import are_token_ids, as_int, is_text, rule, show

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from folo_beam.sampler import Search
    from folo_core.request import Request
    from folo_core.sequence import Sequence
    from folo_core.validation import Data

MOST_PHRASES = 62
"""Phrases of one request: which of them a row has met is one bit each of its tag, an int64."""

Phrases = tuple[str | tuple[int, ...], ...]


def as_phrases(value: Data) -> Data:
    """Converter: lists become tuples, one text a tuple of it; anything else stays."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        return value
    return tuple(tuple(map(as_int, phrase)) if isinstance(phrase, list | tuple) else phrase for phrase in value)


def are_phrases() -> dict[str, Any]:
    """Metadata of a field of texts and tuples of token ids."""

    def fine(value: object) -> bool:
        if type(value) is not tuple or len(value) > MOST_PHRASES:
            return False
        return all(is_text(phrase) or (bool(phrase) and are_token_ids(phrase)) for phrase in value)

    return rule(fine, f"must be a list of at most {MOST_PHRASES} texts or non-empty lists of token ids")


def given_tokens(phrases: Phrases) -> list[tuple[int, ...]]:
    """Those phrases that are given as token ids, each once."""
    return [phrase for phrase in dict.fromkeys(phrases) if not isinstance(phrase, str)]


def phrases_fit(params: Any) -> str | None:  # noqa: ANN401 (BeamParams, whose module imports this one)
    """The rule that an answer has room for the phrases given as token ids."""
    tokens = sum(map(len, given_tokens(params.must_include)))
    if params.max_tokens is None or tokens <= params.max_tokens:
        return None
    return f"must_include: {tokens} tokens: must fit max_tokens ({params.max_tokens})"


@attrs.frozen(slots=True)
class Row:
    """What one live row has of the phrases."""

    met: int
    """A bit for each phrase that has appeared."""
    begun: tuple[tuple[int, ...], ...]
    """For each phrase: every number of its first tokens that the row's newest tokens are; empty when met."""


@attrs.frozen(slots=True)
class Banks:
    """The phrases of one request, and the choice of its next rows."""

    phrases: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, request: Request, tokenizer: Any, ends: Collection[int]) -> Banks:  # noqa: ANN401 (any tokenizer)
        """Encode a request's phrases.

        Raises:
            ParamsError: a phrase is text and there is no tokenizer, holds a token that ends an answer, or all
                together are longer than ``max_tokens``.
        """
        given: Phrases = request.params.must_include  # type: ignore[attr-defined]  # BeamParams picked this sampler
        if tokenizer is None and any(isinstance(phrase, str) for phrase in given):
            message = f"must_include: {show(given)}: texts need a tokenizer: give lists of token ids"
            raise ParamsError(message)
        encoded = (tokenizer.encode(p, add_special_tokens=False) if isinstance(p, str) else p for p in given)
        phrases = tuple(dict.fromkeys(map(tuple, encoded)))
        if any(not phrase or not set(ends).isdisjoint(phrase) for phrase in phrases):
            message = f"must_include: {show(given)}: a phrase has no tokens, or one that ends the answer: leave it out"
            raise ParamsError(message)
        phrases = tuple(p for p in phrases if not any(p != other and _holds(other, p) for other in phrases))
        most = request.params.max_tokens or 0
        if sum(map(len, phrases)) > most:
            message = f"must_include: {sum(map(len, phrases))} tokens: must fit max_tokens ({most}): shorten them"
            raise ParamsError(message)
        return cls(phrases)

    @property
    def all_met(self) -> int:
        """The tag of a row in which every phrase has appeared."""
        return (1 << len(self.phrases)) - 1

    def wanted(self, request: Request) -> list[list[int]]:
        """Return for each live row the tokens with which some phrase that is not met yet goes on or begins."""
        return [
            [*{p[n]: None for p, begun in zip(self.phrases, row.begun, strict=True) for n in begun}]
            for row in map(self._row, request.live)
        ]

    def _row(self, sequence: Sequence) -> Row:
        """Read a live row: its tag says what it has met, its newest tokens what it has begun."""
        longest = max(map(len, self.phrases), default=1)
        newest = tuple(sequence.data.output_token_ids[-longest:])
        begun = tuple(
            () if sequence.tag >> bit & 1 else tuple(n for n in range(len(p)) if not n or p[:n] == newest[-n:])
            for bit, p in enumerate(self.phrases)
        )
        return Row(sequence.tag, begun)

    def after(self, row: Row, token: int) -> tuple[int, int]:
        """Return the phrases met once ``token`` follows (a bit each), and the phrases' tokens still missing at most.

        Phrases that could overlap are counted in full, so an answer that fits only because they do may be dropped.
        """
        met, missing, longest = row.met, 0, 0
        for bit, (phrase, begun) in enumerate(zip(self.phrases, row.begun, strict=True)):
            length = max((n + 1 for n in begun if phrase[n] == token), default=0)
            if length == len(phrase):
                met |= 1 << bit
            elif not met >> bit & 1:
                missing, longest = missing + len(phrase), max(longest, length)
        return met, missing - longest

    def choose(
        self, request: Request, rows: list[int], tokens: list[int], stops: list[bool]
    ) -> tuple[list[bool], list[bool], list[int]]:
        """Choose among candidates, best first.

        One that leaves no room for what it misses is dropped, so phrases appear whatever their probability.

        Args:
            request: the candidates' request.
            rows: the row that each continues, by its place in the step's logits.
            tokens: the token that each adds.
            stops: whether each ends an answer; may be longer than ``rows``, as the results then are.

        Returns:
            For each candidate: whether it goes on, whether it may finish, and its tag.
        """
        live, first, width = [*map(self._row, request.live)], min(rows), request.params.num_sequences
        room = (request.params.max_tokens or 0) - len(request.live[0].data.output_token_ids) - 1
        found = [self.after(live[row - first], token) for row, token in zip(rows, tokens, strict=True)]
        count = range(len(found))
        places = [place for place in count if found[place][1] <= room] or [*count]
        whole = [place for place in places if not found[place][1]][:width]
        banks: dict[int, list[int]] = {}
        for place in places:
            if not stops[place]:
                banks.setdefault(found[place][1], []).append(place)
        going = _deal(banks, sum(map(len, self.phrases)) + 1, width)
        if not going and not whole:  # what is missing is masked, or the answer ends without it: better that than none
            whole = places[:width]
        every = range(len(stops))
        met = [met for met, _ in found] + [0] * (len(stops) - len(found))
        return [p in going for p in every], [stops[p] and p in whole for p in every], met


def choose(
    searches: list[Search], rows: list[list[int]], tokens: list[list[int]], stops: list[list[bool]], counts: list[int]
) -> list[list[list[Any]]]:
    """Return ``Banks.choose`` of every search: three columns, of which each has a row for each search."""
    found = [
        search.banks.choose(search.request, rows[i][:count], tokens[i][:count], stops[i])
        for i, (search, count) in enumerate(zip(searches, counts, strict=True))
        if search.banks is not None
    ]
    return [list(column) for column in zip(*found, strict=True)]


def add_wanted(
    logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, wanted: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``values`` and ``ids`` ``[rows, n]`` with each row's wanted tokens behind, -inf where there is no more."""
    import torch

    longest = max(map(len, wanted))
    padded = [[*row, *[-1] * (longest - len(row))] for row in wanted]
    more = torch.tensor(padded, dtype=torch.int64, device=ids.device)
    new = (more >= 0) & (more[:, :, None] != ids[:, None, :]).all(2)
    more = more.clamp_(min=0)
    found = logits.gather(1, more).masked_fill_(~new, -torch.inf)
    return torch.cat((values, found), 1), torch.cat((ids, more), 1)


def _holds(tokens: tuple[int, ...], phrase: tuple[int, ...]) -> bool:
    starts = range(len(tokens) - len(phrase) + 1)
    return any(tokens[start : start + len(phrase)] == phrase for start in starts)


def _deal(banks: dict[int, list[int]], number: int, width: int) -> set[int]:
    """Deal ``width`` places out to banks 0 to ``number - 1``: evenly, what is left to those that miss least.

    A bank that cannot fill its share leaves the rest of it to the others, nearest to the end first.
    """
    shares = {bank: width // number + (bank < width % number) for bank in range(number)}
    chosen = {bank: found[: shares[bank]] for bank, found in sorted(banks.items())}
    left = width - sum(map(len, chosen.values()))
    for bank, found in sorted(banks.items()):
        extra = found[len(chosen[bank]) :][:left]
        chosen[bank] += extra
        left -= len(extra)
    return {place for found in chosen.values() for place in found}
