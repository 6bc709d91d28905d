"""New tokens to text, stop conditions and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.engine.detokenizer import Detokenizer, find_stop_string, held_back
from folo_core.outputs import CompletionOutput, Logprob, RequestOutput
from folo_core.sampling_params import RequestOutputKind
from folo_core.sequence import SequenceStatus

if TYPE_CHECKING:
    from folo_core.execution.interface import Candidates, RequestSample
    from folo_core.execution.loading import Tokenizer
    from folo_core.outputs import TokenLogprobs
    from folo_core.request import Request
    from folo_core.sequence import Sequence


class OutputProcessor:
    """Follows every sequence's text, for one engine."""

    def __init__(self, tokenizer: Tokenizer | None, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._sent: dict[int, tuple[int, int]] = {}
        """Sequence id to (characters, tokens) already sent, for DELTA outputs."""

    def open(self, request: Request, sequence: Sequence) -> None:
        """Give a request's first sequence its detokenizer, if text is wanted, with the tokens that it took over."""
        if self.tokenizer is not None and request.params.detokenize:
            sequence.detokenizer = Detokenizer(
                self.tokenizer, request.prompt_token_ids, skip_special_tokens=request.params.skip_special_tokens
            )
            for token in sequence.data.output_token_ids:
                sequence.detokenizer.push(token)

    def append(self, request: Request, sequence: Sequence, sample: RequestSample, row: int) -> SequenceStatus | None:
        """Append a row's new tokens up to the first that ends the sequence.

        Returns:
            The final status, or None if the sequence goes on.
        """
        candidates = sample.logprobs[row] if sample.logprobs is not None else []
        stated = sample.stated[row] if sample.stated is not None and not sample.kept[row] else []
        for position, token in enumerate(sample.tokens[row]):
            found = candidates[position] if position < len(candidates) else None
            if found is not None and sequence.logprobs is not None:
                sequence.logprobs.append(self.decode_candidates(found))
            logprob = found[1][0] if found is not None else stated[position] if position < len(stated) else None
            status = self.append_token(request, sequence, token, logprob)
            if status is not None:
                return status
        return None

    def append_token(
        self, request: Request, sequence: Sequence, token: int, logprob: float | None = None
    ) -> SequenceStatus | None:
        """Append one token, decide whether it ends the sequence, and move its text on.

        Returns:
            As ``append``.
        """
        data, params = sequence.data, request.params
        data.append(token, logprob)
        count = len(data.output_token_ids)
        may_stop = count >= params.min_tokens
        stopped = False
        if may_stop and token in params.resolved_eos and not params.ignore_eos:
            stopped = True
        elif may_stop and token in params.stop_token_ids:
            stopped, sequence.stop_reason = True, token
        self._extend_text(request, sequence, token, stopped=stopped, may_stop=may_stop)
        if stopped or isinstance(sequence.stop_reason, str):
            return SequenceStatus.FINISHED_STOPPED
        if count >= (params.max_tokens or 0) or data.num_tokens >= self.max_model_len:
            return self._cap(request, sequence, may_stop=may_stop)
        return None

    def _cap(self, request: Request, sequence: Sequence, *, may_stop: bool) -> SequenceStatus:
        """End at the length limit, unless the text held back for an unfinished character completes a stop string."""
        if sequence.detokenizer is not None:
            piece = sequence.detokenizer.flush()
            if may_stop and piece and self._cut_at_stop(request, sequence, len(piece)):
                return SequenceStatus.FINISHED_STOPPED
        return SequenceStatus.FINISHED_LENGTH_CAPPED

    def _extend_text(self, request: Request, sequence: Sequence, token: int, *, stopped: bool, may_stop: bool) -> None:
        """Append the token's text; a token that ends the sequence is text only if the caller asks for it."""
        detokenizer = sequence.detokenizer
        if detokenizer is None:
            return
        params = request.params
        if not (stopped or params.stop):
            detokenizer.push(token)
            return
        piece = "" if stopped and not params.include_stop_str_in_output else detokenizer.append(token)
        piece += detokenizer.flush() if stopped else ""
        if may_stop and piece and params.stop:
            self._cut_at_stop(request, sequence, len(piece))

    def _cut_at_stop(self, request: Request, sequence: Sequence, new_chars: int) -> bool:
        """Cut the text at a stop string that the newest characters completed."""
        detokenizer, params = sequence.detokenizer, request.params
        if detokenizer is None or not params.stop:
            return False
        found = find_stop_string(detokenizer.text, new_chars, params.stop)
        if found is None:
            return False
        begin, sequence.stop_reason = found
        keep = begin + len(found[1]) if params.include_stop_str_in_output else begin
        detokenizer.cut_text(keep)
        return True

    def decode_candidates(self, candidates: Candidates) -> TokenLogprobs:
        """Turn a position's candidates into the form callers see; the sampled token comes first."""
        ids, values, rank = candidates
        entries = {ids[0]: Logprob(values[0], rank, self._token_text(ids[0]))}
        for place, (token, value) in enumerate(zip(ids[1:], values[1:], strict=True), start=1):
            if token not in entries:
                entries[token] = Logprob(value, place, self._token_text(token))
        return entries

    def _token_text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token])

    def output(
        self, request: Request, sequences: list[Sequence], *, finished: bool, error: Exception | None = None
    ) -> RequestOutput | None:
        """Return what the caller should see now, or None if it asked for the final output only."""
        kind = request.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        if delta and not finished and not request.params.grows_in_place:
            return None
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[
                self._completion(request, s, place if finished and not delta else s.index, delta=delta)
                for place, s in enumerate(sequences)
            ],
            finished=finished,
            prompt_logprobs=request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
            num_cached_tokens=max((s.num_cached_tokens for s in sequences), default=0),
            metrics=request.metrics,
            error=error,
        )

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept about a sequence that has ended and been reported."""
        self._sent.pop(sequence.seq_id, None)

    def _completion(self, request: Request, sequence: Sequence, index: int, *, delta: bool) -> CompletionOutput:
        text, ready = self._visible_text(request, sequence)
        tokens, logprobs = sequence.data.output_token_ids, sequence.logprobs
        chars, count = self._sent.get(sequence.seq_id, (0, 0)) if delta else (0, 0)
        if delta:
            self._sent[sequence.seq_id] = (ready, len(tokens))
        return CompletionOutput(
            index=index,
            text=text[chars:ready],
            token_ids=tokens[count:],
            cumulative_logprob=sequence.data.cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[count:],
            finish_reason=sequence.status.finish_reason,
            stop_reason=sequence.stop_reason,
            score=sequence.score if request.params.is_scored else None,
        )

    def _visible_text(self, request: Request, sequence: Sequence) -> tuple[str, int]:
        """Return the text and how much of it may be shown: not what may yet turn out to be a stop string."""
        if sequence.detokenizer is None:
            return "", 0
        text = sequence.detokenizer.text
        stop = request.params.stop
        held = held_back(text, stop) if stop and not sequence.is_finished else 0
        return text, len(text) - held
