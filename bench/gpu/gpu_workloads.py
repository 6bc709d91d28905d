"""What is asked of the models: token ids in, token ids out, the same in every run."""

from __future__ import annotations

import random
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Sizes:
    """How large the workloads are."""

    top_id: int
    mixed: tuple[int, int, int]
    """Requests, and the least and most tokens of a prompt and of an answer."""
    steady: tuple[int, int, int]
    """Requests, tokens of each prompt, tokens of each answer; likewise ``single``, ``beam`` and ``samples``."""
    single: tuple[int, int, int]
    beam: tuple[int, int, int]
    samples: tuple[int, int, int]
    fan: int
    """Answers to each prompt of ``samples``."""
    shared: int
    """Tokens that all prompts of ``prefix`` begin with."""
    prefix: tuple[int, int, int]


FULL = Sizes(
    top_id=10_000, mixed=(256, 100, 1024), steady=(256, 512, 256), single=(1, 128, 256), beam=(16, 256, 128),
    samples=(16, 1024, 128), fan=16, shared=2048, prefix=(256, 64, 64),
)  # fmt: skip
TINY = Sizes(
    top_id=500, mixed=(4, 3, 8), steady=(3, 5, 4), single=(1, 4, 6), beam=(2, 6, 4), samples=(2, 6, 4), fan=4,
    shared=32, prefix=(3, 4, 4),
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Workload:
    """Requests that are sent at once. End-of-sequence tokens are ignored, and no text is made."""

    name: str
    model: str
    kind: str
    """``plain``, ``single``, ``beam``, ``samples`` or ``prefix``."""
    prompts: list[list[int]]
    new: list[int]
    """How many tokens each request wants."""
    sampling: dict[str, Any] = attrs.field(factory=dict)
    """Options of the requests' parameters."""
    width: int = 1
    """Sequences of each request that live at once."""

    @property
    def key(self) -> str:
        """The name in tables, such as ``W4 A width 8``."""
        return f"{self.name} {self.model}" + (f" width {self.width}" if self.kind == "beam" else "")

    @property
    def tokens(self) -> int:
        """How many tokens count: of a beam search the best answer's, of samples all."""
        return sum(self.new) * (self.width if self.kind == "samples" else 1)

    @property
    def options(self) -> dict[str, Any]:
        """Engine options that this workload needs besides those of all."""
        return {"enable_prefix_caching": True} if self.kind == "prefix" else {}

    @property
    def sequences(self) -> int:
        """How many sequences live at once, if there is room."""
        return len(self.prompts) * self.width


def draw(count: int, length: int, top_id: int, *, seed: int = 0) -> list[list[int]]:
    """Draw prompts of one length."""
    generator = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    return [[generator.randint(0, top_id) for _ in range(length)] for _ in range(count)]


def mixed(sizes: Sizes) -> Workload:
    """W1: prompts and answers of many lengths, sampled."""
    count, low, high = sizes.mixed
    generator = random.Random(0)  # noqa: S311 (a workload, not a secret)
    prompts = [[generator.randint(0, sizes.top_id) for _ in range(generator.randint(low, high))] for _ in range(count)]
    new = [generator.randint(low, high) for _ in range(count)]
    return Workload(name="W1", model="A", kind="plain", prompts=prompts, new=new, sampling={"temperature": 0.6})


def _even(name: str, model: str, kind: str, asked: tuple[int, int, int], **more: Any) -> Workload:  # noqa: ANN401
    """Give every request the same lengths; ``more`` holds ``top_id`` and fields of the workload."""
    count, length, new = asked
    prompts = draw(count, length, more.pop("top_id"))
    return Workload(name=name, model=model, kind=kind, prompts=prompts, new=[new] * count, **more)


def prefix(sizes: Sizes) -> Workload:
    """W6: prompts that begin alike."""
    own = _even("W6", "A", "prefix", sizes.prefix, top_id=sizes.top_id, sampling={"temperature": 0.0})
    beginning = draw(1, sizes.shared, sizes.top_id, seed=1)[0]
    return attrs.evolve(own, prompts=[beginning + prompt for prompt in own.prompts])


def workloads(sizes: Sizes) -> list[Workload]:
    """Return all workloads, in the order in which they are shown."""
    greedy: dict[str, Any] = {"sampling": {"temperature": 0.0}, "top_id": sizes.top_id}
    sampled = {"temperature": 1.0, "top_p": 0.95, "top_k": 50}
    found = [mixed(sizes), _even("W2", "B", "plain", sizes.steady, **greedy)]
    found += [_even("W3", model, "single", sizes.single, **greedy) for model in "AB"]
    found += [
        _even("W4", model, "beam", sizes.beam, width=width, top_id=sizes.top_id) for model in "AB" for width in (4, 8)
    ]
    found += [_even("W5", "A", "samples", sizes.samples, width=sizes.fan, sampling=sampled, top_id=sizes.top_id)]
    return [*found, prefix(sizes)]
