"""Prompts and parameters in, admitted requests out. Everything a request could do wrong is refused here."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import attrs

from folo_core.engine.observer import BranchObserver
from folo_core.errors import ParamsError, RequestError
from folo_core.kv_cache.prefix_cache import PrefixRoots
from folo_core.request import Request, RequestMetrics

if TYPE_CHECKING:
    from folo_core.components import Components
    from folo_core.kv_cache.manager import KVCacheManager
    from folo_core.sampling_params import SamplingParams


Prompt = str | Mapping[str, object] | Sequence[int]
"""A text, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or a list of token ids. A mapping may hold a
``cache_salt``: what was computed for this prompt is then found by prompts of the same salt alone."""


class InputProcessor:
    """Tokenises, validates and resolves, for one engine."""

    def __init__(self, components: Components, kv: KVCacheManager) -> None:
        self.components = components
        self.kv = kv
        self.tokenizer = components.tokenizer
        self.info = components.model_info
        limit = components.config.scheduler.max_model_len
        assert limit is not None  # noqa: S101 (a resolved config)
        self.max_model_len = limit
        self._roots = PrefixRoots()
        self._seeds = random.Random(components.config.model.seed)  # noqa: S311 (sampling, not secrets)
        self._resolved: dict[int, tuple[SamplingParams, SamplingParams]] = {}

    def process(  # noqa: PLR0913 (as many as Engine.add_request has)
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival: int = 0,
        tenant: str = "",
    ) -> Request:
        """Build a request that the engine can run.

        Raises:
            RequestError: the prompt is empty, too long, of a wrong type, or has ids outside the vocabulary.
            ParamsError: the parameters do not fit the model or the engine's caps, or no sampler serves them.
        """
        metrics = RequestMetrics()
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        root = self._roots.root(_text("tenant", tenant), _salt(prompt))
        components = self.components
        sampler = components.sampler_for(params)
        resolved = self._resolve_params(params)
        room = self.max_model_len - len(token_ids)
        max_tokens = room if resolved.max_tokens is None else min(resolved.max_tokens, room)
        request = Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=resolved if max_tokens == resolved.max_tokens else self._shorten(resolved, max_tokens),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            priority=priority,
            tenant=tenant,
            prefix_root=root,
            arrival=arrival,
            sampler=sampler,
            width=resolved.num_sequences,
            steady_after=self._steady_after(sampler, resolved),
            metrics=metrics,
        )
        self._check_size(request, max_tokens)
        if request.steady_after is not None and components.executor.reparents(sampler):
            # Whoever follows branches wants each of them by name, which rows that run ahead do not keep.
            watched = any(isinstance(observer, BranchObserver) for observer in components.observers)
            request = attrs.evolve(request, reparents=True, steady_after=None if watched else request.steady_after)
        return request

    def branch(  # noqa: PLR0913 (as many as Engine.fork has)
        self,
        request_id: str,
        source: Request,
        row: int,
        at: int | None,
        params: SamplingParams | None,
        *,
        arrival: int,
    ) -> Request:
        """Build a request that goes on from the first ``at`` output tokens of one of ``source``'s live sequences.

        Raises:
            RequestError: there is no such row or no such token.
            ParamsError: as ``process``, or the parameters leave nothing to generate.
        """
        if not 0 <= row < len(source.live):
            message = f"row: {row}: request {source.request_id!r} has {len(source.live)} live sequences: from 0 on"
            raise RequestError(message)
        parent = source.live[row]
        have = len(parent.data.output_token_ids)
        keep = have if at is None else at
        if not 0 <= keep <= have:
            message = f"at: {at}: request {source.request_id!r} has {have} output tokens: use 0 to {have}"
            raise RequestError(message)
        params = attrs.evolve(source.params, seed=None) if params is None else params
        prompt = {"prompt": source.prompt, "prompt_token_ids": source.prompt_token_ids}
        request = self.process(
            request_id, prompt, params, priority=source.priority, arrival=arrival, tenant=source.tenant
        )
        request = attrs.evolve(request, prefix_root=source.prefix_root)
        if keep >= (request.params.max_tokens or 0):
            message = f"max_tokens: {request.params.max_tokens}: the branch takes over {keep} tokens, so ask for more"
            raise ParamsError(message)
        if request.params.logprobs is not None and parent.logprobs is None and keep:
            message = f"logprobs: {request.params.logprobs}: request {source.request_id!r} did not ask for those it has"
            raise ParamsError(message)
        return request

    def _steady_after(self, sampler: str, params: SamplingParams) -> int | None:
        """From how many tokens on the request may run ahead, where the executor keeps several steps in flight."""
        executor = self.components.executor
        return None if executor.max_steps_in_flight == 1 else executor.steady_after(sampler, params)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, dict):
            if "prompt_token_ids" in prompt:
                text = prompt.get("prompt")
                return text if isinstance(text, str) else None, self._as_ids(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt", prompt)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                message = "prompt is text, but skip_tokenizer_init=True: give {'prompt_token_ids': [...]}"
                raise RequestError(message)
            return prompt, tuple(self.tokenizer.encode(prompt))
        return None, self._as_ids(prompt)

    def _as_ids(self, value: object) -> tuple[int, ...]:
        if isinstance(value, (list, tuple)) and set(map(type, value)) <= {int}:
            return tuple(value)  # long prompts are looked at quickly: nearly all are plain ints
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(v, Integral) and not isinstance(v, bool) for v in value
        ):
            shown = repr(value)
            message = (
                f"prompt: {shown[:80]}{'…' if len(shown) > 80 else ''}: "  # noqa: PLR2004 (one screen line)
                "give a text, {'prompt': text}, {'prompt_token_ids': [int, ...]} or a list of token ids"
            )
            raise RequestError(message)
        return tuple(int(v) for v in value)

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            message = "prompt: it has no tokens: give at least one"
            raise RequestError(message, code="empty_prompt")
        if min(token_ids) < 0 or max(token_ids) >= self.info.vocab_size:
            bad = [t for t in token_ids if not 0 <= t < self.info.vocab_size]
            message = f"prompt_token_ids: {bad[:5]}: ids must lie in [0, {self.info.vocab_size})"
            raise RequestError(message, code="token_id_out_of_range")
        if len(token_ids) >= self.max_model_len:
            message = (
                f"prompt: {len(token_ids)} tokens: at most {self.max_model_len - 1} fit max_model_len="
                f"{self.max_model_len} with one token to generate; shorten it or raise max_model_len"
            )
            raise RequestError(message, code="context_length_exceeded")

    def _check_size(self, request: Request, max_tokens: int) -> None:
        """Refuse what could never run, however empty the engine is."""
        places = self.components.config.scheduler.max_num_seqs
        if request.width > places:
            message = (
                f"{request.params.width_name}: {request.width} sequences: at most max_num_seqs={places} run at once"
            )
            raise RequestError(message, code="too_many_sequences")
        tokens = len(request.prompt_token_ids) + max_tokens
        needed = self.kv.most_blocks(len(request.prompt_token_ids), tokens, request.width)
        if needed > self.kv.pool.num_usable:
            message = (
                f"request needs {needed} KV blocks ({tokens} tokens x {request.width} sequences), the cache has "
                f"{self.kv.pool.num_usable}: lower max_tokens or {request.params.width_name}, "
                "or give the cache more memory (kv_cache_bytes)"
            )
            raise RequestError(message, code="kv_cache_too_small")

    def _resolve_params(self, params: SamplingParams) -> SamplingParams:
        """Validate against the model and fill in token forms, once per params object however often it is used."""
        known = self._resolved.get(id(params))
        if known is not None and known[0] is params:
            return known[1]
        config = self.components.config
        params.validate_for(
            vocab_size=self.info.vocab_size,
            max_logprobs=config.max_logprobs,
            max_sequences=config.max_sequences_per_request,
        )
        self.components.check_served(params)
        if self.tokenizer is None and (params.stop or params.bad_words):
            message = "stop, bad_words: they are text, but skip_tokenizer_init=True: use stop_token_ids"
            raise ParamsError(message)
        resolved = attrs.evolve(
            params, resolved_eos=self.info.eos_token_ids, resolved_bad_words=self._bad_word_ids(params)
        )
        for part in self.components.processors:
            if part.part.applies(resolved):
                part.part.validate_params(resolved, self.info.vocab_size)
        if len(self._resolved) >= 1024:  # noqa: PLR2004 (a bound on memory, not a tuning knob)
            self._resolved.clear()
        self._resolved[id(params)] = (params, resolved)
        return resolved

    def _shorten(self, params: SamplingParams, max_tokens: int) -> SamplingParams:
        return attrs.evolve(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens))

    def _bad_word_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the token forms of each bad word: at the start of a text, and after a space."""
        if not params.bad_words or self.tokenizer is None:
            return ()
        forms: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for spelling in (word, " " + word.lstrip()):
                ids = tuple(self.tokenizer.encode(spelling, add_special_tokens=False))
                if ids:
                    forms[ids] = None
        return tuple(forms)


def _salt(prompt: Prompt) -> str:
    given = prompt.get("cache_salt", "") if isinstance(prompt, dict) else ""
    return _text("cache_salt", given)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        message = f"{name}: {value!r}: give a text"
        raise RequestError(message)
    return value
