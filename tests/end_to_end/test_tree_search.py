"""The example of folo-tree-search on the demo model: its search beats plain sampling by the scorer's own measure."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "plugins" / "folo-tree-search" / "examples" / "words.py"


@pytest.mark.slow
def test_a_search_for_words_beats_plain_samples(demo: Any) -> None:
    example = runpy.run_path(str(EXAMPLE))
    coverage = example["Coverage"](example["WORDS"])
    text, value = example["search"](demo, coverage, expansions=16)
    found = coverage.of_text(text)
    assert found <= value <= found + 1
    # A segment is scored once: six branches of each expansion at most, and the answers.
    assert 16 < coverage.calls <= 16 * 6 + 12
    plain = [coverage.of_text(story) for story in example["sample"](demo, 8)]
    assert found >= 3
    assert found > max(plain)
    assert not demo.engine.requests
