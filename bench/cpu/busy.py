"""``busy.py CPU SECONDS``: hash on one core for a while and print how many blocks a second it did.

Standard library only, so that several of these start at once and quickly.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time

BLOCK = bytes(1 << 20)
START_UP = 0.05
"""Seconds of hashing that do not count: the other processes may still be starting."""


def hash_for(seconds: float) -> float:
    """Hash for a while; return blocks per second."""
    start = time.perf_counter()
    done = 0
    while time.perf_counter() - start < seconds:
        hashlib.sha256(BLOCK)
        done += 1
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(sys.argv[1])})
    hash_for(START_UP)
    print(hash_for(float(sys.argv[2])))
