"""Tree of thought on the demo model: running generations are branched in public, judged, and the best go on.

The model writes a story a sentence at a time. Each sentence that is kept is branched into several with
``Engine.fork``: the branches share the keys and values of all they have in common, and a branch starts exactly at
the end of the sentence, whatever its source has written since. The model itself judges each branch by how much
likelier it holds a good word for it than a bad one, and only the best branches are branched again
(S. Yao et al., "Tree of Thoughts: Deliberate Problem Solving with Large Language Models", 2023).

Run it with ``python examples/tree_of_thought.py "a lighthouse keeper"``.
"""

from __future__ import annotations

import sys
from itertools import count
from typing import TYPE_CHECKING

import attrs

from folo_core import LLM, SamplingParams

if TYPE_CHECKING:
    from folo_core.engine.engine import Engine

WRITE = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=400, ignore_eos=True)
JUDGE = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
LONGEST_SENTENCE = 40
"""In tokens."""
SHORTEST = 12
"""Characters that a sentence has at least: a lone full stop is none."""
ENDS = (".", "!", "?")


@attrs.define
class Thought:
    """A running generation, cut at the end of its newest sentence."""

    request_id: str
    length: int = 0
    """Output tokens up to the end of the sentence."""
    text: str = ""
    value: float = 0.0


@attrs.define
class TreeOfThought:
    """Searches for the best story of ``depth`` sentences."""

    llm: LLM
    breadth: int = 3
    """Branches of each thought that is kept."""
    keep: int = 2
    """Thoughts that are branched again."""
    numbers: count[int] = attrs.field(factory=count)
    most_shared: float = 1.0
    """Blocks that the branches would have held apart, over those that they did hold, at the best moment."""

    @property
    def engine(self) -> Engine:
        """The engine under the offline face: the one with ``fork``."""
        return self.llm.engine

    def search(self, subject: str, depth: int = 3) -> list[list[Thought]]:
        """Return every level of the tree, each with its best thought first."""
        prompt = self.llm.apply_chat_template([{"role": "user", "content": f"Tell a short story about {subject}."}])
        root = Thought(self.new_id())
        self.engine.add_request(root.request_id, prompt, WRITE)
        self.engine.step()  # the root has run its prompt, so that branches find it computed
        kept, levels = [root], []
        for _ in range(depth):
            branches = [self.branch(thought) for thought in kept for _ in range(self.breadth)]
            self.engine.abort([thought.request_id for thought in kept])
            self.write_a_sentence(branches)
            self.judge(subject, branches)
            branches.sort(key=lambda thought: -thought.value)
            levels.append(branches)
            kept = branches[: self.keep]
            self.engine.abort([thought.request_id for thought in branches[self.keep :]])
        self.engine.abort([thought.request_id for thought in kept])
        return levels

    def branch(self, thought: Thought) -> Thought:
        """Open a branch at the end of the thought's sentence. It draws with a seed of its own."""
        child = Thought(self.new_id(), thought.length, thought.text)
        self.engine.fork(thought.request_id, child.request_id, at=thought.length)
        return child

    def write_a_sentence(self, thoughts: list[Thought]) -> None:
        """Step until each thought has reached the end of its next sentence; the early ones just run on."""
        waiting = {thought.request_id: thought for thought in thoughts}
        starts = {thought.request_id: attrs.evolve(thought) for thought in thoughts}
        while waiting:
            self.engine.step()
            self.note_sharing()
            for request_id, thought in list(waiting.items()):
                tokens = self.engine.requests[request_id].live[0].data.output_token_ids
                thought.text = self.llm.get_tokenizer().decode(tokens, skip_special_tokens=True)
                thought.length = len(tokens)
                start = starts[request_id]
                complete = thought.text.rstrip().endswith(ENDS) and len(thought.text) > len(start.text) + SHORTEST
                if complete or len(tokens) - start.length >= LONGEST_SENTENCE:
                    del waiting[request_id]

    def judge(self, subject: str, thoughts: list[Thought]) -> None:
        """Value each thought: log odds that the model calls it good rather than bad."""
        question = f"Here is the beginning of a story about {subject}:\n\n{{}}\n\nA critic would call this story"
        texts = [question.format(thought.text.strip()) + word for thought in thoughts for word in (" good", " bad")]
        answers: dict[str, float] = {}
        for number, text in enumerate(texts):
            self.engine.add_request(f"judge-{number}", text, JUDGE)
        while len(answers) < len(texts):
            for output in self.engine.step():
                if output.finished:
                    last = output.prompt_logprobs[-1]  # that of the word at the end
                    answers[output.request_id] = next(iter(last.values())).logprob
        for number, thought in enumerate(thoughts):
            thought.value = answers[f"judge-{2 * number}"] - answers[f"judge-{2 * number + 1}"]

    def note_sharing(self) -> None:
        """Compare the blocks in use with what separate requests would hold."""
        pool = self.engine.state.kv.pool
        tables = [s.block_table for request in self.engine.requests.values() for s in request.live if s.block_table]
        apart = sum(len(table.blocks) for table in tables)
        self.most_shared = max(self.most_shared, apart / max(1, pool.num_usable - pool.num_free))

    def new_id(self) -> str:
        """Name a request."""
        return f"thought-{next(self.numbers)}"


def main(subject: str) -> None:
    """Search, and print the tree level by level with the kept thoughts marked."""
    tree = TreeOfThought(LLM(model="demo", max_model_len=1024, seed=7))
    for depth, level in enumerate(tree.search(subject), start=1):
        print(f"\nSentence {depth}")
        for place, thought in enumerate(level):
            mark = "*" if place < tree.keep else " "
            print(f" {mark} {thought.value:+.2f}  {' '.join(thought.text.split())}")
    print(
        f"\nBranches shared their blocks: up to {tree.most_shared:.1f} times fewer than separate requests would hold."
    )


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "a lighthouse keeper")
