"""Counter-based randomness: known answers, one result on every path, and nothing but the key decides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_core.sampling import rng

WORD = 2**32
int64s = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def block(counter: list[int], key: list[int]) -> torch.Tensor:
    halves = [counter[0] | counter[1] << 32, counter[2] | counter[3] << 32, key[0] | key[1] << 32]
    return torch.tensor([[signed(half)] for half in halves])


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's figure 4, word by word."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second // WORD ^ c[1] ^ k[0], second % WORD, first // WORD ^ c[3] ^ k[1], first % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


@pytest.mark.parametrize("way", [rng._philox_in_tensors, rng._philox_in_integers, rng.philox4x32])
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD - 1] * 4, [WORD - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(way, counter, key, answer):
    assert way(block(counter, key)).flatten().tolist() == [int(word, 16) for word in answer.split()]


@given(st.lists(st.tuples(int64s, int64s, int64s), min_size=1, max_size=9))
def test_both_ways_equal_the_plain_algorithm(rows):
    columns = torch.tensor(rows).T.contiguous()
    expected = []
    for low, high, key in rows:
        words = [half >> shift & (WORD - 1) for half in (low, high) for shift in (0, 32)]
        expected.append(plain_philox(words, [key & (WORD - 1), key >> 32 & (WORD - 1)]))
    assert rng._philox_in_tensors(columns).T.tolist() == expected
    assert rng._philox_in_integers(columns).T.tolist() == expected


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1024])
def test_rows_do_not_depend_on_their_number(rows):
    generator = torch.Generator().manual_seed(rows)
    seeds, indices, positions = torch.randint(-(2**62), 2**62, (3, rows), generator=generator)
    together = rng.uniform(seeds, indices, positions)
    assert together.dtype == torch.float64
    assert together.shape == (rows,)
    sample = range(0, rows, 97)
    alone = [rng.uniform(seeds[i : i + 1], indices[i : i + 1], positions[i : i + 1]).item() for i in sample]
    assert together[::97].tolist() == alone


@given(int64s, int64s, int64s, st.integers(min_value=0, max_value=2), st.integers(min_value=0, max_value=63))
def test_every_bit_of_every_argument_counts(seed, index, position, which, bit):
    key = [seed, index, position]
    other = list(key)
    other[which] = signed((other[which] ^ 1 << bit) % 2**64)
    first, second = (rng.uniform(*torch.tensor(k)[:, None]).item() for k in (key, other))
    assert first != second
    assert 0 <= first < 1
    assert (first * 2**53).is_integer()


def test_largest_words_stay_below_one(monkeypatch):
    monkeypatch.setattr(rng, "philox4x32", lambda block: torch.full((4, block.shape[1]), WORD - 1))
    zero = torch.zeros(1, dtype=torch.int64)
    assert rng.uniform(zero, zero, zero).item() == 1 - 2**-53


@pytest.mark.parametrize("varied", ["seeds", "sequence_indices", "positions"])
def test_uniform_along_each_argument(varied):
    """Chi-square over 64 bins, and no correlation of neighbours, when only one argument counts up."""
    count, bins = 1 << 16, 64
    arguments = {name: torch.zeros(count, dtype=torch.int64) for name in ("seeds", "sequence_indices", "positions")}
    arguments[varied] = torch.arange(count)
    numbers = rng.uniform(**arguments)
    histogram = torch.bincount((numbers * bins).long(), minlength=bins).double()
    statistic = ((histogram - count / bins) ** 2 / (count / bins)).sum()
    chance = torch.special.gammaincc(torch.tensor((bins - 1) / 2).double(), statistic / 2).item()
    assert 1e-4 < chance < 1 - 1e-4
    correlation = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_equals_host_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-(2**62), 2**62, (3, 999), generator=generator)
    assert torch.equal(rng.uniform(*key), rng.uniform(*key.cuda()).cpu())
