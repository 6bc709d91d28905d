"""How one request wants its tokens chosen: vLLM's names, defaults and ranges, checked at construction."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from folo_core.errors import ParamsError
from folo_core.validation import (
    INT64_MAX,
    INTERNAL,
    Checked,
    FrozenMap,
    Relation,
    are_texts,
    are_token_ids,
    as_float,
    as_int,
    as_optional_int,
    boolean,
    integer,
    number,
    rule,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.validation import (
        Data,
    )

GREEDY_BELOW = 1e-5
"""Temperatures under this are stored as 0 (greedy): dividing logits by them would overflow float32."""
BIAS_LIMIT = 100.0
"""Entries of ``logit_bias`` are clamped to plus or minus this, as vLLM and OpenAI's API do."""
_DIGITS = 20


class SamplingType(enum.Enum):
    """What kind of decoding plain SamplingParams ask for; together with their class it picks the sampler."""

    GREEDY = "greedy"
    RANDOM = "random"
    FAN_OUT = "fan_out"


class RequestOutputKind(enum.Enum):
    """What each streamed output carries."""

    CUMULATIVE = "cumulative"
    """Everything generated so far."""
    DELTA = "delta"
    """Only what is new."""
    FINAL_ONLY = "final_only"
    """Nothing until the request has finished."""


def _as_texts(value: str | Sequence[str] | None) -> Data:
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_ids(value: Collection[int] | None) -> Data:
    if value is None or (type(value) is tuple and not value):
        return ()
    if are_token_ids(value):
        return value
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        return value
    return tuple(map(as_int, value))


def _as_optional_ids(value: Collection[int] | None) -> Data:
    return None if value is None else _as_ids(value)


def _as_temperature(value: float) -> float:
    plain = as_float(value)
    return 0.0 if type(plain) is float and 0.0 <= plain < GREEDY_BELOW else plain


def _as_top_k(value: int) -> int:
    return 0 if type(value) is int and value == -1 else as_int(value)


def _as_seed(value: int | None) -> int | None:
    return None if type(value) is int and value == -1 else as_optional_int(value)


def _as_output_kind(value: RequestOutputKind | str) -> Data:
    if isinstance(value, str) and value.upper() in RequestOutputKind.__members__:
        return RequestOutputKind[value.upper()]
    return value


def _as_bias(value: Mapping[Any, float] | None) -> Data:
    if value is None or not isinstance(value, Mapping):
        return value
    biases = FrozenMap({_as_token(key): _as_bounded(bias) for key, bias in value.items()})
    return biases if len(biases) == len(value) else dict(value)  # "12" beside 12 is refused, not decided


def _as_token(key: Data) -> Data:
    """JSON objects have text keys: ``"12"`` means token 12."""
    return (
        int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < _DIGITS else as_int(key)
    )


def _as_bounded(bias: Data) -> Data:
    bias = as_float(bias)
    return max(-BIAS_LIMIT, min(BIAS_LIMIT, bias)) if type(bias) is float and math.isfinite(bias) else bias


def _are_biases(value: object) -> bool:
    if not isinstance(value, FrozenMap) or not are_token_ids(tuple(value)):
        return False
    return all(type(bias) is float and math.isfinite(bias) for bias in value.values())


def _best_of_covers_n(params: SamplingParams) -> str | None:
    if params.best_of >= params.n:
        return None
    return f"best_of: {params.best_of}: must be >= n ({params.n}), because n of the candidates are returned"


def _min_fits_max(params: SamplingParams) -> str | None:
    if params.max_tokens is None or params.min_tokens <= params.max_tokens:
        return None
    return f"min_tokens: {params.min_tokens}: must be <= max_tokens ({params.max_tokens})"


def _stop_needs_text(params: SamplingParams) -> str | None:
    if params.detokenize or not params.stop:
        return None
    return f"stop: {show(params.stop)}: stop strings need text; set detokenize=True or use stop_token_ids"


def _greedy_is_single(params: SamplingParams) -> str | None:
    # A strategy with a params class of its own says itself what n means for it (beam search is greedy and has n > 1).
    if type(params) is not SamplingParams or params.temperature > 0 or params.best_of == 1:
        return None
    return f"temperature: {params.temperature}: greedy decoding gives {params.best_of} equal answers; use > 0 or n=1"


_KINDS = f"must be a RequestOutputKind or one of {', '.join(RequestOutputKind.__members__)}"
_BIASES = "must map token ids (integers >= 0, each once) to finite numbers"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class SamplingParams(Checked):
    """Sampling parameters of one request.

    Raises:
        ParamsError: one line for every bad field, at construction.
    """

    ERROR: ClassVar[type[ParamsError]] = ParamsError
    RELATIONS: ClassVar[tuple[Relation, ...]] = (
        Relation(("n", "best_of"), _best_of_covers_n),
        Relation(("n", "best_of", "temperature"), _greedy_is_single),
        Relation(("min_tokens", "max_tokens"), _min_fits_max),
        Relation(("stop", "detokenize"), _stop_needs_text),
    )

    WIDTH_FIELD: ClassVar[str | None] = None
    """In a strategy's subclass, the field of its own that says how many sequences live at once; else ``best_of``."""

    n: int = attrs.field(default=1, converter=as_int, metadata=integer(low=1))
    """How many answers to return."""
    _best_of: int | None = attrs.field(
        default=None, alias="best_of", converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    presence_penalty: float = attrs.field(default=0.0, converter=as_float, metadata=number(low=-2, high=2))
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = attrs.field(default=0.0, converter=as_float, metadata=number(low=-2, high=2))
    """Subtracted for each time a token was already generated."""
    repetition_penalty: float = attrs.field(default=1.0, converter=as_float, metadata=number(above=0))
    """Divides positive and multiplies negative logits of tokens in the prompt or the output (Keskar et al., 2019)."""
    temperature: float = attrs.field(default=1.0, converter=_as_temperature, metadata=number(low=0))
    """Divides the logits; 0 is greedy, and values under 1e-5 become 0."""
    top_p: float = attrs.field(default=1.0, converter=as_float, metadata=number(above=0, high=1))
    """Keep the smallest set of most likely tokens whose probabilities reach this (Holtzman et al., 2020)."""
    top_k: int = attrs.field(default=0, converter=_as_top_k, metadata=integer(low=0))
    """Keep this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = attrs.field(default=0.0, converter=as_float, metadata=number(low=0, high=1))
    """Keep tokens at least this likely relative to the most likely one."""
    seed: int | None = attrs.field(
        default=None, converter=_as_seed, metadata=integer(low=-INT64_MAX - 1, high=INT64_MAX, optional=True)
    )
    """Fixes the request's random choices; None or -1 draws from the engine's seed."""
    stop: tuple[str, ...] = attrs.field(
        default=(), converter=_as_texts, metadata=rule(are_texts, "must be non-empty text or a list of it")
    )
    """Strings that end the answer."""
    stop_token_ids: tuple[int, ...] = attrs.field(
        default=(), converter=_as_ids, metadata=rule(are_token_ids, "must be a list of token ids (integers >= 0)")
    )
    """Tokens that end the answer."""
    bad_words: tuple[str, ...] = attrs.field(
        default=(), converter=_as_texts, metadata=rule(are_texts, "must be a list of non-empty text")
    )
    """Words that are never generated."""
    ignore_eos: bool = attrs.field(default=False, metadata=boolean())
    """Go on after the model's end-of-sequence token."""
    max_tokens: int | None = attrs.field(default=16, converter=as_optional_int, metadata=integer(low=1, optional=True))
    """Longest answer in tokens; None for as long as the model's length allows."""
    min_tokens: int = attrs.field(default=0, converter=as_int, metadata=integer(low=0))
    """No stop token ends the answer before this many tokens."""
    logprobs: int | None = attrs.field(default=None, converter=as_optional_int, metadata=integer(low=-1, optional=True))
    """How many most likely tokens to report at each position besides the sampled one; -1 for all, None for none."""
    prompt_logprobs: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=-1, optional=True)
    )
    """The same for the prompt's positions."""
    detokenize: bool = attrs.field(default=True, metadata=boolean())
    """Turn tokens into text."""
    skip_special_tokens: bool = attrs.field(default=True, metadata=boolean())
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = attrs.field(default=False, metadata=boolean())
    """Keep the stop string at the end of the text."""
    output_kind: RequestOutputKind = attrs.field(
        default=RequestOutputKind.CUMULATIVE,
        converter=_as_output_kind,
        metadata=rule(lambda kind: isinstance(kind, RequestOutputKind), _KINDS),
    )
    """What each streamed output carries."""
    logit_bias: Mapping[int, float] | None = attrs.field(
        default=None, converter=_as_bias, hash=False, metadata=rule(_are_biases, _BIASES, optional=True)
    )
    """Added to the logits of the given tokens, clamped to plus or minus 100; an immutable copy."""
    allowed_token_ids: tuple[int, ...] | None = attrs.field(
        default=None,
        converter=_as_optional_ids,
        metadata=rule(
            lambda ids: bool(ids) and are_token_ids(ids), "must be a non-empty list of token ids", optional=True
        ),
    )
    """Only these tokens may be generated."""
    resolved_eos: tuple[int, ...] = attrs.field(default=(), eq=False, metadata=INTERNAL)
    """The model's end-of-sequence tokens. Filled in by the engine at admission."""
    resolved_bad_words: tuple[tuple[int, ...], ...] = attrs.field(default=(), eq=False, metadata=INTERNAL)
    """``bad_words`` as token ids. Filled in by the engine at admission."""

    @property
    def num_sequences(self) -> int:
        """Most sequences of the request that live at once; admission reserves places for them."""
        return self.best_of if self.WIDTH_FIELD is None else int(getattr(self, self.WIDTH_FIELD))

    @property
    def width_name(self) -> str:
        """What a message calls ``num_sequences``: the field that a caller would change."""
        if self.WIDTH_FIELD is not None or self.num_sequences != self.best_of:
            return self.WIDTH_FIELD or "num_sequences"
        return "n" if self._best_of is None else "best_of"

    @property
    def grows_in_place(self) -> bool:
        """Whether what an answer has so far stays as it is, so that pieces of it can be sent before the end.

        False for strategies that may drop an answer or replace its beginning: those are sent when they are complete.
        """
        return self.best_of == self.n

    @property
    def is_scored(self) -> bool:
        """Whether the strategy gives its answers scores that a caller should see."""
        return self.best_of > 1

    @property
    def best_of(self) -> int:
        """How many candidates to generate; ``n`` unless given."""
        return self.n if self._best_of is None else self._best_of

    @cached_property
    def sampling_type(self) -> SamplingType:
        """Which kind of sampler serves these parameters."""
        if self.best_of > 1:
            return SamplingType.FAN_OUT
        return SamplingType.RANDOM if self.temperature > 0 else SamplingType.GREEDY

    def validate_for(self, vocab_size: int, max_logprobs: int = 20, max_sequences: int = 256) -> None:
        """Check what depends on the model and the engine's caps. Allocates nothing in proportion to any field.

        Args:
            vocab_size: width of a logits row, in tokens.
            max_logprobs: cap on ``logprobs`` and ``prompt_logprobs``; -1 for no cap but the vocabulary.
            max_sequences: cap on ``n`` and ``best_of``.

        Raises:
            ParamsError: one line for every problem.
        """
        problems = self.problems_for(vocab_size, max_logprobs, max_sequences)
        if problems:
            raise self.ERROR(problems)

    def problems_for(self, vocab_size: int, max_logprobs: int = 20, max_sequences: int = 256) -> list[str]:
        """The problems that ``validate_for`` raises, as lines; a subclass extends ``super()``'s."""
        problems: list[str] = []
        wide = max(self.num_sequences, self.best_of)
        if wide > max_sequences:
            name = self.width_name if wide == self.num_sequences else "best_of"
            problems.append(f"{name}: {wide}: must be <= {max_sequences} (max_sequences_per_request)")
        cap = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and (vocab_size if count == -1 else count) > cap:
                problems.append(f"{name}: {count}: must be from 0 to {cap}; the engine's max_logprobs sets the cap")
        if self.stop_token_ids or self.allowed_token_ids or self.logit_bias:
            for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
                largest = max(getattr(self, name) or (0,))
                if largest >= vocab_size:
                    problems.append(f"{name}: {largest}: outside the vocabulary; token ids end at {vocab_size - 1}")
        return problems


def validate_batch(
    params: Sequence[SamplingParams], *, vocab_size: int, max_logprobs: int = 20, max_sequences: int = 256
) -> None:
    """``validate_for`` over a batch, in which an object that occurs many times is checked once.

    Objects that are equal but not the same are checked each, because comparing them costs more than the check.

    Raises:
        ParamsError: one line for every problem, with the index of the first request that has it.
    """
    seen: set[int] = set()
    problems: list[str] = []
    for index, item in enumerate(params):
        if id(item) in seen:
            continue
        seen.add(id(item))
        found = item.problems_for(vocab_size, max_logprobs, max_sequences)
        problems += [f"[{index}].{line}" for line in found]
    if problems:
        raise ParamsError(problems)
