"""Greedy agreement with a dense reference, told apart from ties."""

from __future__ import annotations

from typing import Any

import torch

TIE = 2e-3
"""Two logits this close may change places when float32 sums are taken in another order."""


def reference_tokens(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """What transformers' generate continues a prompt with, greedily."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def dense_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after every token, float32 ``[len(tokens), vocab]``."""
    return model(torch.tensor([tokens])).logits[0].float()


def assert_agrees(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Assert that both continuations are equal up to a tie; return whether they are equal outright."""
    if ours == theirs:
        return True
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    assert place is not None, f"one continuation ends early: {ours} against {theirs}"
    logits = dense_logits(model, [*prompt, *ours[:place]])[-1]
    gap = float(logits[theirs[place]] - logits[ours[place]])
    assert abs(gap) < TIE, f"token {place}: {ours[place]} instead of {theirs[place]}, {gap} below it"
    assert logits.max() - max(logits[ours[place]], logits[theirs[place]]) < TIE
    return False
