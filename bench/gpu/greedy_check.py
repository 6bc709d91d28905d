"""Whether greedy tokens are those of transformers with the same weights, told apart from ties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from transformers import AutoConfig

import random_weights

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

TIE = 4
"""Two logits this many roundings of the device's dtype apart, or fewer, may change places between two kernels.

In a deep model roundings add up to more: how much more is asked of transformers itself, whose two ways to attend
differ, too.
"""


@attrs.frozen(kw_only=True)
class Agreement:
    """How engine's answers compare."""

    tokens: int
    same: int
    """Tokens that are the reference's likeliest after what the engine wrote before them."""
    ties: int
    """Those that are not, but lie as near to it as rounding explains."""
    widest: float
    """The largest distance, in roundings."""
    noise: float
    """How far apart transformers' own two ways to attend are at most, in roundings."""
    equal_answers: int
    """Answers that ``generate`` gives token by token."""
    answers: int

    @property
    def holds(self) -> bool:
        """Whether every token is the likeliest or ties with it."""
        return self.same + self.ties == self.tokens


def judge(folder: Path, device: str, prompts: list[list[int]], answers: list[list[int]]) -> Agreement:
    """Compare greedy answers with transformers' own attention over the same weights.

    ``generate`` says which answers are equal; after a difference it goes its own way, so each token of an answer is
    also judged by the logits after exactly the tokens before it.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = AutoConfig.from_pretrained(folder)
    module = random_weights.draw(config, dtype=dtype, device=device)
    equal, distances, noises = 0, [], []
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            distance, noise = _distances(module, prompt, answer)
            distances.append(distance)
            noises.append(noise)
            equal += _generated(module, prompt, len(answer)) == answer
    found, noise = torch.cat(distances), max(noises)
    # Both the chosen logit and the largest are off by so much.
    within = max(float(TIE), 2 * noise)
    return Agreement(
        tokens=len(found),
        same=int((found == 0).sum()),
        ties=int(((found > 0) & (found <= within)).sum()),
        widest=float(found.max()),
        noise=noise,
        equal_answers=equal,
        answers=len(answers),
    )


def _distances(module: PreTrainedModel, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, float]:
    """Return how far below the likeliest token's logit each token's is, ``[len(answer)]``, and the reference's noise.

    Both in roundings of the largest logit. The noise is the largest difference between two ways to attend.
    """
    ids = torch.tensor([[*prompt, *answer]], device=module.device)
    logits = _logits(module, ids, len(prompt))
    module.set_attn_implementation("eager")
    others = _logits(module, ids, len(prompt))
    module.set_attn_implementation("sdpa")
    top = logits.max(-1).values
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    rounding = torch.finfo(module.dtype).eps * 2.0 ** top.abs().log2().floor()
    noise = (logits - others).abs().amax(1) / rounding
    return ((top - chosen) / rounding).cpu(), float(noise.max())


def _logits(module: PreTrainedModel, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return the logits that judge the tokens from ``start`` on, float64."""
    logits: torch.Tensor = module(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].double()
    return logits


def _generated(module: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=module.device)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    tokens = module.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
    found: list[int] = tokens[0, len(prompt) :].tolist()
    return found
