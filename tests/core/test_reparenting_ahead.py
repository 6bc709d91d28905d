"""Rows that continue one another before the host knows: beams that do not wait for it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import SamplerPlugin, TreeParams, assert_clean, greedy, make_engine, run
from folo_core.sampling.interface import SamplerOutput

if TYPE_CHECKING:
    from folo_core.engine.engine import Engine

SMALL: dict[str, Any] = {"max_num_batched_tokens": 8, "max_num_seqs": 8, "max_model_len": 60}
OVER, NARROWER = 3, 5
"""Likeliest tokens, the second of every eight, at which a search is over, or goes on with a row less."""


class Beams:
    """Keeps each request's likeliest rows; every tenth token or so ends a child. Made so that row order is nothing."""

    reparents = True

    def __init__(self, *, is_steady: bool = True, dies: bool = True) -> None:
        self.is_steady, self.dies = is_steady, dies
        self.moved_ahead = self.narrowed = self.ran_behind = 0

    def steady_after(self, params: Any) -> int | None:
        return 1 if self.is_steady and not params.stop else None

    def add_request(self, request: Any) -> None:
        """Nothing to open."""

    def remove_request(self, request_id: str) -> None:
        """Nothing to drop."""

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        log_probs = logits.float().log_softmax(1)
        answers = [self._choose(log_probs, metadata, span) for _, span in metadata.groups]
        if not metadata.runs_ahead:
            return _packed([child for going, ending in answers for child in [*sorted(going), *ending]])
        self.ran_behind += int(metadata.is_behind.sum())
        return self._padded(answers, metadata)

    def _choose(self, log_probs: torch.Tensor, metadata: Any, span: range) -> tuple[list[Any], list[Any]]:
        """Return (parent, token, score, ends) of the children of a request that go on, and of those that end."""
        rows = slice(span.start, span.stop)
        total = metadata.scores[rows, None] + log_probs[rows]
        params = metadata.params[span.start]
        ranked = total.flatten().argsort(descending=True)[: 2 * params.width].tolist()
        vocab = log_probs.shape[1]
        found = [(span.start + c // vocab, c % vocab, float(total.flatten()[c])) for c in ranked]
        length = int(metadata.places[span.start]) - metadata.prompt_lengths[span.start] + 1
        if length >= params.max_tokens:
            return [], [(*child, True) for child in found[: params.width]]
        going = [(*child, False) for child in found if child[1] % 10][: params.width]
        ending = [(*child, True) for child in found[: params.width] if not child[1] % 10]
        if self.dies and found[0][1] == OVER:
            return [], [(*found[0], True)]
        if self.dies and found[0][1] % 8 == NARROWER and len(going) > 1:
            self.narrowed += 1
            going.pop()
        return going, ending

    def _padded(self, answers: list[Any], metadata: Any) -> SamplerOutput:
        rows = [(row, 0, -np.inf, True) for row in range(metadata.num_rows)]
        ends = [(-1, 0, 0.0, True)] * metadata.num_rows
        for (_, span), (going, ending) in zip(metadata.groups, answers, strict=True):
            ends[span.start : span.start + len(ending)] = ending
            left = []
            for child in going:
                if rows[child[0]][3]:
                    rows[child[0]] = child
                else:
                    left.append(child)
            for child in left:
                rows[next(row for row in span if rows[row][3])] = child
        self.moved_ahead += sum(child[0] != row for row, child in enumerate(rows))
        return _packed([*rows, *ends])

    def finish(self, request: Any) -> list[Any]:
        return sorted(request.finished, key=lambda s: (-s.score, s.data.output_token_ids))


def _packed(children: list[Any]) -> SamplerOutput:
    parents, tokens, scores, ends = zip(*children, strict=True)
    return SamplerOutput(
        parents=torch.tensor(parents),
        tokens=torch.tensor(tokens)[:, None],
        scores=torch.tensor(scores, dtype=torch.float32),
        finished=torch.tensor(ends),
    )


def serve(engine: Engine, seed: int, count: int = 10) -> dict[str, Any]:
    """Run searches of several widths beside plain requests."""
    r = random.Random(seed)
    for number in range(count):
        prompt = [r.randrange(60) for _ in range(r.randint(1, 14))]
        if number % 3 == 2:
            params: Any = greedy(max_tokens=r.randint(1, 20), ignore_eos=True, repetition_penalty=r.choice([1.0, 1.3]))
        else:
            params = TreeParams(width=r.choice([1, 2, 3, 4]), max_tokens=r.randint(1, 30), ignore_eos=True)
        engine.add_request(str(number), prompt, params)
    final = run(engine)
    assert not any(output.error for output in final.values())
    return {name: [(o.token_ids, o.text, o.score) for o in output.outputs] for name, output in final.items()}


def beams(engine_options: dict[str, Any], sampler: Beams, seed: int) -> dict[str, Any]:
    engine, _ = make_engine(plugins=[SamplerPlugin(sampler)], **engine_options)
    answers = serve(engine, seed)
    assert_clean(engine)
    return answers


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([40, 48, 200]),
    swap=st.sampled_from(["0", "256"]),
    prefixes=st.booleans(),
    dies=st.booleans(),
)
def test_searches_that_run_ahead_answer_as_in_step(seed, blocks, swap, prefixes, dies):
    options = SMALL | {"num_blocks": blocks, "swap_space": swap, "enable_prefix_caching": prefixes}
    expected = beams(options | {"run_ahead": False}, Beams(dies=dies), seed)
    assert beams(options | {"run_ahead": True}, Beams(dies=dies), seed) == expected


def test_rows_move_while_the_host_is_behind():
    sampler = Beams(dies=False)
    beams(SMALL | {"run_ahead": True}, sampler, seed=1)
    assert sampler.moved_ahead > 20
    assert sampler.ran_behind > 50


def test_a_search_that_narrows_is_computed_anew():
    sampler = Beams()
    options = SMALL | {"num_blocks": 200}
    expected = beams(options | {"run_ahead": False}, Beams(), seed=5)
    assert beams(options | {"run_ahead": True}, sampler, seed=5) == expected
    assert sampler.narrowed
