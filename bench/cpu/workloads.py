"""What every engine is asked to do: the same token ids for all, drawn once from a fixed seed.

Prompts are random ids rather than text: they need no tokenizer, mean the same to every model that is measured here,
and no engine has seen them. Speed does not depend on which tokens they are, as long as nobody speculates.
"""

from __future__ import annotations

import random
from typing import Any

import attrs

SEED = 1061
"""With it, lengths drawn from the ranges of C1 ask for 2,356 tokens in all, and prompts have close to their mean."""

LOWEST_ID, HIGHEST_ID = 1000, 48_999
"""Ids of ordinary tokens in every model that is measured here: special tokens lie below or above."""

LENGTHS_PROMPT, LENGTHS_NEW = (16, 256), (16, 128)


@attrs.frozen(kw_only=True)
class Workload:
    """Requests that are sent at once, and how their tokens are chosen. End-of-sequence tokens are ignored."""

    name: str
    short: str
    help: str
    kind: str
    """``greedy``, ``beam`` or ``sample``."""
    prompts: list[list[int]]
    new: list[int]
    """How many tokens each request wants."""
    width: int = 1
    """Beams of each search, or answers drawn for each prompt."""
    quantised: bool = False
    """Whether engines may use weights of fewer bits than float32."""
    unit: str = "tok/s"

    @property
    def tokens(self) -> int:
        """How many tokens count: of a beam search the best answer's, of samples all."""
        return sum(self.new) * (self.width if self.kind == "sample" else 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and answer."""
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.new, strict=True))

    def message(self) -> dict[str, Any]:
        """Return what a worker is told."""
        return attrs.asdict(self, filter=lambda field, _: field.name not in {"short", "help", "unit"})

    def result(self, seconds: float) -> float:
        """Return a run's figure in this workload's unit."""
        return 1e3 * seconds / self.tokens if self.unit == "ms/token" else self.tokens / seconds


def draw(count: int, low: int, high: int | None = None) -> list[list[int]]:
    """Draw prompts of one length, or of lengths from a range."""
    generator = random.Random(SEED)  # noqa: S311 (a workload, not a secret)
    lengths = [generator.randint(low, high or low) for _ in range(count)]
    return [[generator.randint(LOWEST_ID, HIGHEST_ID) for _ in range(length)] for length in lengths]


def _bits(quantised: bool) -> str:  # noqa: FBT001 (the field's value)
    return ", low-bit weights" if quantised else ""


def _mixed(name: str, *, quantised: bool) -> Workload:
    generator = random.Random(SEED)  # noqa: S311 (a workload, not a secret)
    for _ in range(32):
        generator.randint(*LENGTHS_PROMPT)  # what draw() takes for the prompts' lengths
    return Workload(
        name=name,
        short=f"32 mixed requests at once{_bits(quantised)}",
        help="32 requests at once, prompts of 16-256 tokens, answers of 16-128, greedy",
        kind="greedy",
        prompts=draw(32, *LENGTHS_PROMPT),
        new=[generator.randint(*LENGTHS_NEW) for _ in range(32)],
        quantised=quantised,
    )


def _single(name: str, *, quantised: bool) -> Workload:
    return Workload(
        name=name,
        short=f"one request alone{_bits(quantised)}",
        help="one request, a prompt of 64 tokens, 64 new ones, greedy",
        kind="greedy",
        prompts=draw(1, 64),
        new=[64],
        quantised=quantised,
        unit="ms/token",
    )


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _mixed("C1", quantised=False),
        _single("C2", quantised=False),
        Workload(
            name="C3",
            short="8 beam searches of width 4",
            help="beam search of width 4 for 8 prompts of 64 tokens, 64 new; the best answer's tokens count",
            kind="beam",
            prompts=draw(8, 64),
            new=[64] * 8,
            width=4,
        ),
        Workload(
            name="C4",
            short="8 samples of one prompt",
            help="8 answers drawn at temperature 1 for one prompt of 256 tokens, 64 new each",
            kind="sample",
            prompts=draw(1, 256),
            new=[64],
            width=8,
        ),
        _mixed("C1q", quantised=True),
        _single("C2q", quantised=True),
    )
}
