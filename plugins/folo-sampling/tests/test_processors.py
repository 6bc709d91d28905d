"""Each logits processor against a reference in plain Python, and against transformers where it has the same one."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_core.errors import ParamsError
from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_metadata
from folo_sampling import ragged
from folo_sampling.allowed import AllowedTokens
from folo_sampling.bad_words import BadWords
from folo_sampling.bias import LogitBias
from folo_sampling.min_tokens import MinTokens
from folo_sampling.penalties import Penalties

process = pytest.importorskip("transformers.generation.logits_process")
VOCAB = 23
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
token = st.integers(min_value=0, max_value=VOCAB - 1)
tokens = st.lists(token, max_size=12)


def rows_of(params: st.SearchStrategy[SamplingParams]):
    """Rows of parameters, prompt, output and logits."""
    row = st.tuples(params, st.lists(token, min_size=1, max_size=8), tokens, st.integers(0, 2**32))
    return st.lists(row, min_size=1, max_size=5)


def logits_from(seed: int) -> torch.Tensor:
    """Logits with zeros and masked tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, generator=generator) * 4
    choice = torch.rand(VOCAB, generator=generator)
    return logits.masked_fill(choice < 0.1, 0.0).masked_fill(choice > 0.9, -math.inf)


def run(processor, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits before and after, for rows that the processor applies to."""
    for params, *_ in rows:
        assert processor.applies(params) is True
        processor.validate_params(params, VOCAB)
    before = torch.stack([logits_from(seed) for *_, seed in rows])
    histories = [prompt + output for _, prompt, output, _ in rows]
    metadata = make_metadata(
        [params for params, *_ in rows],
        vocab_size=VOCAB,
        histories=histories,
        prompt_lengths=[len(prompt) for _, prompt, _, _ in rows],
        device=DEVICE,
    )
    if not processor.needs_history:
        metadata.history = None
    copies = [list(history) for history in histories]
    after = processor.apply(before.to(DEVICE, copy=True), metadata).cpu()
    assert histories == copies, "the history is a view, never to be written"
    assert after.dtype == torch.float32
    return before, after


def single(value: float) -> float:
    """Rounded as float32 does."""
    return torch.tensor(value, dtype=torch.float32).item()


penalised = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 10.0]),
    presence_penalty=st.sampled_from([0.0, 0.75, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.1, 2.0]),
).filter(Penalties(VOCAB, CPU).applies)


class TestPenalties:
    @given(rows_of(penalised))
    def test_plain_reference(self, rows):
        before, after = run(Penalties(VOCAB, DEVICE), rows)
        for (params, prompt, output, _), old, new in zip(rows, before.tolist(), after.tolist(), strict=True):
            for entry in range(VOCAB):
                score = old[entry]
                if entry in prompt + output:
                    factor = single(params.repetition_penalty)
                    score = single(score / factor if score > 0 else score * factor)
                count = output.count(entry)
                if count:
                    score = single(score - single(single(params.frequency_penalty) * count))
                    score = single(score - single(params.presence_penalty))
                assert new[entry] == score

    @given(st.lists(token, min_size=1, max_size=12), st.sampled_from([1.2, 0.7, 3.0]), st.integers(0, 99))
    def test_transformers_repetition_penalty(self, history, penalty, seed):
        params = SamplingParams(repetition_penalty=penalty)
        before, after = run(Penalties(VOCAB, DEVICE), [(params, history, [], seed)])
        theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), before.clone())
        assert torch.equal(after, theirs)

    def test_presence_and_frequency_leave_the_prompt_alone(self):
        params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
        before, after = run(Penalties(VOCAB, DEVICE), [(params, [3, 3, 4], [5, 5], 1)])
        changed = (before != after).nonzero()[:, 1].tolist()
        assert changed == [5]
        assert after[0, 5] == before[0, 5] - 2.0

    def test_applies(self):
        assert not Penalties(VOCAB, CPU).applies(SamplingParams())


class TestBias:
    @given(rows_of(st.builds(SamplingParams, logit_bias=st.dictionaries(token, st.floats(-100, 100), min_size=1))))
    def test_plain_reference(self, rows):
        before, after = run(LogitBias(DEVICE), rows)
        for (params, *_), old, new in zip(rows, before.tolist(), after.tolist(), strict=True):
            expected = [single(old[entry] + single(params.logit_bias.get(entry, 0.0))) for entry in range(VOCAB)]
            assert new == expected

    def test_applies(self):
        assert not LogitBias(CPU).applies(SamplingParams())
        assert not LogitBias(CPU).applies(SamplingParams(logit_bias={}))

    def test_out_of_vocabulary(self):
        with pytest.raises(ParamsError, match=rf"logit_bias: {VOCAB}, 99: .*0 to {VOCAB - 1}"):
            LogitBias(CPU).validate_params(SamplingParams(logit_bias={VOCAB: 1.0, 2: 1.0, 99: 1}), VOCAB)


short_answers = st.builds(
    SamplingParams,
    min_tokens=st.integers(1, 9),
    stop_token_ids=tokens,
    ignore_eos=st.booleans(),
    resolved_eos=st.sampled_from([(), (2,), (7, 2), (VOCAB + 4, 3)]),
)


class TestMinTokens:
    @given(rows_of(short_answers))
    def test_plain_reference(self, rows):
        before, after = run(MinTokens(VOCAB, DEVICE), rows)
        for (params, _, output, _), old, new in zip(rows, before.tolist(), after.tolist(), strict=True):
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else params.resolved_eos)}
            short = len(output) < params.min_tokens
            assert new == [-math.inf if short and entry in stops else old[entry] for entry in range(VOCAB)]

    @given(st.lists(token, min_size=1, max_size=5), tokens, st.integers(1, 12), st.integers(0, 99))
    def test_transformers_min_new_tokens(self, prompt, output, least, seed):
        params = SamplingParams(min_tokens=least, resolved_eos=(4, 9))
        before, after = run(MinTokens(VOCAB, DEVICE), [(params, prompt, output, seed)])
        theirs = process.MinNewTokensLengthLogitsProcessor(len(prompt), least, [4, 9])
        assert torch.equal(after, theirs(torch.tensor([prompt + output]), before.clone()))

    def test_applies(self):
        assert not MinTokens(VOCAB, CPU).applies(SamplingParams(resolved_eos=(1,)))

    def test_out_of_vocabulary(self):
        with pytest.raises(ParamsError, match=f"stop_token_ids: {VOCAB}: "):
            MinTokens(VOCAB, CPU).validate_params(SamplingParams(min_tokens=1, stop_token_ids=[VOCAB]), VOCAB)


few = st.integers(min_value=0, max_value=3)
words = st.lists(st.lists(few, min_size=1, max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)


class TestBadWords:
    @given(
        st.lists(
            st.tuples(words, st.lists(few, min_size=1, max_size=4), st.lists(few, max_size=6)), min_size=1, max_size=5
        )
    )
    def test_plain_reference(self, cases):
        rows = [
            (SamplingParams(resolved_bad_words=w), prompt, output, i) for i, (w, prompt, output) in enumerate(cases)
        ]
        before, after = run(BadWords(DEVICE), rows)
        for (params, _, output, _), old, new in zip(rows, before.tolist(), after.tolist(), strict=True):
            banned = {
                word[-1]
                for word in params.resolved_bad_words
                if len(word) - 1 <= len(output) and output[len(output) - len(word) + 1 :] == list(word[:-1])
            }
            assert new == [-math.inf if entry in banned else old[entry] for entry in range(VOCAB)]

    @given(words, st.lists(few, max_size=6))
    def test_transformers_no_bad_words(self, words, output):
        """Theirs compares the prompt, too: with a prompt that no word holds both are the same."""
        before, after = run(BadWords(DEVICE), [(SamplingParams(resolved_bad_words=words), [20], output, 5)])
        theirs = process.NoBadWordsLogitsProcessor([list(word) for word in dict.fromkeys(words)])
        assert torch.equal(after, theirs(torch.tensor([[20, *output]]), before.clone()))

    def test_a_word_begun_in_the_prompt_may_be_completed(self):
        params = SamplingParams(resolved_bad_words=((5, 6),))
        before, after = run(BadWords(DEVICE), [(params, [5], [], 1), (params, [1], [5], 1)])
        assert torch.equal(before[0], after[0])
        assert after[1, 6] == -math.inf

    def test_applies(self):
        assert not BadWords(CPU).applies(SamplingParams())

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            (SamplingParams(bad_words=["no"]), r"bad_words: \('no',\): .*load a tokenizer"),
            (SamplingParams(bad_words=["no"], resolved_bad_words=((1, VOCAB),)), f"bad_words: {VOCAB}: "),
        ],
    )
    def test_refusals(self, params, message):
        assert BadWords(CPU).applies(params)
        with pytest.raises(ParamsError, match=message):
            BadWords(CPU).validate_params(params, VOCAB)


class TestAllowedTokens:
    @given(rows_of(st.builds(SamplingParams, allowed_token_ids=st.lists(token, min_size=1))))
    def test_plain_reference(self, rows):
        before, after = run(AllowedTokens(DEVICE), rows)
        for (params, *_), old, new in zip(rows, before.tolist(), after.tolist(), strict=True):
            assert new == [old[entry] if entry in params.allowed_token_ids else -math.inf for entry in range(VOCAB)]

    def test_applies(self):
        assert not AllowedTokens(CPU).applies(SamplingParams())

    def test_out_of_vocabulary(self):
        with pytest.raises(ParamsError, match=f"allowed_token_ids: {VOCAB}: "):
            AllowedTokens(CPU).validate_params(SamplingParams(allowed_token_ids=[1, VOCAB]), VOCAB)


class TestRagged:
    def test_reads_each_params_object_once(self):
        reads = []
        ids = ragged.Ragged(CPU, lambda params: reads.append(params) or params.stop_token_ids)
        first, second = SamplingParams(stop_token_ids=[1, 2]), SamplingParams(stop_token_ids=[3])
        for _ in range(3):
            rows, values, numbers = ids.of([first, second, first])
            assert rows.tolist() == [0, 0, 1, 2, 2]
            assert values.tolist() == [1, 2, 3, 1, 2]
            assert len(numbers) == 0
        assert reads == [first, second]

    def test_forgets_before_it_grows_without_bound(self, monkeypatch):
        monkeypatch.setattr(ragged, "_CACHED_ENTRIES", 10)
        ids = ragged.Ragged(CPU, lambda params: params.stop_token_ids)
        for number in range(50):
            params = SamplingParams(stop_token_ids=[number, number + 1])
            assert ids.of([params])[1].tolist() == [number, number + 1]
            assert len(ids._known) <= 4

    def test_a_reused_address_is_no_hit(self):
        """Params are kept alive while their ids are cached, so equal addresses mean equal objects."""
        ids = ragged.Ragged(CPU, lambda params: params.stop_token_ids)
        for number in range(300):
            params = SamplingParams(stop_token_ids=[number])
            assert ids.of([params])[1].tolist() == [number]
            assert ids.of([attrs.evolve(params, stop_token_ids=[number + 1])])[1].tolist() == [number + 1]
            del params
