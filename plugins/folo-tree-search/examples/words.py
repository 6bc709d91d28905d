"""Write a story in which given words occur: best-first search with a scoring function, against plain sampling.

Run it with ``python words.py``; it needs the demo model (``pip install "folo-core[demo]" folo-tree-search``).
"""
# ruff: noqa: INP001, T201 (a script)

from __future__ import annotations

import argparse
import re

from folo_core import LLM, SamplingParams
from folo_tree_search import Node, TreeSearchParams  # noqa: TC001 (read by whoever copies this)

PROMPT = "Once upon a time, an old sailor"
WORDS = ("sea", "ship", "gold", "friend")


class Coverage:
    """One point for every wanted word, and up to one for likely text, so that a story stays readable."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.calls = 0

    def of_text(self, text: str) -> int:
        """Count the wanted words that occur in the text, also in a longer word such as a plural."""
        return sum(bool(re.search(rf"\b{word}", text, re.IGNORECASE)) for word in self.words)

    def __call__(self, node: Node) -> float:
        """Value a segment's end or a whole answer."""
        self.calls += 1
        mean = node.cumulative_logprob / max(len(node.token_ids), 1)
        return self.of_text(node.text or "") + max(0.0, 1.0 + mean / 4)


def search(llm: LLM, coverage: Coverage, *, seed: int = 0, expansions: int = 40) -> tuple[str, float]:
    """Return the best story found and its value."""
    params = TreeSearchParams(
        scorer=coverage,
        # A leaf's value is no bound: a later segment may hold another word. So all expansions are spent.
        stopping="never",
        expansions=expansions,
        width=12,
        branching=6,
        segment_tokens=8,
        max_tokens=64,
        seed=seed,
    )
    best = llm.generate(PROMPT, params)[0].outputs[0]
    assert best.score is not None  # noqa: S101 (a tree search always gives one)
    return best.text, best.score


def sample(llm: LLM, count: int, *, seed: int = 0) -> list[str]:
    """Return stories drawn one by one, for comparison."""
    params = [SamplingParams(max_tokens=64, seed=seed + number) for number in range(count)]
    return [output.outputs[0].text for output in llm.generate([PROMPT] * count, params)]


def main() -> None:
    """Print the story that the search finds and how plain samples do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", default=WORDS, help="words that the story should contain")
    parser.add_argument("--expansions", type=int, default=40, help="how many leaves to grow branches from")
    options = parser.parse_args()
    llm = LLM(model="demo", max_model_len=512)
    coverage = Coverage(tuple(options.words))
    text, value = search(llm, coverage, expansions=options.expansions)
    plain = [coverage.of_text(story) for story in sample(llm, 16)]
    print(f"{PROMPT}{text}\n")
    print(f"value {value:.2f}: {coverage.of_text(text)} of {len(coverage.words)} words, {coverage.calls} nodes scored")
    print(f"16 plain samples: {sum(plain) / len(plain):.2f} words on average, {max(plain)} at best")


if __name__ == "__main__":
    main()
