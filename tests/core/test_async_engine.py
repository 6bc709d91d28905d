"""The online face: streams, concurrency, cancellation, shutdown and failure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engines import SchedulerPlugin, TreeSampler, assert_clean, greedy
from folo_core import AsyncEngine
from folo_core.errors import EngineDeadError, ParamsError, RequestError
from folo_core.sampling_params import RequestOutputKind
from folo_core.testing.fakes import FakeModel, fake_components

LONG = {"max_tokens": 200, "ignore_eos": True}


def drive(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def collect(engine: AsyncEngine, prompt: Any, params: Any, request_id: str | None = None) -> list[Any]:
    return [output async for output in engine.generate(prompt, params, request_id)]


async def settled(engine: AsyncEngine) -> None:
    """Wait until the engine has nothing left to do."""
    while engine.engine.requests or engine._streams:
        await asyncio.sleep(0.005)


def test_many_callers_get_their_own_tokens() -> None:
    model = FakeModel()

    async def scenario() -> None:
        async with AsyncEngine(fake_components(model, max_num_seqs=4)) as engine:
            prompts = [[i, i + 1] for i in range(12)]
            results = await asyncio.gather(*(collect(engine, p, greedy()) for p in prompts))
            for prompt, outputs in zip(prompts, results, strict=True):
                assert outputs[-1].finished
                assert outputs[-1].outputs[0].token_ids == model.expected_tokens(prompt, 8)
            await settled(engine)
            assert_clean(engine.engine)

    drive(scenario())


def test_a_slow_reader_loses_no_delta() -> None:
    model = FakeModel()

    async def scenario() -> None:
        async with AsyncEngine(fake_components(model)) as engine:
            tokens: list[int] = []
            params = greedy(max_tokens=30, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
            async for output in engine.generate([1, 2], params):
                tokens += output.outputs[0].token_ids
                await asyncio.sleep(0.003)
            reference = [o async for o in engine.generate([1, 2], greedy(max_tokens=30, ignore_eos=True))]
            assert tokens == reference[-1].outputs[0].token_ids

    drive(scenario())


def test_bad_requests_are_refused_to_their_caller_alone() -> None:
    async def scenario() -> None:
        async with AsyncEngine(fake_components()) as engine:
            with pytest.raises(RequestError):
                await collect(engine, [], greedy())
            with pytest.raises(ParamsError):
                await collect(engine, [1], greedy(logprobs=10**6))
            running = asyncio.ensure_future(collect(engine, [1], greedy(**LONG), "same"))
            while "same" not in engine._streams:
                await asyncio.sleep(0.001)
            with pytest.raises(RequestError, match="same"):
                await collect(engine, [1], greedy(), "same")
            assert (await running)[-1].outputs[0].finish_reason == "length"

    drive(scenario())


def test_leaving_a_stream_early_aborts_the_request() -> None:
    async def scenario() -> None:
        async with AsyncEngine(fake_components()) as engine:
            stream = engine.generate([1], greedy(**LONG))
            assert not (await anext(stream)).finished
            await stream.aclose()
            await settled(engine)
            assert_clean(engine.engine)

    drive(scenario())


def test_cancelling_a_caller_aborts_the_request() -> None:
    async def scenario() -> None:
        async with AsyncEngine(fake_components()) as engine:
            task = asyncio.ensure_future(collect(engine, [1], greedy(**LONG), "x"))
            while "x" not in engine._streams:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(engine)
            assert_clean(engine.engine)

    drive(scenario())


def test_abort_from_elsewhere_ends_the_stream_with_abort() -> None:
    async def scenario() -> None:
        async with AsyncEngine(fake_components()) as engine:
            seen = []
            async for output in engine.generate([1], greedy(**LONG), "x"):
                seen.append(output)
                if len(seen) == 2:
                    await engine.abort("x")
                    await engine.abort("x")
            assert seen[-1].outputs[0].finish_reason == "abort"
            assert_clean(engine.engine)

    drive(scenario())


def test_shutdown_ends_running_streams_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        engine = AsyncEngine(fake_components())
        task = asyncio.ensure_future(collect(engine, [1], greedy(**LONG), "x"))
        while "x" not in engine._streams:
            await asyncio.sleep(0.001)
        await engine.shutdown()
        assert (await task)[-1].outputs[0].finish_reason == "abort"
        assert not engine.is_alive
        with pytest.raises(EngineDeadError, match="stopped"):
            await collect(engine, [1], greedy())
        await engine.shutdown()

    drive(scenario())


def test_an_engine_that_dies_tells_every_reader_why() -> None:
    class Dying:
        def order(self, request: Any) -> Any:
            return request.arrival

        def schedule(self, state: Any, budget: Any) -> Any:
            raise SystemExit(3)

    async def scenario() -> None:
        engine = AsyncEngine(fake_components(plugins=[SchedulerPlugin(Dying())], policy="test"))
        with pytest.raises(EngineDeadError) as caught:
            await collect(engine, [1], greedy())
        assert isinstance(caught.value.__cause__, SystemExit)
        with pytest.raises(EngineDeadError, match="failed"):
            await collect(engine, [1], greedy())

    drive(scenario())


def test_a_failing_request_ends_its_own_stream_with_the_error() -> None:
    from engines import SamplerPlugin, TreeParams

    class Broken(TreeSampler):
        def step(self, logits: Any, metadata: Any) -> Any:
            message = "broken"
            raise RuntimeError(message)

    async def scenario() -> None:
        async with AsyncEngine(fake_components(plugins=[SamplerPlugin(Broken())])) as engine:
            good, bad = await asyncio.gather(
                collect(engine, [1], greedy()), collect(engine, [1], TreeParams(max_tokens=5))
            )
            assert good[-1].outputs[0].finish_reason in ("stop", "length")
            assert bad[-1].outputs[0].finish_reason == "error"
            assert "broken" in str(bad[-1].error)

    drive(scenario())
