"""The conformance kit lets good parts pass and catches each bad one by the check that is meant for it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given

from folo_core.errors import ParamsError, PluginError
from folo_core.plugins import specs
from folo_core.plugins.registry import Part
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling.rng import uniform
from folo_core.sampling_params import SamplingParams, SamplingType
from folo_core.scheduling.interface import SchedulerOutput
from folo_core.scheduling.planner import StepPlanner
from folo_core.testing import strategies
from folo_core.testing.builders import logits_of, make_context, make_metadata, make_request
from folo_core.testing.capabilities import SAMPLER_CAPABILITIES
from folo_core.testing.collection import checks_of
from folo_core.testing.conformance import (
    LogitsProcessorConformance,
    PluginConformance,
    SamplerConformance,
    SchedulerConformance,
)
from folo_core.testing.harness import SamplerHarness, check_sampler_output
from folo_core.testing.installed import load_with
from folo_core.testing.trials import trial_params


class Random:
    """Draws from the softmax: the honest sampler from which the bad ones are made."""

    def __init__(self, context):
        self.seen = {}

    def add_request(self, request):
        self.seen[request.request_id] = 0

    def step(self, logits, metadata):
        mass = logits.double().softmax(-1).cumsum(-1)
        drawn = uniform(metadata.seeds, metadata.sequence_indices, metadata.positions) * mass[:, -1]
        tokens = torch.searchsorted(mass, drawn[:, None], right=True)
        return SamplerOutput(parents=torch.arange(len(tokens)), tokens=tokens)

    def finish(self, request):
        return list(request.finished)

    def remove_request(self, request_id):
        del self.seen[request_id]


@attrs.frozen(slots=True, kw_only=True)
class FanParams(SamplingParams):
    """Three rows."""

    @property
    def num_sequences(self):
        return 3

    @property
    def grows_in_place(self):
        return False


class FanOut(Random):
    """Grows every request to three rows in the first step and re-parents them ever after."""

    def step(self, logits, metadata):
        parents = []
        for _, rows in metadata.groups:
            best = max(rows, key=lambda row: logits[row].amax().item())
            parents += [rows[0]] * 3 if len(rows) == 1 else [best, best, rows[-1]]
        ranked = logits.topk(3).indices
        tokens = [[int(ranked[row, child % 3]), -1] for child, row in enumerate(parents)]
        return SamplerOutput(
            parents=torch.tensor(parents),
            tokens=torch.tensor(tokens),
            logprobs=torch.zeros(len(parents), 2),
            finished=torch.tensor([token[0] == 0 for token in tokens]),
        )


class Drafts(Random):
    """Greedy, and guesses that the text goes on as the fake model likes it to; keeps what proves right."""

    def step(self, logits, metadata):
        best = logits.argmax(-1)
        drafts = torch.full_like(best, -1) if metadata.drafts is None else metadata.drafts
        first = torch.ones(len(best), dtype=torch.bool)
        first[1:] = drafts[:-1] < 0
        parents = self.accept(drafts, best, first)
        tokens = best[parents][:, None]
        return SamplerOutput(
            parents=parents, tokens=tokens, drafts=torch.cat([tokens % 3 + 1, (tokens + 1) % 3 + 1], 1)
        )

    def accept(self, drafts, best, first):
        wrong = drafts != best
        earlier = wrong.cumsum(0) - wrong.long()
        return (wrong & (earlier == earlier[first][first.cumsum(0) - 1])).nonzero().flatten()


def make_part(factory, kind="samplers", spec=specs.SamplerSpec, **fields):
    made = spec(name="acme", help="h", factory=factory, **fields)
    return Part(kind=kind, spec=made, plugin="acme", distribution="acme", version="1.0")


class Kit(SamplerConformance):
    plugin = "acme"
    name = "acme"

    def params(self, part):
        return [SamplingParams(), SamplingParams(seed=3), SamplingParams(), SamplingParams(temperature=0.5)]


CHECKS = checks_of(SamplerConformance)


class FanKit(Kit):
    def params(self, part):
        return [FanParams(), FanParams(max_tokens=3), FanParams(n=2)]


GOOD_SAMPLERS = {
    "random": (Kit(), make_part(Random, params_type=SamplingParams)),
    "drafts": (Kit(), make_part(Drafts, params_type=SamplingParams, capabilities={"drafts", "greedy-invariant"})),
    "fan-out": (FanKit(), make_part(FanOut, params_type=FanParams, capabilities={"forks", "per-row-work"})),
}


def test_there_are_checks():
    assert len(CHECKS) == 20


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("sampler", GOOD_SAMPLERS)
def test_good_samplers_pass(sampler, check):
    kit, part = GOOD_SAMPLERS[sampler]
    try:
        getattr(kit, check)(part)
    except pytest.skip.Exception as skip:
        reasons = {
            "test_cost_of_a_step": "per-row-work",
            "test_greedy_is_the_most_likely": "greedy-invariant",
            "test_its_params_reach_it": "not installed",
        }
        assert reasons[check] in str(skip)  # noqa: PT017 (nothing else may be skipped)


def changed(**fields):
    """Random, with fields of its output replaced by functions of it."""

    class Changed(Random):
        def step(self, logits, metadata):
            output = super().step(logits, metadata)
            return attrs.evolve(output, **{name: change(output) for name, change in fields.items()})

    return Changed


class GlobalRandom(Random):
    def step(self, logits, metadata):
        tokens = torch.multinomial(logits.softmax(-1), 1)
        return SamplerOutput(parents=torch.arange(len(tokens)), tokens=tokens)


class ReadsItsRow(Random):
    """Salts randomness with the row's number, as naive code does."""

    def step(self, logits, metadata):
        salted = attrs.evolve(metadata, seeds=metadata.seeds + torch.arange(len(logits)))
        return super().step(logits, salted)


class ReadsNeighbours(Random):
    def step(self, logits, metadata):
        return super().step(logits - logits.amax(0, keepdim=True) * 0.5, metadata)


class CountsSteps(Random):
    """Counts its own steps instead of the row's position."""

    steps = 0

    def step(self, logits, metadata):
        self.steps += 1
        moved = attrs.evolve(metadata, positions=torch.full_like(metadata.positions, self.steps))
        return super().step(logits, moved)


class IgnoresMasks(Random):
    def step(self, logits, metadata):
        return super().step(logits.clamp_min(0.0), metadata)


class Forgets(Random):
    def remove_request(self, request_id):
        """Leave the entry where it is."""


class Crosses(Random):
    """Lets a row continue a later request's row."""

    def step(self, logits, metadata):
        output = super().step(logits, metadata)
        return attrs.evolve(output, parents=output.parents.flip(0))


class DropsEverything(Random):
    def finish(self, request):
        return []


class ReturnsTwice(Random):
    def finish(self, request):
        return list(request.finished) * 2


class Foreign(Random):
    def finish(self, request):
        return [make_request("foreign", SamplingParams()).open_sequence(99)]


class NoFinish:
    def __init__(self, context):
        """Offer only half the contract."""

    def step(self, logits, metadata):
        raise AssertionError


class BreaksInEngines(Random):
    def __init__(self, context):
        super().__init__(context)
        if context.config is not None:
            raise OSError


class Trusts(Drafts):
    """Keeps every guess."""

    def accept(self, drafts, best, first):
        return (drafts < 0).nonzero().flatten()


class Holds(Random):
    """Lets every row wait a step before it grows by one."""

    def step(self, logits, metadata):
        output = super().step(logits, metadata)
        waits = metadata.tags == 0
        return attrs.evolve(output, tokens=output.tokens.masked_fill(waits[:, None], -1), tags=waits.long())


SHAPE = "test_outputs_have_the_right_shape"
MUTANTS = {
    "tokens dtype": (changed(tokens=lambda o: o.tokens.int()), SHAPE, "tokens: int32"),
    "tokens flat": (changed(tokens=lambda o: o.tokens[:, 0]), SHAPE, "tokens: int64"),
    "too many tokens": (changed(tokens=lambda o: o.tokens.repeat(2, 1)), SHAPE, "rows for"),
    "parents dtype": (changed(parents=lambda o: o.parents.float()), SHAPE, "parents: float32"),
    "parents outside": (changed(parents=lambda o: o.parents + 1), SHAPE, "parents: .*outside"),
    "token outside": (changed(tokens=lambda o: o.tokens + 1000), SHAPE, "tokens: largest"),
    "no token": (changed(tokens=lambda o: o.tokens * 0 - 1), SHAPE, "no answer with a token"),
    "pad left": (
        changed(tokens=lambda o: torch.cat([o.tokens * 0 - 1, o.tokens], 1)),
        SHAPE,
        "only pad on the right",
    ),
    "logprobs dtype": (changed(logprobs=lambda o: o.tokens.double()), SHAPE, "logprobs: float64"),
    "logprobs positive": (changed(logprobs=lambda o: o.tokens * 0.0 + 1), SHAPE, "log probability is <= 0"),
    "logprobs nan": (changed(logprobs=lambda o: o.tokens * torch.nan), SHAPE, "not NaN"),
    "finished dtype": (changed(finished=lambda o: o.parents), SHAPE, "finished: int64"),
    "crosses requests": (Crosses, SHAPE, "adjacent and in request order"),
    "drops everything": (DropsEverything, SHAPE, "no answer"),
    "loses answers": (DropsEverything, "test_finish_returns_what_ended", "returned 0 of 1 ended"),
    "breaks in an engine": (BreaksInEngines, "test_blocks_come_back", "its factory fails in an engine"),
    "not the argmax": (Random, "test_greedy_is_the_most_likely", "not \\["),
    "drafts": (Drafts, "test_capabilities_are_declared", "'drafts' is not among"),
    "holds": (Holds, "test_capabilities_are_declared", "'holds' is not among"),
    "returns twice": (ReturnsTwice, SHAPE, "a sequence twice"),
    "foreign sequence": (Foreign, SHAPE, "not the request's own"),
    "global random": (GlobalRandom, "test_same_seed_gives_the_same_tokens", "same seeds differ"),
    "reads its row": (ReadsItsRow, "test_neighbours_do_not_matter", "reads its neighbours"),
    "reads neighbours": (ReadsNeighbours, "test_neighbours_do_not_matter", "reads its neighbours"),
    "depends on order": (ReadsItsRow, "test_order_does_not_matter", "changes tokens"),
    "counts steps": (CountsSteps, "test_late_arrival_does_not_matter", "joining a running batch"),
    "ignores masks": (IgnoresMasks, "test_masked_tokens_are_never_chosen", "masked tokens were chosen"),
    "keeps state": (Forgets, "test_ended_requests_leave_no_state", "still in seen"),
    "no finish": (NoFinish, "test_is_a_sampler", "lacks a method"),
}


@pytest.mark.parametrize("case", MUTANTS)
def test_a_bad_sampler_is_caught(case):
    sampler, check, message = MUTANTS[case]
    capabilities = {"greedy-invariant"} if check == "test_greedy_is_the_most_likely" else ()
    with pytest.raises(AssertionError, match=message):
        getattr(Kit(), check)(make_part(sampler, params_type=SamplingParams, capabilities=capabilities))


def test_unverified_drafts_are_caught():
    part = make_part(Trusts, params_type=SamplingParams, capabilities={"drafts", "greedy-invariant"})
    with pytest.raises(AssertionError, match=r"temperature=0\.0\): \[.*\], not \["):
        Kit().test_greedy_is_the_most_likely(part)


def test_a_row_that_was_streamed_is_not_dropped():
    @attrs.frozen(slots=True, kw_only=True)
    class Streamed(FanParams):
        """Three rows, and the promise that they stay."""

        @property
        def grows_in_place(self):
            return True

    class StreamedKit(Kit):
        def params(self, part):
            return [Streamed()] * 4

    part = make_part(FanOut, params_type=Streamed, capabilities={"forks"})
    with pytest.raises(AssertionError, match="dropped though grows_in_place is true"):
        type("StreamedKit", (Kit,), {"params": lambda _, part: [Streamed()] * 4})().test_params_keep_their_promises(
            part
        )


def test_a_check_that_shows_nothing_fails():
    class Short(Kit):
        def params(self, part):
            return [SamplingParams(max_tokens=1)] * 4

    with pytest.raises(AssertionError, match="memory was never short"):
        Short().test_preemption_does_not_matter(make_part(Random, params_type=SamplingParams))
    with pytest.raises(AssertionError, match="had always ended already"):
        Short().test_abort_leaves_nothing(make_part(Random, params_type=SamplingParams))


@pytest.mark.parametrize("unit", ["operators", "calls"])
def test_the_cost_of_a_step_is_a_count_and_stable(unit):
    part = make_part(Random, params_type=SamplingParams)
    costs = [Kit()._cost(part, SamplingParams(), 4, unit) for _ in range(3)]
    assert len({cost.count for cost in costs}) == 1
    assert costs[0].count > 10
    assert costs[0].rows == 12


def test_what_never_happens_is_skipped_with_the_reason():
    part = make_part(Random, params_type=SamplingParams, capabilities={"drafts"})
    with pytest.raises(pytest.skip.Exception, match="declared drafts, which never happened"):
        Kit().test_capabilities_are_declared(part)


class Reads(Random):
    """Wants a tokenizer and a second model, and forgets what it read only if told to."""

    def __init__(self, context):
        super().__init__(context)
        self.ends = context.tokenizer.eos_token_id
        self.model = context.side_model("small")

    def step(self, logits, metadata):
        keys = list(zip(metadata.request_ids, metadata.sequence_indices.tolist(), strict=True))
        output = super().step(logits + self.model.logits(keys, metadata.history), metadata)
        return attrs.evolve(output, finished=output.tokens[:, 0] == self.ends)

    def remove_request(self, request_id):
        super().remove_request(request_id)
        self.model.forget_request(request_id)


class Hoards(Reads):
    def remove_request(self, request_id):
        del self.seen[request_id]


def test_a_sampler_gets_what_it_declares():
    needs = {"needs-tokenizer", "needs-model"}
    Kit().test_neighbours_do_not_matter(make_part(Reads, capabilities=needs))
    Kit().test_abort_leaves_nothing(make_part(needing_history(Reads), capabilities=needs))
    for declared in needs:
        with pytest.raises((PluginError, AttributeError), match=r"eos_token_id|'small'"):
            Kit().test_is_a_sampler(make_part(Reads, capabilities={declared}))
    with pytest.raises(AssertionError, match=r"still in model\.keys"):
        Kit().test_ended_requests_leave_no_state(make_part(Hoards, capabilities=needs))


SECTION = '''
    import attrs
    from folo_core.plugins import hookimpl
    from folo_core.plugins.specs import ConfigSectionSpec

    @attrs.frozen(kw_only=True)
    class Section:
        guide: str = "none"

    @hookimpl
    def folo_config_sections():
        """Offer it."""
        return [ConfigSectionSpec(name="acme-section", help="h", section_type=Section)]
'''


def test_a_sampler_gets_the_configuration_that_its_examples_need(site):
    site.install("acme-section", SECTION)
    guides = []

    class Configured(Random):
        def __init__(self, context):
            super().__init__(context)
            guides.append(context.config.plugins["acme-section"].guide)

    part = make_part(Configured, example_sections={"acme-section": {"guide": "some"}})
    Kit().test_is_a_sampler(part)
    Kit().test_blocks_come_back(part)
    assert guides == ["some", "some"]


def needing_history(sampler):
    return type("NeedsHistory", (sampler,), {"needs_history": True})


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ({SamplingType.GREEDY}, {(1, 0.0)}),
        ({SamplingType.RANDOM}, {(1, 1.0), (1, 0.7)}),
        ({SamplingType.FAN_OUT}, {(3, 1.0), (4, 0.7)}),
        ((), {(1, 1.0)}),
    ],
)
def test_the_default_parameters_reach_the_sampler(kinds, wanted):
    chosen = trial_params(make_part(Random, sampling_types=kinds).spec)
    assert len(chosen) >= 4
    assert {(params.best_of, params.temperature) for params in chosen} == wanted
    assert {params.sampling_type for params in chosen} <= set(kinds or SamplingType)


def test_examples_are_tried():
    example = SamplingParams(max_tokens=2)
    assert example in trial_params(make_part(Random, examples=lambda: [example]).spec)


def test_capabilities_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    for name in SAMPLER_CAPABILITIES:
        assert f"| `{name}` |" in page


# --- params ----------------------------------------------------------------------------------------------------------


@attrs.define(slots=True, kw_only=True)
class Undocumented(SamplingParams):
    """Options."""

    depth: int = 3


@attrs.frozen(slots=True, kw_only=True)
class Unchecked(SamplingParams):
    """Options."""

    depth: int = 3
    """How deep."""


@attrs.frozen(slots=True, kw_only=True)
class Raises(SamplingParams):
    """Options."""

    depth: int = attrs.field(default=3, converter=int)
    """How deep."""


def refuse(value):
    if type(value) is not int:
        raise ParamsError(["nonsense"])
    return value


@attrs.frozen(slots=True, kw_only=True)
class Nameless(SamplingParams):
    """Options."""

    depth: int = attrs.field(default=3, converter=refuse)
    """How deep."""


@attrs.frozen(slots=True, kw_only=True)
class Required(SamplingParams):
    """Options."""

    depth: int
    """How deep."""


@pytest.mark.parametrize(
    ("params_type", "message"),
    [
        (Undocumented, "Undocumented.depth: put a docstring"),
        (Unchecked, "Unchecked.depth: .* was accepted: give the field a rule"),
        (Raises, "Raises.depth: .* raised TypeError: converters"),
        (Nameless, "Nameless.depth: .* does not name the field"),
        (Required, "Required.depth: give it a default"),
        (attrs.frozen(type("Alien", (), {"__annotations__": {}})), "must subclass SamplingParams"),
    ],
)
def test_a_bad_params_class_is_caught(params_type, message):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        Kit().test_params_are_sound(make_part(Random, params_type=params_type))


# --- whole plugins ---------------------------------------------------------------------------------------------------

GOOD = '''
    from folo_core.plugins import hookimpl
    from folo_core.plugins.specs import SchedulerSpec

    @hookimpl
    def folo_schedulers():
        """Offer acme."""
        return [SchedulerSpec(name="acme", help="A policy.", factory=print)]
'''


@pytest.fixture
def check_plugin(site, monkeypatch):
    def check(code: str, name: str) -> None:
        site.install("acme-checked", code)
        monkeypatch.setenv("PYTHONPATH", str(site.path), prepend=":")
        load_with.cache_clear()
        (site.path / "torch.py").write_text("")  # a stand-in for child processes: what counts is the name

        class Checked(PluginConformance):
            plugin = "acme-checked"

        fixed = [load_with("acme-checked")] if "registry" in getattr(Checked, name).__code__.co_varnames else []
        getattr(Checked(), name)(*fixed)

    yield check
    load_with.cache_clear()


@pytest.mark.parametrize("check", [name for name in vars(PluginConformance) if name.startswith("test_")])
def test_a_good_plugin_passes(check_plugin, check):
    check_plugin(GOOD, check)


@pytest.mark.parametrize(
    ("edit", "check", "message"),
    [
        (('help="A policy."', r'help="A\npolicy."'), "test_every_part_is_described", "use one line"),
        (('help="A policy."', 'help="x" * 200'), "test_every_part_is_described", "120 characters"),
        (("factory=print", "factory=print, capabilities={1}"), "test_every_part_is_described", "use strings"),
        (('"""Offer acme."""', ""), "test_every_hook_has_a_docstring", "folo_schedulers: add a docstring"),
        (('"""Offer acme."""', "import pickle"), "test_source_runs_no_code_from_data", "imports pickle"),
        (('"""Offer acme."""', "from dill import x"), "test_source_runs_no_code_from_data", "imports from dill"),
        (("factory=print", "factory=lambda: torch.load('x')"), "test_source_runs_no_code_from_data", "torch.load"),
        (
            ("factory=print", "factory=lambda f: f(trust_remote_code=True)"),
            "test_source_runs_no_code_from_data",
            "trust_remote_code",
        ),
        (("\n    @hookimpl", "    import torch\n    @hookimpl"), "test_import_is_light", "entry point imports torch"),
        (("@hookimpl", ""), "test_every_part_is_described", "is not marked"),
    ],
)
def test_a_bad_plugin_is_caught(check_plugin, edit, check, message):
    assert edit[0] in GOOD
    with pytest.raises(AssertionError, match=message):
        check_plugin(GOOD.replace(*edit), check)


def test_a_plugin_that_is_not_installed_is_named():
    with pytest.raises(AssertionError, match=r"plugin no_such_plugin .* is broken: ModuleNotFoundError"):
        load_with("no_such_plugin")


# --- logits processors -----------------------------------------------------------------------------------------------


class Penalty:
    """Takes 5 from the newest token."""

    argmax_invariant = False
    needs_history = True
    graph_safe = False

    def __init__(self, vocab_size, device):
        """Keep nothing."""

    def applies(self, params):
        return True

    def validate_params(self, params, vocab_size):
        """Accept everything."""

    def apply(self, logits, metadata):
        for row, history in enumerate(metadata.history):
            logits[row, history[-1]] -= 5
        return logits


class FalseArgmax(Penalty):
    argmax_invariant = True

    def apply(self, logits, metadata):
        return -logits


class Mixes(Penalty):
    def apply(self, logits, metadata):
        return logits - logits.mean()


class Idle(Penalty):
    def apply(self, logits, metadata):
        return logits


class Doubles(Penalty):
    def apply(self, logits, metadata):
        return super().apply(logits, metadata).double()


class MakesNaN(Penalty):
    def apply(self, logits, metadata):
        return logits * torch.nan


class Undeclared(Penalty):
    graph_safe = None


class NeverApplies(Penalty):
    def applies(self, params):
        return False


class ProcessorKit(LogitsProcessorConformance):
    plugin = "acme"
    name = "acme"

    def params(self):
        return [SamplingParams()] * 3


PROCESSOR_CHECKS = [name for name in vars(LogitsProcessorConformance) if name.startswith("test_")]


def processor_part(factory):
    return make_part(factory, "logits_processors", specs.LogitsProcessorSpec)


@pytest.mark.parametrize("check", PROCESSOR_CHECKS)
def test_a_good_processor_passes(check):
    getattr(ProcessorKit(), check)(processor_part(Penalty))


@pytest.mark.parametrize(
    ("processor", "check", "message"),
    [
        (FalseArgmax, "test_argmax_invariance_is_true", "the argmax changed"),
        (Mixes, "test_rows_are_independent", "differs when alone"),
        (Idle, "test_result_has_the_right_shape", "nothing was edited"),
        (Doubles, "test_result_has_the_right_shape", "float64"),
        (MakesNaN, "test_result_has_the_right_shape", "NaN"),
        (Undeclared, "test_declares_itself", "graph_safe: must be"),
        (NeverApplies, "test_declares_itself", "applies: must be True"),
    ],
)
def test_a_bad_processor_is_caught(processor, check, message):
    with pytest.raises(AssertionError, match=message):
        getattr(ProcessorKit(), check)(processor_part(processor))


# --- schedulers ------------------------------------------------------------------------------------------------------


class Fair:
    """First come, first served."""

    def __init__(self, config):
        """Keep nothing."""

    def order(self, request):
        return request.arrival

    def schedule(self, state, budget):
        planner = StepPlanner(state, budget, self.order)
        position = 0
        while position < len(state.running):
            if planner.extend(state.running[position]):
                position += 1
            else:
                planner.preempt(state.running[-1])
        while not planner.output.preempted and state.waiting and planner.admit(state.waiting.peek()):
            pass
        return planner.output


class Stalls(Fair):
    def schedule(self, state, budget):
        return SchedulerOutput()


class Overspends(Fair):
    def schedule(self, state, budget):
        return super().schedule(state, attrs.evolve(budget, max_num_batched_tokens=10**6, max_chunk_tokens=10**6))


class OverAdmits(Fair):
    def schedule(self, state, budget):
        return super().schedule(state, attrs.evolve(budget, max_num_seqs=100))


class Leaks(Fair):
    """Starts somebody over without giving the blocks back."""

    def schedule(self, state, budget):
        for request in state.running[1:]:
            request.live[0].block_table = None
            request.live[0].num_computed_tokens = 0
        return super().schedule(state, budget)


class SchedulerKit(SchedulerConformance):
    plugin = "acme"
    name = "acme"


@pytest.mark.parametrize("check", [name for name in vars(SchedulerConformance) if name.startswith("test_")])
def test_a_good_scheduler_passes(check):
    getattr(SchedulerKit(), check)(make_part(Fair, "schedulers", specs.SchedulerSpec))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Stalls, "a step runs nothing"),
        (Overspends, "step of .* tokens"),
        (OverAdmits, "sequences run"),
        (Leaks, "block"),
    ],
)
def test_a_bad_scheduler_is_caught(scheduler, message):
    with pytest.raises(Exception, match=message):
        SchedulerKit().test_everything_finishes_within_budget(make_part(scheduler, "schedulers", specs.SchedulerSpec))


# --- builders and strategies -----------------------------------------------------------------------------------------


def test_metadata_is_what_the_engine_would_build():
    params = [SamplingParams(top_k=3, seed=9), SamplingParams(temperature=0.0, logprobs=1), SamplingParams(top_p=0.5)]
    made = make_metadata(params, vocab_size=10, request_ids=["a", "b", "b"], histories=[[1, 2], [3], [3, 4, 5]])
    assert made.num_rows == 3
    assert made.top_k.tolist() == [3, 10, 10]
    assert made.seeds.tolist() == [9, 0, 0]
    assert made.sequence_indices.tolist() == [0, 0, 1]
    assert made.positions.tolist() == [2, 1, 3]
    assert made.temperature.dtype == made.top_p.dtype == made.min_p.dtype == torch.float32
    assert (made.all_greedy, made.any_top_k, made.any_top_p, made.any_min_p, made.need_logprobs) == (
        *(False, True, True, False, True),
    )
    assert make_metadata(params[1:2], vocab_size=10).all_greedy


def test_logits_depend_on_the_history_alone():
    assert torch.equal(logits_of([1, 2], 8), logits_of((1, 2), 8))
    assert not torch.equal(logits_of([1, 2], 8), logits_of([2, 1], 8))


@given(made=strategies.metadata(vocab_size=7), logits=strategies.logits(rows=5, vocab_size=7))
def test_a_generated_batch_can_be_sampled(made, logits):
    output = Random(make_context(vocab_size=7)).step(logits[: made.num_rows], made)
    check_sampler_output(output, made, 7)
    chosen = logits[: made.num_rows].gather(1, output.tokens)
    assert torch.isfinite(chosen).all()


def test_the_harness_reparents_as_the_output_says():
    request = make_request("r", SamplingParams(), prompt=[1])
    harness = SamplerHarness(
        FanOut(make_context(vocab_size=8)), 8, logits_of=lambda _history, size: torch.arange(size) * 1.0
    )
    harness.add(request)
    harness.step()
    assert [sequence.data.output_token_ids for sequence in request.live] == [[7], [6], [5]]
    assert [sequence.index for sequence in request.live] == [0, 1, 2]
    harness.step()
    assert [sequence.data.output_token_ids for sequence in request.live] == [[7, 7], [7, 6], [5, 5]]
    assert [sequence.index for sequence in request.live] == [0, 3, 2]
