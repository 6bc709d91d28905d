"""Runs a sampler through whole lives of requests, without a model, and checks every answer against the contract."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import attrs
import torch

from folo_core.sequence import SequenceStatus
from folo_core.testing.builders import logits_of, make_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from folo_core.request import Request
    from folo_core.sampling.interface import Sampler, SamplerOutput
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence as TokenSequence


def require(condition: object, message: str) -> None:
    """Assert with a message that says what the contract wants; works under ``python -O`` too."""
    if not condition:
        raise AssertionError(message)


def check_sampler_output(output: SamplerOutput, metadata: SamplingMetadata, vocab_size: int) -> None:
    """Check shapes, dtypes and ranges of one step's answer, and that no row left its request.

    Raises:
        AssertionError: naming the field that breaks the contract.
    """
    parents, tokens = output.parents, output.tokens
    require(parents.dtype == torch.int64 and parents.dim() == 1, f"parents: {_show(parents)}: must be int64 [m]")
    require(
        tokens.dtype == torch.int64 and tokens.dim() == 2 and tokens.shape[1] >= 1,  # noqa: PLR2004 (a matrix)
        f"tokens: {_show(tokens)}: must be int64 [m, k], k >= 1",
    )
    require(len(tokens) == len(parents), f"tokens: {len(tokens)} rows for {len(parents)} parents")
    rows = parents.tolist()
    require(all(0 <= row < metadata.num_rows for row in rows), f"parents: {rows}: outside 0..{metadata.num_rows - 1}")
    order = list(dict.fromkeys(metadata.request_ids))
    places = [order.index(metadata.request_ids[row]) for row in rows]
    require(places == sorted(places), f"parents: {rows}: rows of a request must stay adjacent and in request order")
    padded = (tokens[:, :-1] < 0) & (tokens[:, 1:] >= 0)
    require(not padded.any(), "tokens: -1 may only pad on the right")
    require((tokens[:, 0] >= 0).all() and (tokens >= -1).all(), "tokens: each row appends at least one token id >= 0")
    require((tokens < vocab_size).all(), f"tokens: largest is {int(tokens.max()) if len(rows) else 0} >= {vocab_size}")
    if (logprobs := output.logprobs) is not None:
        require(
            logprobs.dtype == torch.float32 and logprobs.shape == tokens.shape,
            f"logprobs: {_show(logprobs)}: must be float32 {tuple(tokens.shape)}",
        )
        require((logprobs[tokens >= 0] <= 0).all(), "logprobs: a log probability is <= 0 and not NaN")
    if (finished := output.finished) is not None:
        require(
            finished.dtype == torch.bool and finished.shape == parents.shape,
            f"finished: {_show(finished)}: must be bool {tuple(parents.shape)}",
        )


@attrs.define
class SamplerHarness:
    """The engine's side of a sampler. ``logits_of`` stands in for the model."""

    sampler: Sampler
    vocab_size: int
    logits_of: Callable[[Sequence[int], int], torch.Tensor] = logits_of
    live: list[Request] = attrs.field(factory=list)
    _ids: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    def run(self, requests: Sequence[Request], steps: int) -> dict[str, list[list[int]]]:
        """Add the requests, step, end them, and return each one's ranked outputs by request id."""
        for request in requests:
            self.add(request)
        for _ in range(steps):
            self.step()
        return {request.request_id: self.end(request) for request in requests}

    def add(self, request: Request) -> None:
        """Admit a request."""
        self.sampler.add_request(request)
        request.open_sequence(next(self._ids)).transition(SequenceStatus.RUNNING)
        self.live.append(request)

    def step(self) -> SamplerOutput | None:
        """Sample once for every live row; None when there is none."""
        rows = [(request, sequence) for request in self.live for sequence in request.live]
        if not rows:
            return None
        histories = [list(sequence.data.token_ids) for _, sequence in rows]
        metadata = make_metadata(
            [request.params for request, _ in rows],
            vocab_size=self.vocab_size,
            request_ids=[request.request_id for request, _ in rows],
            seeds=[request.seed for request, _ in rows],
            sequence_indices=[sequence.index for _, sequence in rows],
            histories=histories,
            prompt_lengths=[len(request.prompt_token_ids) for request, _ in rows],
        )
        logits = torch.stack([self.logits_of(history, self.vocab_size) for history in histories])
        output = self.sampler.step(logits, metadata)
        check_sampler_output(output, metadata, self.vocab_size)
        self._apply(output, rows)
        return output

    def end(self, request: Request) -> list[list[int]]:
        """End a request at its length and return the output tokens of the sequences that the sampler kept."""
        for sequence in list(request.live):
            request.close_sequence(sequence, SequenceStatus.FINISHED_LENGTH_CAPPED)
        ranked = self.sampler.finish(request)
        known = {id(sequence) for sequence in request.finished}
        require({id(s) for s in ranked} <= known, "finish: returned a sequence that is not the request's own")
        require(len({id(s) for s in ranked}) == len(ranked), "finish: returned a sequence twice")
        self.sampler.remove_request(request.request_id)
        self.live.remove(request)
        return [sequence.data.output_token_ids for sequence in ranked]

    def _apply(self, output: SamplerOutput, rows: list[tuple[Request, TokenSequence]]) -> None:
        """Re-parent as the engine does: a parent's first child goes on as the parent, the others are forks."""
        parents = output.parents.tolist()
        children = [
            parent if parents.index(row) == child else request.fork_sequence(parent, next(self._ids))
            for child, row in enumerate(parents)
            for request, parent in [rows[row]]
        ]
        finished = [False] * len(parents) if output.finished is None else output.finished.tolist()
        for request in self.live:
            request.live[:] = [c for c, row in zip(children, parents, strict=True) if rows[row][0] is request]
        for child, row, tokens, done in zip(children, parents, output.tokens.tolist(), finished, strict=True):
            for token in tokens:
                if token >= 0:
                    child.add_token_id(token)
            if done:
                rows[row][0].close_sequence(child, SequenceStatus.FINISHED_STOPPED)


def _show(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
