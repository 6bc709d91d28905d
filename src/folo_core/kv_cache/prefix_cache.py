"""Which block holds which tokens: the index through which a beginning that was computed before is found again.

A full block is known by a chain of SHA-256 digests: its own covers its tokens and the digest of the block before it,
back to a root that stands for a tenant. So one digest stands for a whole beginning, keys and values of which depend on
nothing else: neither on the sampler, nor on the request, nor on what came after. Chaining makes a longest common
beginning a walk from the front, as in a radix tree, with one dictionary.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as SequenceOf

    from folo_core.sequence import Sequence


class PrefixRoots:
    """Gives each tenant the digest that its chains begin with.

    A secret of this process goes into it, so that nobody outside can name another tenant's blocks, and a collision
    found on one server is none on the next.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def root(self, tenant: str, salt: str) -> bytes:
        """Return the root of a tenant's chains, or of those that the tenant itself keeps apart by ``salt``."""
        name = tenant.encode("utf-8", "surrogatepass")
        own = salt.encode("utf-8", "surrogatepass")
        return hashlib.sha256(self._secret + len(name).to_bytes(8, "little") + name + own).digest()


def chain(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """Return the digest of a block that holds ``token_ids`` and follows the block of digest ``parent``."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


@attrs.define(slots=True)
class PrefixCacheStats:
    """What the cache was asked and what it had, in tokens, counted once for each request: when it is admitted."""

    num_requests: int = 0
    num_queried_tokens: int = 0
    """Tokens of the admitted requests."""
    num_hit_tokens: int = 0
    """Those of them whose keys and values were found."""
    num_resumed_tokens: int = 0
    """Tokens that requests found again when they came back from a preemption: not part of the hit rate."""
    num_evicted_blocks: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the queried tokens that was found; 0 before the first query."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


@attrs.frozen(slots=True)
class _Entry:
    """What one block holds."""

    digest: bytes
    parent: bytes
    token_ids: list[int]


class PrefixIndex:
    """Digests to blocks and back. It holds no references: which blocks are kept is the pool's to decide."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: object) -> bool:
        return block in self._entries

    def __iter__(self) -> Iterator[int]:
        """Iterate over the blocks that hold something."""
        return iter(self._entries)

    def add(self, block: int, digest: bytes, parent: bytes, token_ids: list[int]) -> None:
        """Note what ``block`` holds, unless another block is known to hold the same."""
        if digest not in self._blocks and block not in self._entries:
            self._blocks[digest] = block
            self._entries[block] = _Entry(digest, parent, token_ids)

    def find(self, digest: bytes, parent: bytes, token_ids: list[int]) -> int | None:
        """Return the block that holds these tokens after that beginning, else None.

        The digest finds it, and the tokens decide: should two blocks ever have one digest, neither is taken for the
        other. What comes before a block is told by its parent's digest alone.
        """
        block = self._blocks.get(digest)
        if block is None:
            return None
        entry = self._entries[block]
        return block if entry.parent == parent and entry.token_ids == token_ids else None

    def forget(self, block: int) -> None:
        """Drop what is known about a block; one of which nothing is known is ignored."""
        entry = self._entries.pop(block, None)
        if entry is not None:
            del self._blocks[entry.digest]

    def contents(self, block: int) -> tuple[bytes, list[int]]:
        """Return the digest of the block before this one, and this one's tokens.

        Raises:
            KeyError: nothing is known about the block.
        """
        entry = self._entries[block]
        return entry.parent, entry.token_ids

    def is_sound(self) -> bool:
        """Whether both directions agree and every digest is that of its block's tokens."""
        if len(self._blocks) != len(self._entries):
            return False
        return all(
            self._blocks.get(entry.digest) == block and chain(entry.parent, entry.token_ids) == entry.digest
            for block, entry in self._entries.items()
        )


def extend_digests(sequence: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """Bring a sequence's digests up to ``num_blocks`` full blocks and return them, the root first."""
    digests, tokens = sequence.block_digests, sequence.data.token_ids
    for place in range(len(digests) - 1, num_blocks):
        digests.append(chain(digests[place], tokens[place * block_size : (place + 1) * block_size]))
    return digests
