"""Whether a pool of reusable Sequence objects would pay: taking one from a pool and resetting it, against a new one."""

from __future__ import annotations

from folo_core.sequence import Sequence, SequenceData, SequenceStatus
from timing import measure, show

BATCH = 256
PROMPT = tuple(range(200))


class SequencePool:
    """The best case for a pool: a bare list, and a reset that writes only what a finished sequence changed."""

    def __init__(self) -> None:
        self.free: list[Sequence] = []

    def take(self, seq_id: int) -> Sequence:
        """Return a recycled sequence, made to look new, or a new one."""
        if not self.free:
            return Sequence(seq_id=seq_id, index=0, data=SequenceData(PROMPT))
        sequence = self.free.pop()
        sequence.seq_id = seq_id
        sequence.index = 0
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_cached_tokens = 0
        sequence.block_table = None
        sequence.detokenizer = None
        sequence.logprobs = None
        sequence.stop_reason = None
        # The output list was handed to the caller, so it cannot be reused.
        sequence.data = SequenceData(PROMPT)
        return sequence


def construct() -> list[Sequence]:
    """Make a batch as the engine does."""
    return [Sequence(seq_id=i, index=0, data=SequenceData(PROMPT)) for i in range(BATCH)]


def recycle(pool: SequencePool) -> None:
    """Take a batch from the pool and give it back."""
    batch = [pool.take(i) for i in range(BATCH)]
    pool.free.extend(batch)


def main() -> None:
    """Print the cost of one sequence either way."""
    pool = SequencePool()
    recycle(pool)
    new, new_best = measure(construct, calls=20)
    old, old_best = measure(lambda: recycle(pool), calls=20)
    show("new Sequence", new / BATCH, new_best / BATCH)
    show("Sequence from a pool, reset", old / BATCH, old_best / BATCH, f"{new_best / old_best:.2f} times as fast")


if __name__ == "__main__":
    main()
