"""What it costs to choose tokens on a CUDA device: the kernels beside tensor operations, and the limit of one read.

    python bench/gpu/sampling.py             # a table: rows x parameters, microseconds of device time
    python bench/gpu/sampling.py --tune      # the same for several sizes of the work, best first

Times of kernels are those of a captured CUDA graph that works through several batches of logits, so that they come
from memory and not from a cache; times of tensor operations, which wait for the device, are those of plain calls.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from folo_beam.sampler import Search
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_sampling.device import Tuning

ROWS = (1, 64, 256)
BEAMS = ((16, 4), (16, 8))
"""Requests and widths of the beam searches."""
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.95},
    "all": {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
}
COLD = 200_000_000
"""Bytes of logits to work through, which no cache of a device holds."""


def logits_of(rows: int, vocab: int, shape: str) -> list[torch.Tensor]:
    """Return several batches of bfloat16 logits ``[rows, vocab]``."""
    count = max(2, min(16, -(-COLD // (rows * vocab * 2))))
    generator = torch.Generator("cuda").manual_seed(1)
    batches = []
    for _ in range(count):
        logits = torch.randn(rows, vocab, generator=generator, device="cuda") * 3
        if shape == "peaked":
            likely = torch.randint(vocab, (rows, 300), generator=generator, device="cuda")
            logits.scatter_add_(1, likely, torch.rand(rows, 300, generator=generator, device="cuda") * 14)
        batches.append(logits.bfloat16())
    return batches


def metadata_of(rows: int, vocab: int, fields: dict[str, Any]) -> SamplingMetadata:
    """Return the metadata of ``rows`` rows with the same parameters."""
    from folo_core.sampling_params import SamplingParams
    from folo_core.testing.builders import make_metadata

    params = [SamplingParams(**fields, seed=row) for row in range(rows)]
    return make_metadata(params, vocab_size=vocab, histories=[[0] * 9] * rows, device="cuda")


def in_graph(call: Callable[[torch.Tensor], object], batches: Sequence[torch.Tensor]) -> float:
    """Return microseconds of device time of one call, by replaying a graph of a call for each batch."""
    call(batches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for batch in batches:
            call(batch)
    return timed(graph.replay) / len(batches)


def timed(work: Callable[[], object], repeats: int = 12) -> float:
    """Return the median microseconds of a call by the device's clock."""
    work()
    found: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)


def bandwidth() -> float:
    """Return the bytes per microsecond at which this device reads memory, by a reduction over a large tensor."""
    big = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    return float(big.numel() * 2 / timed(big.amax))


def by_kernels(metadata: SamplingMetadata, mode: str, tuning: Tuning) -> Callable[[torch.Tensor], object]:
    """Return a call that samples a batch with the kernels."""
    from folo_sampling.device import draw_tokens, greedy_tokens

    if mode == "greedy":
        return lambda logits: greedy_tokens(logits, tuning=tuning)
    m = metadata
    given = (m.temperature, m.top_k, m.top_p, m.min_p, m.seeds, m.sequence_indices, m.positions)
    filtered = bool({"top_k", "top_p"} & MODES[mode].keys())
    return lambda logits: draw_tokens(logits, *given, filtered=filtered, tuning=tuning)


def by_tensors(metadata: SamplingMetadata, mode: str, vocab: int) -> Callable[[torch.Tensor], object]:
    """Return a call that samples a batch in tensor operations, and takes the rows' maxima as the engine does."""
    from folo_sampling.random import RandomSampler

    sampler = RandomSampler(vocab, torch.device("cuda"))

    def call(logits: torch.Tensor) -> object:
        exact = logits.float()
        return exact.amax(1), exact.argmax(1) if mode == "greedy" else sampler._draw(exact, metadata)  # noqa: SLF001

    return call


def searches_of(count: int, width: int) -> list[tuple[Search, range]]:
    """Return searches in the middle of their answers, two of their hypotheses finished, and their rows."""
    from folo_beam.params import BeamParams
    from folo_beam.sampler import Search
    from folo_core.sequence import SequenceStatus
    from folo_core.testing.builders import make_request

    members = []
    for number in range(count):
        params = BeamParams(width=width, max_tokens=64)
        request = make_request(f"{number}", params)
        for place in range(3):
            sequence = request.open_sequence(place)
            sequence.data.output_token_ids += [1] * 9
            sequence.score, sequence.tag = -20.0, 1
            if place:
                sequence.transition(SequenceStatus.RUNNING)
                request.close_sequence(sequence, SequenceStatus.FINISHED_STOPPED)
        members.append((Search(request, params, (2,), None), range(number * width, number * width + width)))
    return members


def beams(vocab: int, shape: str) -> None:
    """Print what a step of beam search costs: the kernels by the device's clock, then whole steps by the host's."""
    from folo_beam.device import TUNING, Step, likeliest
    from folo_beam.grid import Grid
    from folo_core.testing.builders import make_metadata

    print(f"\n{'beams':<8} {'likeliest us':>12} {'step us':>9} {'tensors us':>11} {'times':>6}")
    for count, width in BEAMS:
        batches, members = logits_of(count * width, vocab, shape), searches_of(count, width)
        metadata = make_metadata([s.params for s, span in members for _ in span], vocab_size=vocab, device="cuda")
        only = in_graph(partial(likeliest, count=width + 1, tuning=TUNING), batches)

        def by_kernels(logits: list[torch.Tensor] = batches, given: Any = (metadata, members)) -> object:  # noqa: ANN401
            step = Step.start(logits[0], given[0].scores, given[1])
            torch.cuda.current_stream().synchronize()
            return step.columns()

        def by_tensors(logits: list[torch.Tensor] = batches, given: Any = (metadata, members)) -> object:  # noqa: ANN401
            return [column.cpu() for column in Grid.of(logits[0].float(), *given).advance()]

        ours = statistics.median(repeat(waited, by_kernels))
        theirs = statistics.median(repeat(waited, by_tensors))
        print(f"{count} x {width:<3} {only:>12.1f} {ours:>9.1f} {theirs:>11.1f} {theirs / ours:>6.1f}")


def repeat(clock: Callable[[Callable[[], object]], float], work: Callable[[], object]) -> list[float]:
    """Return the times of some calls after a first one that is not counted."""
    work()
    return [clock(work) for _ in range(15)]


def waited(work: Callable[[], object]) -> float:
    """Return the microseconds of a call by the host's clock, its waits for the device included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def tunings() -> list[Tuning]:
    """Return the sizes to try."""
    from folo_sampling.device import Tuning

    chunks = itertools.product((2048, 4096, 8192, 16384), (4, 8, 16))
    sized = [Tuning(chunk=chunk, warps=warps) for chunk, warps in chunks if 4 <= chunk // warps // 32 <= 32]  # noqa: PLR2004
    tiles = [Tuning(tile=tile, tile_warps=warps) for tile, warps in ((1024, 4), (2048, 8), (4096, 16), (8192, 16))]
    return sized + tiles


def compare(vocab: int, shape: str) -> None:
    """Print kernels beside tensor operations."""
    from folo_sampling.device import TUNING

    speed = bandwidth()
    print(f"vocabulary {vocab}, bfloat16, {shape} logits; one read of a row at {speed / 1e6:.2f} TB/s is 100 %")
    print(f"{'rows':>4} {'parameters':<12} {'kernels us':>11} {'of limit':>9} {'tensors us':>11} {'times':>6}")
    for rows in ROWS:
        batches = logits_of(rows, vocab, shape)
        least = rows * vocab * 2 / speed
        for mode, fields in MODES.items():
            metadata = metadata_of(rows, vocab, fields)
            ours = in_graph(by_kernels(metadata, mode, TUNING), batches)
            theirs = timed(partial(by_tensors(metadata, mode, vocab), batches[0]), repeats=5)
            print(f"{rows:>4} {mode:<12} {ours:>11.1f} {least / ours:>9.1%} {theirs:>11.1f} {theirs / ours:>6.1f}")


def tune(vocab: int, shape: str) -> None:
    """Print the best sizes of the work."""
    for rows, mode in itertools.product(ROWS, MODES):
        batches, metadata = logits_of(rows, vocab, shape), metadata_of(rows, vocab, MODES[mode])
        found = [(in_graph(by_kernels(metadata, mode, tuning), batches), tuning) for tuning in tunings()]
        found.sort(key=lambda pair: pair[0])
        for best, tuning in found[:4]:
            sizes = f"chunk {tuning.chunk} x {tuning.warps} warps, tile {tuning.tile} x {tuning.tile_warps} warps"
            print(f"{rows:>4} {mode:<12} {best:>9.1f} us   {sizes}", flush=True)
    tune_beams(vocab, shape)


def tune_beams(vocab: int, shape: str) -> None:
    """Print the best sizes of the work of finding a row's likeliest tokens."""
    from folo_beam.device import Tuning, likeliest

    for count, width in BEAMS:
        batches = logits_of(count * width, vocab, shape)
        sizes = itertools.product((1024, 2048, 4096, 8192), (4, 8, 16))
        tried = [Tuning(chunk=chunk, warps=warps) for chunk, warps in sizes if 4 <= chunk // warps // 32 <= 32]  # noqa: PLR2004
        found = [(in_graph(partial(likeliest, count=width + 1, tuning=each), batches), each) for each in tried]
        for best, tuning in sorted(found, key=lambda pair: pair[0])[:4]:
            print(f"{count} x {width:<3} {'beam':<9} {best:>9.1f} us   chunk {tuning.chunk} x {tuning.warps} warps")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--shape", choices=("gaussian", "peaked"), default="gaussian")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("sampling: no CUDA device is found; run this on a machine that has one", file=sys.stderr)
        return 2
    with torch.inference_mode():
        if options.tune:
            tune(options.vocab, options.shape)
        else:
            compare(options.vocab, options.shape)
            beams(options.vocab, options.shape)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
