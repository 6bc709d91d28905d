"""The examples run on the demo model and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from folo_core import LLM

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_tree_of_thought_branches_judges_and_shares():
    example = runpy.run_path(str(EXAMPLES / "tree_of_thought.py"))
    llm = LLM(model="demo", max_model_len=512, seed=7)
    tree = example["TreeOfThought"](llm, breadth=3, keep=2)
    levels = tree.search("a lighthouse keeper", depth=2)
    assert [len(level) for level in levels] == [3, 6]
    for level in levels:
        assert [thought.value for thought in level] == sorted((t.value for t in level), reverse=True)
    kept = [thought.text for thought in levels[0][:2]]
    for thought in levels[1]:
        parent = next(text for text in kept if thought.text.startswith(text))
        assert len(thought.text) > len(parent)
    assert len({thought.text for thought in levels[1]}) > 3, "branches differ"
    assert tree.most_shared > 1.5
    assert not llm.engine.requests
    llm.engine.step()
    assert llm.engine.state.kv.pool.num_free == llm.engine.state.kv.pool.num_usable
