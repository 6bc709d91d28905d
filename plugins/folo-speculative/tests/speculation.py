"""Engines around fake models with speculation, and a proposer that knows the future and errs at random."""

from __future__ import annotations

import random

import torch

from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.plugins import hookimpl
from folo_core.plugins.assembly import build_components
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import ProposerSpec
from folo_core.sampling.interface import Draft
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer


class Oracle:
    """Drafts what plain decoding was seen to say, each token wrong with probability ``error``."""

    __name__ = "oracle"

    def __init__(self, error=0.25):
        self.error = error
        self.answers = {}
        self.random = random.Random(0)
        self.removed = []
        self.calls = 0

    def propose(self, metadata, max_tokens):
        self.calls += 1
        rows = []
        for name, text, start in zip(metadata.request_ids, metadata.history, metadata.prompt_lengths, strict=True):
            done = len(text) - start
            # A stop string ends an answer behind the sampler's back: drafts are asked for once more.
            assert text[start:][: len(self.answers[name])] == self.answers[name][:done], (
                "drafts are asked for behind the tokens of plain decoding"
            )
            right = self.answers[name][done : done + self.random.randint(0, max_tokens)]
            rows.append([self.random.randrange(64) if self.random.random() < self.error else t for t in right])
        width = max(map(len, rows))
        return Draft(
            tokens=torch.tensor([r + [-1] * (width - len(r)) for r in rows], dtype=torch.int64).view(len(rows), width)
        )

    def remove_request(self, request_id):
        self.removed.append(request_id)

    @hookimpl
    def folo_proposers(self):
        return [ProposerSpec(name="oracle", help="for tests", factory=lambda _: self)]


def make_engine(model=None, *, plugins=(), draft=None, **options):
    """An engine around a fake model, with the fake model ``draft`` as its draft model."""
    model = FakeModel() if model is None else model
    section = {} if draft is None else {"plugins": {"folo-speculative": {"draft_model": "draft"}}}
    settings = {"model": "fake", "loader": "fake", "attention": "fake", "num_blocks": 256, "block_size": 4}
    config = EngineConfig.from_options(**(settings | section | options))
    fake = FakePlugin(model, FakeTokenizer(), {} if draft is None else {"draft": draft})
    return Engine(build_components(config, load_registry(extra=[fake, *plugins])))


def run(engine, most_steps=3000):
    """Step to the end, checking the books; return the final outputs by request id."""
    final = {}
    for _ in range(most_steps):
        if not engine.has_unfinished_requests:
            break
        final |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    assert not engine.has_unfinished_requests
    engine.step()
    pool = engine.state.kv.pool
    assert pool.num_free == pool.num_usable
    assert not engine.executor.runner.requests
    return final


def sampler_of(engine):
    """The speculative sampler; nothing of any request may be left in it when all have ended."""
    return engine.executor.runner.stage.samplers["folo-speculative:speculative"].part


def peaked(seed=0, factor=3.0):
    """A fake model that is fairly sure of itself."""
    model = FakeModel(seed=seed)
    model.table *= factor
    return model
