"""Drafts that are drawn leave the output's distribution as it was; drafts that are certain leave every token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_core.config import EngineConfig
from folo_core.plugins.manager import load_registry
from folo_core.testing.builders import make_context, make_metadata, make_request
from folo_core.testing.harness import SamplerHarness
from folo_speculative import SpeculativeConfig, SpeculativeParams
from folo_speculative.draws import draw
from folo_speculative.sampler import SpeculativeSampler, first_rejected

VOCAB = 7
TARGET = torch.randn((VOCAB, VOCAB), generator=torch.Generator().manual_seed(0)) * 1.5
DRAFT = TARGET + torch.randn((VOCAB, VOCAB), generator=torch.Generator().manual_seed(1))
REGISTRY = load_registry()
TOKENS = 12


class Table:
    """A draft model whose next token depends on the last one alone."""

    def __init__(self, table):
        self.table = table
        self.forgotten = []

    def logits(self, keys, histories):
        assert len(set(keys)) == len(keys)
        return self.table[[history[-1] for history in histories]].clone()

    def forget_request(self, request_id):
        self.forgotten.append(request_id)


class Watched(SpeculativeSampler):
    """Counts what was judged."""

    drafted = accepted = 0

    def step(self, logits, metadata):
        output = super().step(logits, metadata)
        if metadata.drafts is not None:
            ends = (metadata.drafts < 0).nonzero()[:, 0]
            starts = torch.cat((ends.new_zeros(1), ends[:-1] + 1))
            self.drafted += int((ends - starts).sum())
            self.accepted += int((output.parents - starts).sum())
        return output


def build(draft=DRAFT):
    config = EngineConfig.from_options(model="x", plugins={"folo-speculative": SpeculativeConfig(draft_model="d")})
    table = Table(draft)
    context = make_context(vocab_size=VOCAB, registry=REGISTRY, config=config, side_model=lambda _: table)
    return Watched(context), table


def answers(params, count, draft=DRAFT, target=TARGET):
    """Answers of ``count`` requests that differ in their seeds, and the sampler."""
    sampler, table = build(draft)
    harness = SamplerHarness(sampler, VOCAB, logits_of=lambda history, _: target[history[-1]])
    requests = [make_request(f"r{seed}", params(seed), prompt=(seed % VOCAB,)) for seed in range(count)]
    for request in requests:
        harness.add(request)
    while any(len(request.live[0].data.output_token_ids) < TOKENS for request in requests):
        harness.step()
    texts = [[request.prompt_token_ids[0], *harness.end(request)[0][:TOKENS]] for request in requests]
    assert not sampler._drawn
    assert len(table.forgotten) == count
    return texts, sampler


def chance(texts, table):
    """Chi-square p-value of the transitions, against the rows of ``table``."""
    pairs = torch.tensor([[a, b] for text in texts for a, b in itertools.pairwise(text)])
    counts = torch.bincount(pairs[:, 0] * VOCAB + pairs[:, 1], minlength=VOCAB**2).view(VOCAB, VOCAB).double()
    expected = counts.sum(1, keepdim=True) * table
    assert not counts[table == 0].any(), "a filtered token was chosen"
    used = expected > 0
    statistic = ((counts - expected) ** 2)[used].div(expected[used]).sum()
    degrees = (used.sum(1) - 1).sum().clamp(min=1).double()
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


def exact(table, fields):
    """Each row's distribution after the filters, from the definition, float64."""
    params = SpeculativeParams(**fields)
    probs = (table.double() / params.temperature).softmax(1)
    if params.top_k:
        probs = probs * (table >= table.sort(1, descending=True).values[:, params.top_k - 1 : params.top_k])
        probs = probs / probs.sum(1, keepdim=True)
    if params.top_p < 1:
        values, order = probs.sort(1, descending=True)
        keep = (values.cumsum(1) - values) < params.top_p
        probs = probs * torch.zeros_like(probs).scatter_(1, order, keep.double())
        probs = probs / probs.sum(1, keepdim=True)
    probs = probs * (probs >= params.min_p * probs.amax(1, keepdim=True))
    return probs / probs.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.8, "num_draft_tokens": 2},
        {"top_k": 3},
        {"top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    ],
    ids=repr,
)
def test_drawn_drafts_leave_the_distribution(fields):
    texts, sampler = answers(lambda s: SpeculativeParams(**fields, seed=s, proposer="draft-model", max_tokens=99), 1750)
    assert sum(len(text) - 1 for text in texts) >= 20_000
    assert 0.2 < sampler.accepted / sampler.drafted < 0.95, "some drafts were kept, some were not"
    assert chance(texts, exact(TARGET, fields)) > 1e-3
    wrong = exact(TARGET * 1.15, {key: fields[key] for key in fields if key == "temperature"})
    if not {"top_k", "top_p", "min_p"} & fields.keys():
        assert chance(texts, wrong) < 1e-3, "the test could not tell a slightly different distribution"


def test_two_tokens_in_a_row_are_independent_of_what_was_drafted():
    """The second token after a given one follows the target whether the first was a draft, a correction or neither."""
    texts, _ = answers(lambda s: SpeculativeParams(seed=s, proposer="draft-model", max_tokens=99), 1750)
    table = exact(TARGET, {})
    for offset in range(7):
        at_one_place = [text[offset : offset + 3] for text in texts]
        assert chance(at_one_place, table) > 1e-4


def test_a_draft_model_that_is_the_model_itself_is_nearly_always_kept():
    texts, sampler = answers(
        lambda s: SpeculativeParams(seed=s, proposer="draft-model", max_tokens=99), 300, draft=TARGET.clone()
    )
    assert sampler.accepted == sampler.drafted > 1000
    assert chance(texts, exact(TARGET, {})) > 1e-3


def test_a_draft_model_that_never_says_what_the_model_says_is_never_kept():
    target = TARGET.clone()
    target[:, ::2] = -torch.inf
    draft = TARGET.clone()
    draft[:, 1::2] = -torch.inf
    texts, sampler = answers(
        lambda s: SpeculativeParams(seed=s, proposer="draft-model", max_tokens=99), 500, draft=draft, target=target
    )
    assert sampler.accepted == 0 < sampler.drafted
    starts_odd = [text[1:] for text in texts]
    assert chance(starts_odd, exact(target, {})) > 1e-3


def plain(params, target=TARGET):
    """What the plain random sampler answers to the same request."""
    sampler = REGISTRY.get("samplers", "random").build(make_context(vocab_size=VOCAB, registry=REGISTRY))
    harness = SamplerHarness(sampler, VOCAB, logits_of=lambda history, _: target[history[-1]])
    return harness.run([make_request("r", params, prompt=(params.seed % VOCAB,))], TOKENS)["r"][0]


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8, "min_p": 0.1}], ids=repr)
def test_certain_drafts_leave_every_token(fields):
    for options in ({"proposer": "ngram", "min_ngram": 1}, {"proposer": "draft-model", "greedy_draft": True}):
        texts, sampler = answers(lambda s: SpeculativeParams(**fields, **options, seed=s, max_tokens=99), 60)  # noqa: B023
        assert 0 < sampler.accepted < sampler.drafted
        assert [text[1:] for text in texts] == [plain(SpeculativeParams(**fields, seed=s)) for s in range(60)]


def test_greedy_and_drawn_drafts_share_a_batch_and_do_not_touch_each_other():
    def params(seed):
        choices = [{"temperature": 0.0}, {}, {"greedy_draft": True}, {"proposer": "ngram", "min_ngram": 1}]
        return SpeculativeParams(**{"proposer": "draft-model", "seed": seed, "max_tokens": 99} | choices[seed % 4])

    texts, sampler = answers(params, 40)
    assert 0 < sampler.accepted < sampler.drafted
    for seed, text in enumerate(texts):
        if seed % 4 == 0:
            expected = [seed % VOCAB]
            while len(expected) <= TOKENS:
                expected.append(int(TARGET[expected[-1]].argmax()))
            assert text == expected
        elif seed % 4 > 1:
            assert text[1:] == plain(params(seed))
    alone = {seed: answers(lambda _, s=seed: params(s), 1)[0][0] for seed in (0, 7)}
    assert alone[0] == texts[0]
    assert alone[7][1:] == plain(params(7))


def test_what_was_drafted_for_another_position_is_not_used():
    """After a preemption the drafts are gone, and the next ones are judged by their own distributions."""
    sampler, _ = build()
    params = SpeculativeParams(seed=1, proposer="draft-model", max_tokens=99)
    request = make_request("r", params)
    sampler.add_request(request)
    metadata = make_metadata([params], vocab_size=VOCAB, request_ids=["r"], histories=[[0, 1]], prompt_lengths=[1])
    sampler.step(TARGET[[1]].clone(), metadata)
    assert sampler._drawn["r"].position == 3
    metadata = make_metadata(
        [params] * 2, vocab_size=VOCAB, request_ids=["r"] * 2, sequence_indices=[0, 0],
        histories=[[0, 1], [0, 1, 4]], prompt_lengths=[1, 1], drafts=[4, -1],
    )  # fmt: skip
    output = sampler.step(TARGET[[1, 4]].clone(), metadata)
    own = plain_token(params, TARGET[[1]], 2)
    assert (output.parents.tolist() == [1]) == (own == 4)
    assert sampler._drawn["r"].position == 3 + (own == 4)


def plain_token(params, logits, position):
    sampler = REGISTRY.get("samplers", "random").build(make_context(vocab_size=VOCAB, registry=REGISTRY))
    metadata = make_metadata([params], vocab_size=VOCAB, histories=[[0] * position])
    return int(sampler.step(logits.clone(), metadata).tokens)


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=6))
def test_first_rejected_is_the_row_behind_the_last_kept_draft(sequences):
    kept = torch.tensor([flag for flags in sequences for flag in [*flags, False]])
    drafts = torch.tensor([draft for flags in sequences for draft in [*([3] * len(flags)), -1]])
    expected, start = [], 0
    for flags in sequences:
        expected.append(start + [*flags, False].index(False))
        start += len(flags) + 1
    assert first_rejected(kept, drafts).tolist() == expected


def test_draw_follows_the_weights_and_never_takes_a_zero():
    weights = torch.tensor([[0.0, 0.5, 0.0, 1.5, 0.0]]).expand(4, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, numbers).tolist() == [1, 1, 3, 3]
    tiny = torch.tensor([[1e-30, 3e-30]])
    assert draw(tiny, torch.tensor([0.24], dtype=torch.float64)).tolist() == [0]
    assert draw(tiny, torch.tensor([0.26], dtype=torch.float64)).tolist() == [1]
