"""The samplers; each is the honest one with one thing wrong."""

from __future__ import annotations

import attrs
import torch

from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling.rng import uniform


class Honest:
    """Draws from the softmax."""

    def __init__(self):
        self.open = {}

    def add_request(self, request):
        self.open[request.request_id] = request.seed

    def step(self, logits, metadata):
        mass = logits.double().softmax(-1).cumsum(-1)
        drawn = uniform(metadata.seeds, metadata.sequence_indices, metadata.positions) * mass[:, -1]
        tokens = torch.searchsorted(mass, drawn[:, None], right=True)
        return SamplerOutput(parents=torch.arange(len(tokens)), tokens=tokens)

    def finish(self, request):
        return list(request.finished)

    def remove_request(self, request_id):
        del self.open[request_id]


class ReadsNeighbours(Honest):
    def step(self, logits, metadata):
        return super().step(logits - logits.amax(0, keepdim=True) * 0.5, metadata)


class GlobalRandom(Honest):
    def step(self, logits, metadata):
        tokens = torch.multinomial(logits.softmax(-1), 1)
        return SamplerOutput(parents=torch.arange(len(tokens)), tokens=tokens)


class CountsSteps(Honest):
    steps = 0

    def step(self, logits, metadata):
        self.steps += 1
        return super().step(logits, attrs.evolve(metadata, positions=torch.full_like(metadata.positions, self.steps)))


class KeepsState(Honest):
    def remove_request(self, request_id):
        """Keep it."""


class IgnoresMasks(Honest):
    def step(self, logits, metadata):
        return super().step(logits.clamp_min(0.0), metadata)


class ReturnsForeign(Honest):
    kept = None

    def finish(self, request):
        kept, self.kept = self.kept, request.finished[0]
        return [kept or request.finished[0]]


class StateByRow(Honest):
    """Never repeats a token in a row: a row of the batch, which is not always the same request's."""

    last = torch.empty(0, dtype=torch.int64)

    def step(self, logits, metadata):
        known = self.last[: len(logits)]
        logits[torch.arange(len(known)), known] = -torch.inf
        output = super().step(logits, metadata)
        self.last = output.tokens.flatten()
        return output


class LoopsOverRows(Honest):
    def step(self, logits, metadata):
        rows = [super(LoopsOverRows, self).step(logits[[row]], metadata.select([row])) for row in range(len(logits))]
        return SamplerOutput(parents=torch.arange(len(rows)), tokens=torch.cat([row.tokens for row in rows]))


class FallsWithOthers(Honest):
    def step(self, logits, metadata):
        missing = self.open.keys() - set(metadata.request_ids)
        if missing:
            raise KeyError(min(missing))
        return super().step(logits, metadata)


class AcceptsNonsense(Honest):
    pass


class HonestFork(Honest):
    """Two rows: the two best tokens first, then each row goes on by itself."""

    width = 2

    def step(self, logits, metadata):
        first = [rows.start for _, rows in metadata.groups if len(rows) < self.width]
        single = torch.zeros(len(logits), dtype=torch.bool)
        single[first] = True
        parents = torch.arange(len(logits)).repeat_interleave(1 + (self.width - 1) * single)
        places = torch.arange(len(parents)) - torch.searchsorted(parents, parents)
        tokens = logits.topk(self.width).indices[parents].gather(1, places[:, None])
        return SamplerOutput(parents=parents, tokens=tokens)


class LosesAnswers(HonestFork):
    def finish(self, request):
        return request.finished[:1]


class NeverEnds(Honest):
    """Holds the first row and lets the second grow; before that one ends, it begins again from the first."""

    def step(self, logits, metadata):
        parents, grows = [], []
        for _, rows in metadata.groups:
            long = metadata.params[rows.start].max_tokens - 2 + metadata.prompt_lengths[rows.start]
            fresh = len(rows) == 1 or metadata.positions[rows[-1]] >= long
            parents += [rows.start, rows.start if fresh else rows[-1]]
            grows += [False, True]
        tokens = logits.argmax(-1, keepdim=True)[parents]
        return SamplerOutput(
            parents=torch.tensor(parents), tokens=torch.where(torch.tensor(grows)[:, None], tokens, -1)
        )


class UndeclaredFork(HonestFork):
    pass


class NotSteady(HonestFork):
    def steady_after(self, params):
        return 0


class TooWide(HonestFork):
    width = 3
