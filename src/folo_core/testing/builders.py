"""Inputs for testing parts without an engine: metadata, requests and logits that are functions of their history."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from folo_core.request import Request
from folo_core.sampling.metadata import SamplingMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.plugins.registry import Registry
    from folo_core.sampling.interface import SamplerContext
    from folo_core.sampling_params import SamplingParams


def make_metadata(  # noqa: PLR0913 (each argument is one column of the metadata)
    params: Sequence[SamplingParams],
    *,
    vocab_size: int,
    request_ids: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    sequence_indices: Sequence[int] | None = None,
    histories: Sequence[list[int]] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    tags: Sequence[int] | None = None,
    drafts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> SamplingMetadata:
    """Build the metadata of one step as the engine would.

    Args:
        params: each row's parameters.
        vocab_size: width of the logits, in tokens; ``top_k`` is this when off.
        request_ids: each row's request, rows of one adjacent; by default every row is a request of its own.
        seeds: each row's seed; by default the params' seed, else 0.
        sequence_indices: each row's index within its request; by default counted from 0.
        histories: each row's token ids, prompt and output; by default one token, 0.
        prompt_lengths: how many of these are the prompt's; by default all.
        scores: what the strategy ranked each row by last; by default 0.
        tags: the number by which the strategy knows each row; by default 0.
        drafts: the drafted token after each row, -1 for none; by default nothing is drafted.
        device: where the tensors live.
    """
    rows = range(len(params))
    ids = list(request_ids) if request_ids is not None else [f"request-{row}" for row in rows]
    history = list(histories) if histories is not None else [[0] for _ in rows]
    indices = sequence_indices if sequence_indices is not None else [ids[:row].count(ids[row]) for row in rows]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    return SamplingMetadata(
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column(top_k, torch.int64),
        top_p=column([p.top_p for p in params], torch.float32),
        min_p=column([p.min_p for p in params], torch.float32),
        seeds=column(seeds if seeds is not None else [p.seed or 0 for p in params], torch.int64),
        sequence_indices=column(indices, torch.int64),
        positions=column([len(ids) for ids in history], torch.int64),
        places=np.array([len(ids) for ids in history], dtype=np.int64),
        slots=column(rows, torch.int64),
        scores=column(scores if scores is not None else [0.0] * len(params), torch.float32),
        tags=column(tags if tags is not None else [0] * len(params), torch.int64),
        drafts=None if drafts is None else column(drafts, torch.int64),
        request_ids=ids,
        params=list(params),
        prompt_lengths=list(prompt_lengths) if prompt_lengths is not None else [len(ids) for ids in history],
        history=history,
        all_greedy=all(p.temperature == 0 for p in params),
        any_top_k=any(k < vocab_size for k in top_k),
        any_top_p=any(p.top_p < 1 for p in params),
        any_min_p=any(p.min_p > 0 for p in params),
        need_logprobs=any(p.logprobs is not None for p in params),
    )


def make_context(
    *,
    vocab_size: int = 64,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
    **fields: Any,  # noqa: ANN401 (SamplerContext judges them)
) -> SamplerContext:
    """Build what a sampler's factory gets, with the plain samplers and proposers of the installed plugins.

    Args:
        vocab_size: width of a logits row, in tokens.
        device: where logits live.
        registry: the installed plugins, if they are loaded already.
        fields: more fields of SamplerContext, such as ``tokenizer``, ``config`` or ``side_model``.
    """
    from folo_core.plugins.assembly import sampler_context
    from folo_core.plugins.manager import load_registry

    registry = load_registry() if registry is None else registry
    return sampler_context(registry, vocab_size=vocab_size, device=torch.device(device), **fields)


def make_request(request_id: str, params: SamplingParams, *, prompt: Sequence[int] = (1, 2, 3)) -> Request:
    """Build a request as the engine admits it; its seed is the params', else one drawn from its id."""
    seed = params.seed if params.seed is not None else zlib.crc32(request_id.encode())
    return Request(request_id=request_id, prompt_token_ids=tuple(prompt), params=params, seed=seed)


def logits_of(history: Sequence[int], vocab_size: int) -> torch.Tensor:
    """Logits, float32 ``[vocab_size]``, that depend on the token ids and nothing else: a model without weights."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(list(history)).encode()))
    return torch.randn(vocab_size, generator=generator) * 2.0
