"""How much work a step may hold, and who comes first."""

from __future__ import annotations

import attrs

from folo_core.validation import Checked, Relation, as_int, as_optional_int, boolean, integer, one_of, text


def _tokens_for_all(scheduler: SchedulerConfig) -> str | None:
    if scheduler.max_num_batched_tokens >= scheduler.max_num_seqs:
        return None
    return (
        f"max_num_batched_tokens: {scheduler.max_num_batched_tokens}: must be >= max_num_seqs"
        f" ({scheduler.max_num_seqs}), one token for each running sequence"
    )


def whole_prompt_fits(scheduler: SchedulerConfig, max_model_len: int | None) -> str | None:
    """Without chunked prefill the longest prompt must fit one step; a problem line if it does not."""
    if scheduler.enable_chunked_prefill or max_model_len is None or scheduler.max_num_batched_tokens >= max_model_len:
        return None
    return (
        f"max_num_batched_tokens: {scheduler.max_num_batched_tokens}: must be >= max_model_len ({max_model_len})"
        " while enable_chunked_prefill is false"
    )


def _threshold_has_chunks(scheduler: SchedulerConfig) -> str | None:
    if scheduler.long_prefill_token_threshold is None or scheduler.enable_chunked_prefill:
        return None
    line = f"long_prefill_token_threshold: {scheduler.long_prefill_token_threshold}"
    return f"{line}: has no effect; set enable_chunked_prefill = true"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class SchedulerConfig(Checked):
    """The scheduling policy and its budgets."""

    RELATIONS = (
        Relation(("max_num_batched_tokens", "max_num_seqs"), _tokens_for_all),
        Relation(
            ("max_num_batched_tokens", "enable_chunked_prefill", "max_model_len"),
            lambda scheduler: whole_prompt_fits(scheduler, scheduler.max_model_len),
        ),
        Relation(("long_prefill_token_threshold", "enable_chunked_prefill"), _threshold_has_chunks),
    )

    policy: str = attrs.field(
        default="fcfs",
        metadata=text(pattern=r"[A-Za-z0-9][\w.:-]*", mend="must be the name of a scheduler, such as 'fcfs'"),
    )
    """Name of a scheduler plugin."""
    max_num_seqs: int = attrs.field(default=64, converter=as_int, metadata=integer(low=1))
    """Most sequences running at once."""
    max_num_batched_tokens: int = attrs.field(default=2048, converter=as_int, metadata=integer(low=1))
    """Most new tokens in one step, over all sequences."""
    max_model_len: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """Longest sequence in tokens; None falls back to the model's."""
    enable_chunked_prefill: bool = attrs.field(default=True, metadata=boolean())
    """Spread a long prompt over several steps."""
    long_prefill_token_threshold: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """Most tokens of one prompt in one step; None for as many as the budget holds."""
    preemption: str = attrs.field(default="auto", metadata=one_of("auto", "recompute", "swap"))
    """What becomes of the keys and values of a preempted request: moved to the host and back, if ``swap_space`` has
    room, or dropped and computed anew; ``auto`` takes what measurements say is cheaper."""
    run_ahead: bool | None = attrs.field(default=None, metadata=boolean(optional=True))
    """Schedule a step while the one before it runs, before the host knows what that samples; a request that ends is
    then computed one token too far. None: on devices that work by themselves, as CUDA does."""
    max_waiting_requests: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """Most requests in the queue; more are refused. None for no limit."""
