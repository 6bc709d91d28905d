"""Threads are chosen by what was measured, with more of them where it is close, and granted ones are enough."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from folo_kernels import library as native
from folo_kernels.threads import Team, candidates, fastest, settle

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernels: {native.why_not()}")

BOUND, UNBOUND, ALONE = Team(2, (0, 1)), Team(2), Team(1)


def test_candidates_are_bound_first_then_fewer():
    assert candidates(1, (0,), may_bind=True) == [ALONE]
    assert candidates(2, (0, 1), may_bind=True) == [BOUND, UNBOUND, ALONE]
    assert candidates(2, (0, 1), may_bind=False) == [UNBOUND, ALONE]
    assert candidates(2, (5,), may_bind=True) == [UNBOUND, ALONE]
    four = candidates(4, (0, 1, 2, 3), may_bind=True)
    assert four == [Team(4, (0, 1, 2, 3)), BOUND, Team(4), UNBOUND, ALONE]


@pytest.mark.parametrize(
    ("bound", "unbound", "alone", "chosen"),
    [
        (1.0, 1.0, 1.0, BOUND),
        (1.0, 0.95, 0.8, BOUND),
        (1.0, 0.8, 0.7, UNBOUND),
        (9.0, 0.5, 0.9, UNBOUND),
        (1.0, 1.0, 0.7, ALONE),
    ],
)
def test_a_later_candidate_must_be_clearly_faster(bound, unbound, alone, chosen):
    times = {BOUND: [bound] * 9 + [50.0], UNBOUND: [unbound] * 9 + [50.0], ALONE: [alone] * 9 + [50.0]}
    assert fastest([BOUND, UNBOUND, ALONE], times) == chosen


def test_a_team_says_what_it_is():
    assert [str(team) for team in (BOUND, UNBOUND, ALONE)] == [
        "2 threads, bound to 0 and 1",
        "2 threads, not bound",
        "1 thread",
    ]


@needs_library
def test_settling_binds_no_thread_of_pythons_own():
    before = os.sched_getaffinity(0)
    try:
        assert settle(native.load()).threads <= torch.get_num_threads()
        assert os.sched_getaffinity(0) == before
    finally:
        native.use_threads(native.load(), torch.get_num_threads())


PRODUCT = """
import torch
from folo_kernels import library
from folo_kernels.matrix import PackedMatrix, Plain
torch.set_num_threads(3)
library.use_threads(library.load(), 3)
weight, x = torch.randn(96, 64), torch.randn(40, 64)
print(torch.allclose(PackedMatrix([Plain(weight)]).multiply(x), x @ weight.T, atol=1e-4))
"""


@needs_library
@pytest.mark.parametrize("variables", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for_are_waited_for_by_nobody(variables):
    command, environment = [sys.executable, "-c", PRODUCT], {**os.environ, **variables}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.strip() == "True", found.stderr
