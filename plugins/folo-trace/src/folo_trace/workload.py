"""Work for an engine to be watched at: given prompts, or random ones of given lengths."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs

from folo_core.errors import RequestError
from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from folo_core.engine.input_processor import Prompt
    from folo_core.llm import LLM
    from folo_core.outputs import RequestOutput

Range = tuple[int, int]
"""A length is drawn from it, both ends included."""


def parse_range(name: str, text: str) -> Range:
    """Read ``64`` or ``16-256``.

    Raises:
        RequestError: it is neither.
    """
    low, dash, high = text.partition("-")
    try:
        pair = int(low), int(high if dash else low)
    except ValueError:
        pair = (0, 0)
    if not 1 <= pair[0] <= pair[1]:
        message = f"{name}: {text!r}: write a length such as 64, or a range such as 16-256"
        raise RequestError(message)
    return pair


@attrs.frozen
class Workload:
    """Prompts, each with its own parameters and tenant."""

    prompts: list[Prompt]
    params: list[SamplingParams]
    tenants: list[str]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], params: SamplingParams, num_tenants: int = 1) -> Workload:
        """Return the work of completing ``prompts``, which come from so many tenants in turn."""
        return cls(list(prompts), [params] * len(prompts), _tenants(len(prompts), num_tenants))

    @classmethod
    def draw(  # noqa: PLR0913 (what is drawn, each a number)
        cls,
        count: int,
        prompt: Range,
        output: Range,
        *,
        vocab_size: int,
        seed: int = 0,
        num_shared: int = 0,
        num_tenants: int = 1,
    ) -> Workload:
        """Draw random prompts and answer lengths: greedy, end-of-sequence ignored, no text made.

        Args:
            count: number of requests.
            prompt: prompt lengths; ``output`` likewise answer lengths.
            output: see ``prompt``.
            vocab_size: tokens to draw from.
            seed: draws the same again.
            num_shared: tokens that all prompts begin with, before those that are their own.
            num_tenants: requests go to so many tenants in turn.
        """
        generator = random.Random(seed)  # noqa: S311 (a workload, not a secret)

        def tokens(number: int) -> list[int]:
            return [generator.randrange(vocab_size) for _ in range(number)]

        shared = tokens(num_shared)
        prompts: list[Prompt] = [
            {"prompt_token_ids": shared + tokens(generator.randint(*prompt))} for _ in range(count)
        ]
        lengths = [generator.randint(*output) for _ in range(count)]
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False) for n in lengths]
        return cls(prompts, params, _tenants(count, num_tenants))

    def run(self, llm: LLM) -> Generator[tuple[int, RequestOutput], None, None]:
        """Yield each request's number and output when it ends. Leaving early aborts the rest."""
        yield from llm.generate_as_finished(self.prompts, self.params, tenant=self.tenants)


def _tenants(count: int, num_tenants: int) -> list[str]:
    return [f"tenant-{i % num_tenants}" if num_tenants > 1 else "" for i in range(count)]
