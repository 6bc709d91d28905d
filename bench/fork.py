"""What forking a sequence costs, against a deep copy, by length.

A fork shares the immutable prompt and every KV block and copies the output ids.
"""

from __future__ import annotations

import copy

from folo_core.kv_cache.block_pool import BlockPool
from folo_core.kv_cache.block_table import BlockTable
from folo_core.sequence import Sequence, SequenceData
from timing import measure, show

BLOCK_SIZE = 16
OUTPUT_TOKENS = 256


def build(num_tokens: int, pool: BlockPool | None) -> Sequence:
    """Return a sequence of ``num_tokens`` tokens, the last 256 of them generated, with blocks if given a pool."""
    prompt = tuple(range(num_tokens - OUTPUT_TOKENS))
    sequence = Sequence(seq_id=0, index=0, data=SequenceData(prompt, list(range(OUTPUT_TOKENS))))
    if pool is not None:
        sequence.block_table = BlockTable(pool, BLOCK_SIZE)
        sequence.block_table.append_tokens(num_tokens)
    return sequence


def fork_and_release(sequence: Sequence) -> None:
    """Fork with blocks, then give the child's references back, as a pruned candidate does."""
    child = sequence.fork(seq_id=1, index=1)
    if child.block_table is not None:
        child.block_table.release()


def main() -> None:
    """Print one line per length and way of copying."""
    for num_tokens in (1024, 8192):
        plain = build(num_tokens, None)
        paged = build(num_tokens, BlockPool(2 + num_tokens // BLOCK_SIZE))
        fork, fork_best = measure(lambda s=plain: s.fork(seq_id=1, index=1), calls=2000)
        deep, deep_best = measure(lambda s=plain: copy.deepcopy(s), calls=5)
        blocks, blocks_best = measure(lambda s=paged: fork_and_release(s), calls=500)
        show(f"deep copy of a sequence of {num_tokens} tokens", deep, deep_best)
        show("fork of it, without blocks", fork, fork_best, f"{deep_best / fork_best:.0f} times cheaper")
        show(f"fork and release, sharing {num_tokens // BLOCK_SIZE} blocks", blocks, blocks_best)


if __name__ == "__main__":
    main()
