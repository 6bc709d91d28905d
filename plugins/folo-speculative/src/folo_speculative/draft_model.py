"""A small model of the same tokenizer drafts, token after token, what it would say itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from folo_core.errors import ConfigError
from folo_core.sampling.interface import Draft
from folo_speculative.config import SECTION, section_of
from folo_speculative.draws import DRAFTING, PlainDraws
from folo_speculative.params import SpeculativeParams

if TYPE_CHECKING:
    from folo_core.sampling.interface import SamplerContext
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams


class DraftModelProposer:
    """Reads along with every sequence and draws from the draft model with the request's own parameters."""

    def __init__(self, context: SamplerContext) -> None:
        """Open the draft model.

        Raises:
            ConfigError: the configuration names none, or one with another tokenizer.
        """
        name = section_of(context.config).draft_model
        if name is None:
            message = f"plugins.{SECTION}.draft_model: None: the proposer draft-model needs it: name a small model"
            raise ConfigError(message)
        self.model = context.side_model(name)
        self._draws = PlainDraws(context)

    def propose(self, metadata: SamplingMetadata, max_tokens: int) -> Draft:
        """Draft ``max_tokens`` tokens for each row: sampled ones with their distributions, greedy ones as certain."""
        keys = list(zip(metadata.request_ids, metadata.sequence_indices.tolist(), strict=True))
        texts = [list(history) for history in metadata.history or []]
        greedy = [self._is_greedy(params) for params in metadata.params]
        tokens, probs = [], []
        for place in range(max_tokens):
            logits = self.model.logits(keys, texts)
            view = attrs.evolve(
                metadata,
                positions=metadata.positions + place,
                sequence_indices=metadata.sequence_indices + DRAFTING,
                drafts=None,
            )
            known = None if all(greedy) else self._draws.distribution
            stated = None if known is None else known.probabilities(logits, view)
            tokens.append(self._draws.tokens(logits, view, greedy))
            if stated is not None:
                certain = torch.tensor(greedy, device=logits.device)
                one_hot = torch.nn.functional.one_hot(tokens[-1][certain], logits.shape[1])
                stated[certain] = one_hot.to(stated.dtype)
                probs.append(stated)
            for text, token in zip(texts, tokens[-1].tolist(), strict=True):
                text.append(token)
        return Draft(tokens=torch.stack(tokens, 1), probs=torch.stack(probs, 1) if probs else None)

    def remove_request(self, request_id: str) -> None:
        """Return the blocks that the draft model kept for the request."""
        self.model.forget_request(request_id)

    def _is_greedy(self, params: SamplingParams) -> bool:
        chosen = isinstance(params, SpeculativeParams) and params.greedy_draft
        return chosen or params.temperature == 0 or self._draws.distribution is None
