"""``bad_words``: words that are never generated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from folo_core.errors import ParamsError
from folo_sampling.ragged import Ragged, lay_out, refuse_outside

if TYPE_CHECKING:
    import torch

    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams

_Ends = dict[int, list[tuple[list[int], int]]]
"""For a token that may precede the last one of a bad word: all tokens before the last, and the last."""


class BadWords:
    """Masks the last token of a bad word where the output ends in all of its other tokens.

    The words' token ids come in ``resolved_bad_words``, every way in which a word is tokenised. As in vLLM, only
    the output is compared: a word may be completed whose beginning stands in the prompt.
    """

    argmax_invariant = False
    needs_history = True
    graph_safe = False

    def __init__(self, device: torch.device) -> None:
        """Work on logits that live on ``device``."""
        self._device = device
        self._singles = Ragged(device, lambda params: [word[0] for word in params.resolved_bad_words if len(word) == 1])
        self._ends: dict[int, tuple[SamplingParams, _Ends]] = {}

    def applies(self, params: SamplingParams) -> bool:
        """Whether some word is forbidden."""
        return bool(params.bad_words or params.resolved_bad_words)

    def validate_params(self, params: SamplingParams, vocab_size: int) -> None:
        """Raise ParamsError if the words have no token ids, or one outside the vocabulary."""
        if not params.resolved_bad_words:
            raise ParamsError(f"bad_words: {params.bad_words}: no token ids were found for them; load a tokenizer")
        refuse_outside("bad_words", (token for word in params.resolved_bad_words for token in word), vocab_size)

    def apply(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Mask in place."""
        rows, ids, _ = self._singles.of(metadata.params)
        logits[rows, ids] = -math.inf
        histories = zip(metadata.params, metadata.history or [], metadata.prompt_lengths, strict=True)
        completing = [self._completing(*row) for row in histories]
        if any(completing):
            logits[lay_out(completing, self._device)] = -math.inf
        return logits

    def _completing(self, params: SamplingParams, history: list[int], prompt_length: int) -> list[int]:
        """Return the tokens that would complete a word of several tokens."""
        generated = len(history) - prompt_length
        ends = self._ends_of(params).get(history[-1], [])
        return [last for start, last in ends if len(start) <= generated and history[-len(start) :] == start]

    def _ends_of(self, params: SamplingParams) -> _Ends:
        known = self._ends.get(id(params))
        if known is None:
            ends: _Ends = {}
            for word in params.resolved_bad_words:
                if len(word) > 1:
                    ends.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))
            if len(self._ends) >= 1024:  # noqa: PLR2004 (a bound on memory, not a tuning knob)
                self._ends.clear()
            known = self._ends[id(params)] = (params, ends)
        return known[1]
