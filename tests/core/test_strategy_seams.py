"""What the engine carries for strategies: numbers on rows, held rows, drafts as rows, blocks shared again."""

from __future__ import annotations

import itertools
import random
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import (
    DeferredExecutor,
    ObserverPlugin,
    SamplerPlugin,
    TreeParams,
    TreeSampler,
    assert_clean,
    greedy,
    make_engine,
    run,
)
from folo_core.errors import ParamsError
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import RequestOutputKind, SamplingParams
from folo_core.testing.fakes import FakeModel


class Carrier(TreeSampler):
    """Random trees whose rows carry the sum of their tokens as score and a hash of them as tag; some rows are held."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = self.held = 0

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        rows = [(request, sequence) for request in self.requests(metadata) for sequence in request.live]
        outputs = [sequence.data.output_token_ids for _, sequence in rows]
        assert metadata.scores.tolist() == [float(sum(tokens)) for tokens in outputs]
        assert metadata.tags.tolist() == [hash(tuple(tokens)) % 2**31 if tokens else 0 for tokens in outputs]
        self.checked += sum(map(bool, outputs))
        output = super().step(logits, metadata)
        parents, tokens = output.parents.tolist(), output.tokens.clone()
        for _, group in itertools.groupby(range(len(parents)), lambda row: metadata.request_ids[parents[row]]):
            for row in list(group)[1:]:
                if self.random.random() < 0.3 and outputs[parents[row]]:
                    tokens[row] = -1
                    self.held += 1
        after = [
            outputs[parent] + [t for t in mine if t >= 0] for parent, mine in zip(parents, tokens.tolist(), strict=True)
        ]
        return attrs.evolve(
            output,
            tokens=tokens,
            scores=torch.tensor([float(sum(tokens)) for tokens in after]),
            tags=torch.tensor([hash(tuple(tokens)) % 2**31 for tokens in after]),
        )

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        self.known = getattr(self, "known", {}) | {request.request_id: request}

    def requests(self, metadata: Any) -> list[Any]:
        return [self.known[request_id] for request_id, _ in metadata.groups]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999), blocks=st.integers(40, 70), tokens=st.integers(8, 40), block_size=st.sampled_from([1, 4])
)
def test_rows_keep_their_numbers_and_their_past_through_forks_holds_and_preemption(seed, blocks, tokens, block_size):
    sampler = Carrier()
    sampler.random.seed(seed)
    engine, model = make_engine(
        num_blocks=blocks * 4 // block_size,
        block_size=block_size,
        max_num_batched_tokens=tokens,
        max_num_seqs=8,
        max_model_len=40,
        plugins=[SamplerPlugin(sampler)],
    )
    for i, width in enumerate((3, 4, 2)):
        params = TreeParams(width=width, max_tokens=10, ignore_eos=True, temperature=0.0)
        engine.add_request(str(i), [i + 1] * (3 * i + 2), params)
    engine.add_request("plain", [9, 8, 7], greedy(max_tokens=12))
    final = run(engine)
    assert sampler.checked
    assert final["plain"].outputs[0].token_ids == model.expected_tokens([9, 8, 7], 12)
    for i in range(3):
        assert final[str(i)].error is None
        for completion in final[str(i)].outputs:
            follow(model, [i + 1] * (3 * i + 2), completion.token_ids)
    assert_clean(engine)


def follow(model: FakeModel, prompt: list[int], tokens: list[int]) -> None:
    """Every token is among the best few after those before it, as a tree of best tokens makes it."""
    past = list(prompt)
    for token in tokens:
        assert token in model.logits_after(past).topk(6).indices.tolist()
        past.append(token)


def test_the_strategies_above_do_hold_rows_and_are_preempted():
    sampler = Carrier()
    engine, _ = make_engine(num_blocks=34, max_num_seqs=16, max_model_len=32, plugins=[SamplerPlugin(sampler)])
    for i in range(4):
        params = TreeParams(width=4, max_tokens=14, ignore_eos=True, temperature=0.0)
        engine.add_request(str(i), list(range(1, 17)), params)
    metrics = [request.metrics for request in engine.requests.values()]
    final = run(engine)
    assert all(output.error is None for output in final.values())
    assert sampler.held > 10
    assert sum(m.num_preemptions for m in metrics) > 0
    assert_clean(engine)


class FanOut(TreeSampler):
    """One row becomes ``width`` rows at the first token; each then goes on by itself."""

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        parents, tokens = [], []
        ranked = logits.argsort(dim=1, descending=True)
        for _, rows in metadata.groups:
            first = metadata.prompt_lengths[rows[0]] == int(metadata.positions[rows[0]])
            chosen = [rows[0]] * metadata.params[rows[0]].width if first else list(rows)
            parents += chosen
            tokens += [int(ranked[row, place if first else 0]) for place, row in enumerate(chosen)]
        return SamplerOutput(parents=torch.tensor(parents), tokens=torch.tensor(tokens)[:, None])


def test_a_preempted_group_shares_its_prompt_again():
    """Sixteen rows of a 40-token prompt come back with the prompt computed, and held, once."""
    engine, _ = make_engine(num_blocks=512, max_num_seqs=32, max_model_len=64, plugins=[SamplerPlugin(FanOut())])
    params = TreeParams(width=16, max_tokens=12, ignore_eos=True, temperature=0.0)
    engine.add_request("wide", list(range(40)), params)
    pool = engine.state.kv.pool
    for _ in range(3):
        engine.step()
    held = pool.num_usable - pool.num_free
    request = engine.requests["wide"]
    tokens = [list(sequence.data.token_ids) for sequence in request.live]
    scheduled = preempt(engine, request)
    assert pool.num_free == pool.num_usable
    while any(sequence.num_uncomputed_tokens > 1 for sequence in request.live) or not request.live[-1].block_table:
        engine.step()
        scheduled += engine.scheduled_tokens[-1]
        assert [s.data.token_ids[: len(t)] for s, t in zip(request.live, tokens, strict=True)] == tokens
    assert pool.num_usable - pool.num_free <= held + 16, "at most one more block a row"
    assert scheduled < 40 + 16 * 6, "the prompt ran once"
    final = run(engine)["wide"]
    alone, _ = make_engine(num_blocks=512, max_num_seqs=32, max_model_len=64, plugins=[SamplerPlugin(FanOut())])
    alone.add_request("wide", list(range(40)), params)
    assert [c.token_ids for c in final.outputs] == [c.token_ids for c in run(alone)["wide"].outputs]
    assert_clean(engine)


def preempt(engine: Any, request: Any) -> int:
    """Take a running request's memory as a scheduler would, and record what later steps run."""
    from folo_core.scheduling.planner import StepPlanner

    schedule, engine.scheduled_tokens = engine.scheduler.schedule, []

    class Once:
        def __init__(self) -> None:
            self.done = False

        order = staticmethod(engine.scheduler.order)

        def schedule(self, state: Any, budget: Any) -> Any:
            if not self.done:
                self.done = True
                planner = StepPlanner(state, budget, self.order)
                planner.preempt(request)
                return planner.output
            output = schedule(state, budget)
            engine.scheduled_tokens.append(output.num_tokens)
            return output

    engine.scheduler = Once()
    engine.step()
    return 0


def test_a_group_that_shares_its_prompt_is_admitted_where_separate_requests_would_not_fit():
    engine, _ = make_engine(num_blocks=30, max_num_seqs=16, max_model_len=100, plugins=[SamplerPlugin(FanOut())])
    params = TreeParams(width=8, max_tokens=8, ignore_eos=True, temperature=0.0)
    engine.add_request("wide", list(range(40)), params)  # 10 shared blocks and 2 for each row
    assert len(run(engine)["wide"].outputs) == 8
    with pytest.raises(Exception, match="needs 34 KV blocks"):
        engine.add_request("wider", list(range(40)), attrs.evolve(params, max_tokens=12))


@attrs.frozen(slots=True, kw_only=True)
class DraftParams(SamplingParams):
    quality: float = attrs.field(default=0.7)


class Drafter(TreeSampler):
    """Greedy decoding that guesses ahead with an oracle which errs at random."""

    needs_history = True

    def __init__(self, model: FakeModel) -> None:
        super().__init__()
        self.model = model
        self.check = True
        self.proposed = self.accepted = self.rejected = 0

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        tokens = logits.argmax(1).tolist()
        drafts = [-1] * len(tokens) if metadata.drafts is None else metadata.drafts.tolist()
        parents, row = [], 0
        while row < len(tokens):
            last = row
            while drafts[last] >= 0:
                last += 1
            best = row
            while drafts[best] >= 0 and tokens[best] == drafts[best]:
                best += 1
            self.accepted += best - row
            self.rejected += last - best
            for place in range(row, last + 1):
                history, length = metadata.history[place], int(metadata.positions[place])
                assert len(history) == length
                assert not self.check or self.model.logits_after(history).argmax() == logits[place].argmax()
            parents.append(best)
            row = last + 1
        chosen = [tokens[parent] for parent in parents]
        guesses = [
            self.guess([*metadata.history[p], t], metadata.params[p].quality)
            for p, t in zip(parents, chosen, strict=True)
        ]
        self.proposed += sum(len(guess) for guess in guesses)
        padded = [guess + [-1] * (4 - len(guess)) for guess in guesses]
        return SamplerOutput(
            parents=torch.tensor(parents), tokens=torch.tensor(chosen)[:, None], drafts=torch.tensor(padded)
        )

    def guess(self, past: list[int], quality: float) -> list[int]:
        found: list[int] = []
        for _ in range(self.random.randint(0, 4)):
            right = int(self.model.logits_after([*past, *found]).argmax())
            found.append(right if self.random.random() < quality else self.random.randrange(64))
        return found


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    blocks=st.integers(14, 60),
    budget=st.integers(6, 40),
    steps_stop=st.booleans(),
    depth=st.integers(1, 3),
    logprobs=st.sampled_from([None, 2]),
)
def test_drafts_change_nothing_but_the_number_of_steps(  # noqa: PLR0913, PLR0917 (what hypothesis varies)
    seed, blocks, budget, steps_stop, depth, logprobs
):
    model = FakeModel()
    sampler = Drafter(model)
    sampler.random.seed(seed)
    engine, _ = make_engine(
        model,
        num_blocks=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=6,
        max_model_len=44,
        plugins=[SamplerPlugin(sampler, DraftParams), DeferredExecutor(depth)],
        executor="deferred",
    )
    prompts = [[seed % 60, i + 1, 2 * i, 5][: i + 2] for i in range(4)]
    lengths = random.Random(seed).choices(range(1, 40), k=4)
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = DraftParams(max_tokens=length, ignore_eos=not steps_stop, temperature=0.0, logprobs=logprobs)
        engine.add_request(str(i), prompt, params)
    engine.add_request("plain", [9, 8, 7], greedy(max_tokens=12, logprobs=logprobs))
    final = run(engine)
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        completion = final[str(i)].outputs[0]
        assert final[str(i)].error is None
        expected = prompt.copy()
        for _ in range(length):
            expected.append(int(model.logits_after(expected).argmax()))
            if steps_stop and expected[-1] == 63:
                break
        assert completion.token_ids == expected[len(prompt) :]
        if logprobs:
            dense = [
                float(model.logits_after(expected[:place]).log_softmax(-1)[expected[place]])
                for place in range(len(prompt), len(expected))
            ]
            assert [next(iter(entry.values())).logprob for entry in completion.logprobs] == pytest.approx(
                dense, abs=1e-5
            )
            assert completion.cumulative_logprob == pytest.approx(sum(dense), abs=1e-4)
    assert final["plain"].outputs[0].token_ids == model.expected_tokens([9, 8, 7], 12)
    assert_clean(engine)


def test_drafts_are_proposed_accepted_rejected_and_preempted():
    model = FakeModel()
    sampler = Drafter(model)
    watch = ObserverPlugin()
    engine, _ = make_engine(
        model, num_blocks=26, max_num_seqs=6, max_model_len=64, plugins=[SamplerPlugin(sampler, DraftParams), watch]
    )
    for i in range(4):
        engine.add_request(str(i), [i, 2, 3], DraftParams(max_tokens=40, ignore_eos=True, temperature=0.0))
    metrics = [request.metrics for request in engine.requests.values()]
    final = run(engine)
    assert all(len(output.outputs[0].token_ids) == 40 for output in final.values())
    assert sampler.accepted > 50
    assert sampler.rejected > 10
    for told in (metrics, watch.records):
        assert sum(t.num_accepted_tokens for t in told) == sampler.accepted
        assert sum(t.num_draft_tokens for t in told) == sampler.accepted + sampler.rejected
    assert sum(record.num_sampled for record in watch.records) == 4 * 40
    assert 0.3 < metrics[0].acceptance_rate < 1
    assert sum(m.num_preemptions for m in metrics) > 0
    # Four requests of 40 tokens: without drafts some step runs for each token of the longest.
    assert max(record.num_tokens for record in watch.records) > 4
    assert_clean(engine)


def test_a_draft_after_which_everything_is_masked_is_a_bad_guess_and_no_error():
    """The guesses 50 and above lead where every token is masked; plain decoding never goes there."""
    model = FakeModel()

    def mask(logits, pasts):
        logits[:, 50:] = -torch.inf
        for row, past in enumerate(pasts):
            if max(past[3:], default=0) >= 50:
                logits[row] = -torch.inf
                masked.append(past)
        return logits

    masked: list[list[int]] = []
    model.edit_logits = mask
    sampler = Drafter(model)
    sampler.check = False
    sampler.guess = lambda past, _quality: [sampler.random.randrange(64) for _ in range(sampler.random.randint(0, 4))]
    engine, _ = make_engine(model, plugins=[SamplerPlugin(sampler, DraftParams)])
    params = DraftParams(max_tokens=30, ignore_eos=True, temperature=0.0, logprobs=1)
    engine.add_request("a", [1, 2, 3], params)
    engine.add_request("b", [4, 2, 3], params)
    final = run(engine)
    assert len(masked) > 5
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 2, 3])):
        past = list(prompt)
        for _ in range(30):
            past.append(int(model.logits_after(past)[:50].argmax()))
        assert final[name].error is None
        assert final[name].outputs[0].token_ids == past[3:]
        assert len(final[name].outputs[0].logprobs) == 30
    assert_clean(engine)


def test_holding_every_row_is_refused_by_name():
    class Stuck(TreeSampler):
        def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
            rows = metadata.num_rows
            return SamplerOutput(parents=torch.arange(rows), tokens=torch.full((rows, 1), -1))

    engine, model = make_engine(plugins=[SamplerPlugin(Stuck())])
    engine.add_request("a", [1, 2], TreeParams())
    engine.add_request("b", [1, 2], greedy())
    final = run(engine)
    assert "hold some rows, not all" in str(final["a"].error)
    assert final["b"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)


@pytest.mark.parametrize("first", [0, 1])
def test_a_held_row_keeps_its_neighbours_log_probabilities(first):
    class Alternate(FanOut):
        def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
            output = super().step(logits, metadata)
            if metadata.num_rows > 1:
                waits = torch.arange(len(output.tokens)) % 2 == (int(metadata.positions.sum()) + first) % 2
                output.tokens[waits] = -1
            return output

    engine, model = make_engine(plugins=[SamplerPlugin(Alternate())])
    params = TreeParams(width=2, max_tokens=4, ignore_eos=True, temperature=0.0, logprobs=1)
    engine.add_request("a", [1, 2, 3], params)
    output = run(engine)["a"]
    assert output.error is None
    for completion in output.outputs:
        assert len(completion.logprobs) == len(completion.token_ids) == 4
        for place, token in enumerate(completion.token_ids):
            exact = model.logits_after([1, 2, 3, *completion.token_ids[:place]]).log_softmax(-1)[token]
            assert completion.logprobs[place][token].logprob == pytest.approx(float(exact), abs=1e-5)


def test_a_request_that_cannot_go_on_ends_alone():
    class Choosy(FanOut):
        def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
            output = super().step(logits, metadata)
            late = [name for name, rows in metadata.groups if name == "bad" and metadata.positions[rows[0]] >= 5]
            kept = torch.tensor([metadata.request_ids[parent] not in late for parent in output.parents.tolist()])
            errors = {name: ParamsError("width: 3: too wide") for name in [*late, "nobody", "plain"] if late}
            return SamplerOutput(parents=output.parents[kept], tokens=output.tokens[kept], errors=errors)

    def answers(*names: str) -> dict[str, Any]:
        engine, _ = make_engine(plugins=[SamplerPlugin(Choosy())])
        for name in names:
            params = greedy() if name == "plain" else TreeParams(width=3, max_tokens=8, ignore_eos=True)
            engine.add_request(name, [1, 2, 3], params)
        final = run(engine)
        assert_clean(engine)
        return final

    final = answers("good", "bad", "plain", "also good")
    assert str(final["bad"].error) == "width: 3: too wide"
    assert isinstance(final["bad"].error, ParamsError)
    assert [c.finish_reason for c in final["bad"].outputs] == ["error"] * 3
    assert [len(c.token_ids) for c in final["bad"].outputs] == [2] * 3
    assert final["plain"].error is None, "a sampler speaks for its own requests alone"
    for name in ("good", "plain", "also good"):
        assert final[name].error is None
        alone = answers(name)[name]
        assert [c.token_ids for c in final[name].outputs] == [c.token_ids for c in alone.outputs]


class Scored(FanOut):
    """Fans out, states log probabilities and scores; the last of equals ranks first."""

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        output = super().step(logits, metadata)
        logprobs = logits.log_softmax(-1)[output.parents].gather(1, output.tokens)
        return attrs.evolve(output, logprobs=logprobs, scores=metadata.scores[output.parents] + logprobs[:, 0])

    def finish(self, request: Any) -> list[Any]:
        return sorted(request.finished, key=lambda s: -s.score)[: request.params.n]


@attrs.frozen(slots=True, kw_only=True)
class ScoredParams(TreeParams):
    """A strategy that drops answers and shows scores."""

    @property
    def grows_in_place(self) -> bool:
        return False

    @property
    def is_scored(self) -> bool:
        return True


def test_scores_and_stated_log_probabilities_reach_the_caller():
    engine, model = make_engine(plugins=[SamplerPlugin(Scored(), ScoredParams)])
    params = ScoredParams(width=4, n=2, max_tokens=5, ignore_eos=True, temperature=0.0)
    engine.add_request("a", [1, 2, 3], params)
    engine.add_request("plain", [1, 2, 3], greedy())
    final = run(engine)
    assert len(final["a"].outputs) == 2
    for completion in final["a"].outputs:
        past, total = [1, 2, 3], 0.0
        for token in completion.token_ids:
            total += float(model.logits_after(past).log_softmax(-1)[token])
            past.append(token)
        assert completion.score == pytest.approx(total, abs=1e-4)
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)
    assert final["a"].outputs[0].score >= final["a"].outputs[1].score
    assert final["plain"].outputs[0].score is None


def test_pieces_of_answers_that_may_change_are_not_streamed():
    engine, _ = make_engine(plugins=[SamplerPlugin(Scored(), ScoredParams)])
    params = ScoredParams(width=3, n=1, max_tokens=5, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    engine.add_request("a", [1, 2, 3], params)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert [output.finished for output in outputs] == [True]
    assert len(outputs[0].outputs[0].token_ids) == 5


def test_branch_records_rebuild_every_sequence_and_cost_nothing_without_an_observer():
    class Branches(ObserverPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.branches: list[Any] = []

        def on_branches(self, record: Any) -> None:
            self.branches.append(record)

    watch, sampler = Branches(), TreeSampler()
    engine, _ = make_engine(plugins=[SamplerPlugin(sampler), watch])
    engine.add_request("a", [1, 2, 3], TreeParams(width=4, max_tokens=9, ignore_eos=True, temperature=0.0))
    final = run(engine)
    tokens: dict[int, list[int]] = {}
    pruned: set[int] = set()
    for record in watch.branches:
        before = {seq_id: list(found) for seq_id, found in tokens.items()}
        for row, parent, new in zip(record.rows, record.parents, record.tokens, strict=True):
            tokens[row] = before.get(parent, []) + new
        pruned |= set(record.pruned)
        assert not pruned & set(record.rows)
    ended = {row: reason for record in watch.branches for row, reason in record.ended.items()}
    assert sorted(tokens[row] for row in ended) == sorted(c.token_ids for c in final["a"].outputs)
    assert set(ended.values()) == {"length"}
    assert pruned
    plain, _ = make_engine()
    assert plain.reporter.observers.of_branches == []


def test_a_branch_observer_that_raises_is_dropped():
    class Breaks(ObserverPlugin):
        def on_branches(self, record: Any) -> None:
            message = "no disk"
            raise OSError(message)

    watch = Breaks()
    engine, model = make_engine(plugins=[watch])
    engine.add_request("a", [1, 2], greedy())
    assert run(engine)["a"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)
    assert engine.reporter.observers.of_branches == []
    assert not watch.records


def test_params_of_an_unknown_class_still_name_what_there_is():
    engine, _ = make_engine()
    with pytest.raises(ParamsError, match="no installed sampler serves it"):
        engine.add_request("a", [1], DraftParams())
