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


class ConformanceError(AssertionError):
    """A part does not keep its contract; the message says how."""


def require(condition: object, message: str) -> None:
    """Assert with a message that says what the contract wants; works under ``python -O`` too."""
    if not condition:
        raise ConformanceError(message)


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
    require((tokens >= -1).all(), "tokens: token ids are >= 0, and -1 pads")
    require((tokens < vocab_size).all(), f"tokens: largest is {int(tokens.max()) if len(rows) else 0} >= {vocab_size}")
    if (logprobs := output.logprobs) is not None:
        require(
            logprobs.dtype == torch.float32 and logprobs.shape == tokens.shape,
            f"logprobs: {_show(logprobs)}: must be float32 {tuple(tokens.shape)}",
        )
        require((logprobs[tokens >= 0] <= 0).all(), "logprobs: a log probability is <= 0 and not NaN")
    for name, dtype in (("scores", torch.float32), ("tags", torch.int64)):
        if (column := getattr(output, name)) is not None:
            right = column.dtype == dtype and column.shape == parents.shape
            require(right, f"{name}: {_show(column)}: must be {str(dtype)[6:]} {tuple(parents.shape)}")
    require(output.scores is None or not output.scores.isnan().any(), "scores: a score is a number, not NaN")
    if (drafts := output.drafts) is not None:
        right = drafts.dtype == torch.int64 and drafts.dim() == 2 and len(drafts) == len(parents)  # noqa: PLR2004 (a matrix)
        require(right, f"drafts: {_show(drafts)}: must be int64 [{len(parents)}, d]")
        require(((drafts >= -1) & (drafts < vocab_size)).all(), f"drafts: outside -1..{vocab_size - 1}")
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
        rows = [
            (request, sequence, offset)
            for request in self.live
            for sequence in request.live
            for offset in range(len(sequence.draft_token_ids) + 1)
        ]
        if not rows:
            return None
        histories = [list(sequence.data.token_ids) + sequence.draft_token_ids[:offset] for _, sequence, offset in rows]
        drafts = [(sequence.draft_token_ids[offset:] or [-1])[0] for _, sequence, offset in rows]
        metadata = make_metadata(
            [request.params for request, _, _ in rows],
            vocab_size=self.vocab_size,
            request_ids=[request.request_id for request, _, _ in rows],
            seeds=[request.seed for request, _, _ in rows],
            sequence_indices=[sequence.index for _, sequence, _ in rows],
            histories=histories,
            prompt_lengths=[len(request.prompt_token_ids) for request, _, _ in rows],
            scores=[sequence.score for _, sequence, _ in rows],
            tags=[sequence.tag for _, sequence, _ in rows],
            drafts=drafts if max(drafts) >= 0 else None,
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

    def _apply(self, output: SamplerOutput, rows: list[tuple[Request, TokenSequence, int]]) -> None:
        """Re-parent as the engine does: a parent's first child goes on as the parent, the others are forks."""
        parents = [rows[row] for row in output.parents.tolist()]
        continued = [sequence for _, sequence, _ in parents]
        is_fork = [sequence in continued[:child] for child, sequence in enumerate(continued)]
        drafts = {id(sequence): sequence.draft_token_ids for _, sequence, _ in rows}
        children = [
            request.fork_sequence(sequence, next(self._ids)) if fork else sequence
            for (request, sequence, _), fork in zip(parents, is_fork, strict=True)
        ]
        for request in self.live:
            request.live[:] = [c for c, (owner, _, _) in zip(children, parents, strict=True) if owner is request]
        columns = {name: getattr(output, name) for name in ("finished", "scores", "tags", "drafts")}
        for place, (child, (request, sequence, offset)) in enumerate(zip(children, parents, strict=True)):
            for token in [*drafts[id(sequence)][:offset], *output.tokens[place].tolist()]:
                if token >= 0:
                    child.add_token_id(token)
            given = {name: column[place].tolist() for name, column in columns.items() if column is not None}
            child.score, child.tag = given.get("scores", child.score), given.get("tags", child.tag)
            child.draft_token_ids = [] if is_fork[place] else [t for t in given.get("drafts", []) if t >= 0]
            if given.get("finished"):
                request.close_sequence(child, SequenceStatus.FINISHED_STOPPED)


def _show(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
