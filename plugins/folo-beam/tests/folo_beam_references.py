"""Searches as simple as can be, to compare with: dense, slow, one hypothesis after another."""

from __future__ import annotations

import itertools
from collections import Counter


def diverse_search(model, prompt, *, width, groups=1, strength=0.0, max_tokens=8, penalty=1.0):  # noqa: PLR0913 (the options of a search)
    """Algorithm 1 of Vijayakumar et al. (2016): in each step, group after group; returns scored answers, best first.

    A group takes the log probability of a token down by ``strength`` for each beam of earlier groups that took the
    token in this step (to go on or to end), and is otherwise a beam search of its own: with one group, a plain one.
    """
    share, ends = width // groups, set(model.info.eos_token_ids)
    lanes = [[((), 0.0)] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    for length in range(1, max_tokens + 1):
        taken = Counter()
        for lane in range(groups):
            candidates = sorted(
                (
                    ((*tokens, token), score + logprob - strength * taken[token])
                    for tokens, score in lanes[lane]
                    for token, logprob in enumerate(model.logits_after([*prompt, *tokens]).log_softmax(-1).tolist())
                ),
                key=lambda pair: -pair[1],
            )
            ended = [(t, s / length**penalty) for t, s in candidates[:share] if t[-1] in ends or length == max_tokens]
            finished[lane] = sorted(finished[lane] + ended, key=lambda pair: -pair[1])[:share]
            lanes[lane] = [pair for pair in candidates if pair[0][-1] not in ends][:share]
            full = len(finished[lane]) == share
            if full and lanes[lane] and lanes[lane][0][1] / length**penalty <= finished[lane][-1][1]:
                lanes[lane] = []
            taken.update(pair[0][-1] for pair in [*lanes[lane], *(pair for pair in ended if pair in finished[lane])])
    return sorted(itertools.chain(*finished), key=lambda pair: -pair[1])


def contains(tokens, phrase):
    return any(tuple(tokens[i : i + len(phrase)]) == tuple(phrase) for i in range(len(tokens) - len(phrase) + 1))


def every_answer(model, prompt, max_tokens):
    """Every possible answer and its log probability."""
    ends, open_ = set(model.info.eos_token_ids), [((), 0.0)]
    for length in range(1, max_tokens + 1):
        grown = [
            ((*tokens, token), score + logprob)
            for tokens, score in open_
            for token, logprob in enumerate(model.logits_after([*prompt, *tokens]).log_softmax(-1).tolist())
        ]
        done = [pair for pair in grown if pair[0][-1] in ends or length == max_tokens]
        yield from done
        open_ = [pair for pair in grown if pair[0][-1] not in ends]
