"""A request among ever other crowds: the same bits in deterministic mode, and not without it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch

import needles

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_no_crowd_changes_a_bit_of_a_deterministic_request() -> None:
    tally = needles.run_trials(30, models=("llama",))
    assert tally.mismatches == 0, f"trials {tally.failed}"
    assert tally.trials == 30
    # How many depends a little on what copies cost today; a third of a thousand is asserted by the script itself.
    assert tally.with_three_preemptions >= 6, "memory was short"
    assert tally.needles_preempted >= 1
    assert tally.swaps >= 3
    assert tally.preemptions - tally.swaps >= 3, "some were computed anew"
    assert tally.hit_tokens > 0


@pytest.mark.slow
def test_without_the_mode_the_same_crowds_do_change_bits() -> None:
    assert needles.run_trials(12, models=("llama",), deterministic=False).mismatches > 0
