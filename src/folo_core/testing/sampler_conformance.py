"""What a sampler must do, over whole lives of requests: driven by hand, and in a real engine over a fake model."""

from __future__ import annotations

import functools
import random
from importlib import metadata as importlib_metadata
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest
import torch

from folo_core.errors import FoloError, ParamsError
from folo_core.plugins.fields import own_fields
from folo_core.plugins.hookspecs import PROJECT
from folo_core.plugins.manager import load_registry
from folo_core.sampling.interface import Sampler
from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import logits_of, make_context, make_request
from folo_core.testing.capabilities import SAMPLER_CAPABILITIES
from folo_core.testing.fakes import FakeModel
from folo_core.testing.harness import SamplerHarness, require
from folo_core.testing.installed import PartConformance, load_with
from folo_core.testing.trials import (
    EngineTrial,
    Meter,
    Watched,
    context_fields,
    difference,
    mentions,
    prompt_of,
    repeating_logits,
    trial_components,
    trial_params,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from folo_core.plugins.registry import Part, Registry

OPERATORS_MAY_GROW = 2.0
"""A step of 16 times as many rows may run at most this many times the torch operators."""
CALLS_PER_ROW = 32
"""And may call at most this many functions more for each row more."""
_MORE = 16
_MOST_REQUESTS = 32


class SamplerConformance(PartConformance):
    """A sampler keeps the contract of ``folo_core.sampling.interface.Sampler`` over whole lives of requests."""

    kind: ClassVar[str] = "samplers"
    steps: ClassVar[int] = 6

    def params(self, part: Part) -> list[SamplingParams]:
        """Parameters to try, one request each; by default the spec's ``examples`` and the defaults."""
        return trial_params(part.spec)

    def build(self, part: Part) -> Sampler:
        """A fresh sampler, with what its declared capabilities ask for."""
        fields = context_fields(part.spec, self.vocab_size)
        if part.spec.example_sections:
            fields["config"] = trial_components(FakeModel(), part).config
        sampler: Sampler = part.build(make_context(vocab_size=self.vocab_size, registry=_registry(part), **fields))
        return sampler

    def logits_of(self, part: Part) -> Callable[[Sequence[int], int], torch.Tensor]:
        """Stand-in for the model: random, but where tokens are drafted, a text that repeats itself."""
        return repeating_logits if "drafts" in part.spec.capabilities else logits_of

    def harness(self, part: Part, **fields: Any) -> SamplerHarness:  # noqa: ANN401 (the harness judges them)
        """Return a harness around a fresh sampler, or the given one."""
        given = {"sampler": None, "logits_of": self.logits_of(part)} | fields
        sampler = given.pop("sampler") or self.build(part)
        return SamplerHarness(sampler, self.vocab_size, **given)

    def outputs(self, part: Part, numbers: list[int], **harness: Any) -> dict[str, list[list[int]]]:  # noqa: ANN401 (the harness judges them)
        """Run the requests with these numbers together, in this order, in a fresh sampler."""
        params = self.params(part)
        requests = [make_request(f"r{n}", params[n], prompt=range(1, 2 + n)) for n in numbers]
        return self.harness(part, **harness).run(requests, self.steps)

    def numbers(self, part: Part) -> list[int]:
        """A number for each of ``params``."""
        return list(range(len(self.params(part))))

    def watch(self, part: Part) -> Watched:
        """Run all requests and return what was seen."""
        watched, params = Watched(self.build(part)), self.params(part)
        requests = [make_request(f"r{n}", params[n], prompt=range(1, 2 + n)) for n in self.numbers(part)]
        self.harness(part, sampler=watched).run(requests, self.steps)
        return watched

    # --- the parameters ---

    def test_params_are_sound(self, part: Part) -> None:
        """A params class of the strategy's own is frozen, documented, has defaults and refuses nonsense."""
        params_type = part.spec.params_type
        require(issubclass(params_type, SamplingParams), f"{params_type.__name__}: must subclass SamplingParams")
        require((params_type.__doc__ or "").strip(), f"{params_type.__name__}: add a docstring")
        for field in own_fields(params_type):
            where = f"{params_type.__name__}.{field['name']}"
            require(not field["required"], f"{where}: give it a default")
            require(field["doc"], f"{where}: put a docstring under it")
            for nonsense in (object(), float("nan"), [object()]):
                _require_refusal(params_type, field["name"], nonsense)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            params_type().temperature = 0.5

    def test_params_keep_their_promises(self, part: Part) -> None:
        """No more rows live than ``num_sequences``, and none is dropped where ``grows_in_place`` is true."""
        watched = self.watch(part)
        for number, params in enumerate(self.params(part)):
            most, dropped = watched.most.get(f"r{number}", 0), watched.pruned.get(f"r{number}", 0)
            require(
                most <= params.num_sequences,
                f"{params}: {most} rows lived at once, num_sequences says {params.num_sequences}: the engine reserves "
                "no more",
            )
            require(
                not (dropped and params.grows_in_place),
                f"{params}: a row was dropped though grows_in_place is true: its beginning has been streamed already",
            )

    def test_capabilities_are_declared(self, part: Part) -> None:
        """What it does to rows is among its capabilities, and what is declared happens."""
        watched, declared = self.watch(part), part.spec.capabilities
        does = {"forks": watched.seen["forks"] + watched.seen["prunes"]}
        does |= {name: watched.seen[name] for name in ("holds", "drafts")}
        for name, count in does.items():
            text = f"{name!r} is not among its capabilities, but happened {count} times"
            require(name in declared or not count, f"{text} ({SAMPLER_CAPABILITIES[name]})")
        idle = [name for name, count in does.items() if name in declared and not count]
        if idle:
            pytest.skip(f"declared {', '.join(idle)}, which never happened: give the spec examples that show it")

    # --- one sampler, driven by hand ---

    def test_is_a_sampler(self, part: Part) -> None:
        """The factory returns an object with the four methods."""
        require(isinstance(self.build(part), Sampler), "the factory's result lacks a method of Sampler")

    def test_outputs_have_the_right_shape(self, part: Part) -> None:
        """Every step's tensors keep the contract, and each request gets at least one answer that grew."""
        for name, answers in self.outputs(part, self.numbers(part)).items():
            require(answers and any(answers), f"{name}: no answer with a token after {self.steps} steps: {answers}")

    def test_finish_returns_what_ended(self, part: Part) -> None:
        """No answer is lost: of what ended, ``n`` at least are returned."""
        params, harness = self.params(part), self.harness(part)
        requests = [make_request(f"r{n}", params[n], prompt=range(1, 2 + n)) for n in self.numbers(part)]
        for request in requests:
            harness.add(request)
        for _ in range(self.steps):
            harness.step()
        for request in requests:
            answers, ended = harness.end(request), len(request.finished)
            wanted = min(request.params.n, ended)
            name = f"{request.request_id} ({request.params})"
            require(len(answers) >= wanted, f"{name}: finish returned {len(answers)} of {ended} ended, {wanted} wanted")

    def test_same_seed_gives_the_same_tokens(self, part: Part) -> None:
        """Two fresh samplers agree."""
        once, again = (self.outputs(part, self.numbers(part)) for _ in range(2))
        require(once == again, f"two runs with the same seeds differ: {difference(once, again, 'once', 'then')}")

    def test_neighbours_do_not_matter(self, part: Part) -> None:
        """A request gets the same tokens alone as in a batch."""
        numbers = self.numbers(part)
        together = self.outputs(part, numbers)
        alone = {name: tokens for n in numbers for name, tokens in self.outputs(part, [n]).items()}
        found = difference(alone, together, "alone", "in one batch")
        require(not found, f"{found}: a row reads its neighbours")

    def test_order_does_not_matter(self, part: Part) -> None:
        """A request gets the same tokens wherever its rows stand."""
        numbers = self.numbers(part)
        expected = self.outputs(part, numbers)
        shuffled = random.Random(7).sample(numbers, len(numbers))  # noqa: S311 (a shuffle)
        for order in (numbers[::-1], shuffled):
            found = difference(expected, self.outputs(part, order), f"in order {numbers}", f"in order {order}")
            require(not found, f"{found}: the order of requests changes tokens")

    def test_late_arrival_does_not_matter(self, part: Part) -> None:
        """A request that joins a running batch, which another one leaves, gets the tokens it gets alone."""
        params = self.params(part)
        harness = self.harness(part)
        early, late = make_request("early", params[0]), make_request("late", params[-1])
        harness.add(early)
        harness.step()
        harness.add(late)
        for step in range(self.steps):
            harness.step()
            if step == self.steps // 2:
                harness.end(early)
        expected = self.harness(part).run([make_request("late", params[-1])], self.steps)
        require(harness.end(late) == expected["late"], "joining a running batch changes tokens")

    def test_masked_tokens_are_never_chosen(self, part: Part) -> None:
        """A token whose logit is -inf has probability 0."""
        model = self.logits_of(part)

        def odd_masked(history: Sequence[int], vocab_size: int) -> torch.Tensor:
            logits = model(history, vocab_size)
            logits[1::2] = -torch.inf
            return logits

        outputs = self.outputs(part, self.numbers(part), logits_of=odd_masked)
        chosen = {token for answers in outputs.values() for answer in answers for token in answer}
        require(chosen and all(token % 2 == 0 for token in chosen), f"masked tokens were chosen: {sorted(chosen)}")

    def test_greedy_is_the_most_likely(self, part: Part) -> None:
        """At temperature 0 the best answer is what the model finds most likely, token by token."""
        if "greedy-invariant" not in part.spec.capabilities:
            pytest.skip("'greedy-invariant' is not among its capabilities")
        for number, params in enumerate(self.params(part)):
            model = self.logits_of(part)
            greedy, prompt = attrs.evolve(params, temperature=0.0), list(range(1, 3 + number))
            harness = self.harness(part)
            best = harness.run([make_request("greedy", greedy, prompt=prompt)], self.steps)["greedy"][0]
            expected = list(prompt)
            for _ in best:
                expected.append(int(model(expected, self.vocab_size).argmax()))
            require(best and best == expected[len(prompt) :], f"{greedy}: {best}, not {expected[len(prompt) :]}")

    def test_ended_requests_leave_no_state(self, part: Part) -> None:
        """After ``remove_request`` nothing is kept under the request's id, and the id can come again."""
        sampler = self.build(part)
        params = self.params(part)[0]
        first = self.harness(part, sampler=sampler).run([make_request("again", params)], self.steps)
        kept = mentions(sampler, "again")
        require(not kept, f"after remove_request the id is still in {kept[1:]}")
        second = self.harness(part, sampler=sampler).run([make_request("again", params)], self.steps)
        require(first == second, "the same request gives other tokens the second time")

    def test_cost_of_a_step(self, part: Part) -> None:
        """Sixteen times as many rows run hardly more torch operators, and few Python calls for each row more.

        Both are counted, not timed: a count is the same on every machine.
        """
        if "per-row-work" in part.spec.capabilities:
            pytest.skip("'per-row-work' is among its capabilities: it says that its steps work row by row")
        for params in dict.fromkeys(self.params(part)):
            few = max(1, 4 // params.num_sequences)
            one, many = (self._cost(part, params, count, "operators") for count in (few, _MORE * few))
            require(
                many.count <= OPERATORS_MAY_GROW * one.count,
                f"{params}: {one.count} torch operators for {one.rows} rows, {many.count} for {many.rows}: do the work "
                "of all rows in one operation",
            )
            one, many = (self._cost(part, params, count, "calls") for count in (few, _MORE * few))
            each = (many.count - one.count) / max(1, many.rows - one.rows)
            require(
                each <= CALLS_PER_ROW,
                f"{params}: {each:.0f} Python calls for each row ({one.count} for {one.rows} rows, {many.count} for "
                f"{many.rows}); at most {CALLS_PER_ROW}: do the work of all rows in one operation",
            )

    def _cost(self, part: Part, params: SamplingParams, count: int, unit: str) -> Meter:
        """Count the work of all steps but the first for equal requests, with nothing left to be imported."""
        seeded = attrs.evolve(params, seed=7)
        requests = [[make_request(f"{life}-{n}", seeded) for n in range(count)] for life in ("warm", "real")]
        meter, cached = Meter(self.build(part), unit), _cached(self.logits_of(part))
        for life in requests:
            harness = self.harness(part, sampler=meter, logits_of=cached)
            for request in life:
                harness.add(request)
            harness.step()
            meter.count = meter.rows = 0
            for _ in range(3):
                harness.step()
            for request in life:
                harness.end(request)
        return meter

    # --- in an engine ---

    def trial(self, part: Part, **options: Any) -> EngineTrial:  # noqa: ANN401 (EngineTrial judges them)
        """A fresh engine with a request for each of ``params``, not admitted yet."""
        return EngineTrial(part, self.params(part), **options)

    def test_its_params_reach_it(self, part: Part) -> None:
        """Beside all other installed plugins, an engine gives its requests to this sampler."""
        if not _is_installed(part):
            pytest.skip("it is not installed as a plugin")
        components = trial_components(FakeModel(), part)
        for params in self.params(part):
            try:
                found = components.sampler_for(params)
            except FoloError as error:
                raise AssertionError(f"{params}: {error}") from error
            require(found == part.qualified_name, f"{params}: goes to {found}, not to {part.qualified_name}")

    def test_blocks_come_back(self, part: Part) -> None:
        """In an engine all requests end without an error, books balance after each step, and the pool is whole."""
        answers = self.trial(part).add(self.numbers(part)).run().answers()
        for name, sequences in answers.items():
            require(sequences and any(sequences), f"{name}: no answer: {sequences}")

    def test_running_ahead_does_not_matter(self, part: Part) -> None:
        """Where steps are scheduled before the host has seen the last tokens, every answer stays the same.

        Only requests for which the sampler's ``steady_after`` promises something run ahead.
        """
        numbers = self.numbers(part)
        expected = self.trial(part).add(numbers).run().answers()
        ahead = self.trial(part, run_ahead=True).add(numbers).run()
        failed = [f"{name}: {output.error}" for name, output in ahead.final.items() if output.error is not None]
        require(not failed, f"running ahead ends requests in errors: {failed[:1]}: does steady_after promise too much?")
        found = difference(expected, ahead.answers(), "in step with the host", "ahead of it")
        require(not found, f"{found}: running ahead changes the answer: does steady_after promise too much?")

    def test_preemption_does_not_matter(self, part: Part) -> None:
        """Short of memory, so that requests are thrown out and computed anew, every answer stays the same."""
        for copies in (1, 2, 4, 8):
            params = (self.params(part) * copies)[:_MOST_REQUESTS]
            numbers = range(len(params))
            plenty = EngineTrial(part, params).add(numbers).run()
            short = EngineTrial(part, params, num_blocks=plenty.most_blocks()).add(numbers).run()
            found = difference(plenty.answers(), short.answers(), "with memory", "without")
            require(not found, f"{found}: preemption changes the answer: keep what a row needs in scores and tags")
            if any(output.metrics and output.metrics.num_preemptions for output in short.final.values()):
                return
        require(False, "memory was never short: this check has shown nothing: give the spec examples of longer answers")  # noqa: FBT003 (never true)

    def test_abort_leaves_nothing(self, part: Part) -> None:
        """A request aborted mid-way gives its blocks back within two steps and leaves no state; others go on."""
        numbers, aborted = self.numbers(part), 0
        expected = self.trial(part).add(numbers).run().answers()
        for steps in (1, 2, 4):
            trial = self.trial(part).add(numbers)
            for _ in range(steps):
                trial.step()
            aborted += "r0" in trial.engine.requests
            trial.engine.abort("r0")
            for _ in range(2):
                trial.step()
            kept = mentions(trial.sampler, "r0")
            require(not kept, f"aborted after {steps} steps, the request is still in the sampler's {kept[1:]}")
            answers = trial.run().answers()
            others = {name: answer for name, answer in expected.items() if name != "r0"}
            found = difference(others, answers, "before", "beside an aborted request")
            require(not found, f"{found}: an abort changes its neighbours")
        require(aborted, "the request had always ended already: this check has shown nothing")

    def test_nan_ends_one_request(self, part: Part) -> None:
        """A request whose logits hold NaN ends in an error, and its neighbours' answers do not change."""
        numbers = self.numbers(part)
        expected = self.trial(part).add(numbers).run().answers()
        for length in (0, 2):
            trial, poison = self.trial(part), _Poison(prompt_of(1), length)
            trial.model.edit_logits = poison
            trial.add(numbers).run()
            failed = trial.final.pop("r1")
            # It may have ended well before it was that long; after its prompt it always samples.
            require(poison.used or length, "the request with NaN in its logits was never sampled")
            require(failed.error or not poison.used, "a request with NaN in its logits ended without an error")
            found = difference(trial.answers(), expected, "beside a failed request", "before")
            require(not found, f"{found}: a neighbour's NaN changes the answer")


@attrs.define
class _Poison:
    """An edit of logits: NaN after this prompt and ``length`` tokens more."""

    prompt: list[int]
    length: int
    used: bool = False

    def __call__(self, logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
        most = len(self.prompt) + self.length
        bad = [row for row, past in enumerate(pasts) if past[0] == self.prompt[0] and len(past) >= most]
        self.used |= bool(bad)
        logits[bad] = torch.nan
        return logits


def _require_refusal(params_type: type[SamplingParams], name: str, nonsense: object) -> None:
    where = f"{params_type.__name__}.{name}: {nonsense!r}"
    try:
        params_type(**{name: nonsense})  # type: ignore[arg-type]  # that is the point
    except ParamsError as error:
        require(name in str(error), f"{where}: the error does not name the field: {error}")
    except Exception as error:
        raise AssertionError(
            f"{where}: raised {type(error).__name__}: converters pass on what they do not know, rules refuse it"
        ) from error
    else:
        require(False, f"{where}: was accepted: give the field a rule (metadata=) from folo_core.validation")  # noqa: FBT003 (never true)


def _is_installed(part: Part) -> bool:
    return bool(importlib_metadata.entry_points(group=PROJECT, name=part.plugin))


def _registry(part: Part) -> Registry:
    """All installed plugins, for what the sampler builds on."""
    return load_with(part.plugin) if _is_installed(part) else _all_installed()


@functools.cache
def _all_installed() -> Registry:
    return load_registry()


def _cached(model: Callable[[Sequence[int], int], torch.Tensor]) -> Callable[[Sequence[int], int], torch.Tensor]:
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def cached(history: Sequence[int], vocab_size: int) -> torch.Tensor:
        key = tuple(history)
        if key not in known:
            known[key] = model(key, vocab_size)
        return known[key]

    return cached
