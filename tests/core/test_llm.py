"""The offline face: shapes of prompts, parameters for each, order, streaming, chat, errors and interruption."""

from __future__ import annotations

from typing import Any

import pytest

from engines import SamplerPlugin, TemplateTokenizer, TreeParams, TreeSampler, assert_clean, greedy, make_llm
from folo_core import LLM, SamplingParams
from folo_core.config import EngineConfig
from folo_core.errors import ConfigError, FoloError, ParamsError, RequestError
from folo_core.plugins.manager import load_registry
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer


def test_every_shape_of_prompt_is_understood() -> None:
    llm = make_llm()
    text, ids = "hello", FakeTokenizer().encode("hello")
    shapes: list[Any] = [
        text,
        {"prompt": text},
        {"prompt_token_ids": ids},
        ids,
        {"prompt": text, "prompt_token_ids": ids},
    ]
    singles = [llm.generate(shape, greedy())[0] for shape in shapes]
    batch = llm.generate(shapes, greedy())
    for output in (*singles, *batch):
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == batch[0].outputs[0].token_ids
    assert [o.prompt for o in batch] == [text, text, None, None, text]
    assert llm.generate([], greedy()) == []


def test_outputs_come_in_the_prompts_order_with_their_own_parameters() -> None:
    model = FakeModel()
    llm = make_llm(model, max_num_seqs=2)
    lengths = [9, 1, 5, 2]
    outputs = llm.generate([[i] for i in range(4)], [greedy(max_tokens=n, ignore_eos=True) for n in lengths])
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert [o.prompt_token_ids for o in outputs] == [[0], [1], [2], [3]]


def test_default_parameters_are_vllms() -> None:
    (output,) = make_llm().generate([[1]])
    assert len(output.outputs[0].token_ids) <= 16


def test_a_wrong_number_of_parameters_is_refused() -> None:
    with pytest.raises(RequestError, match="sampling_params: 1 given for 2 prompts"):
        make_llm().generate(["a", "b"], [greedy()])
    with pytest.raises(RequestError, match="priority: 3 given for 2 prompts"):
        make_llm().generate(["a", "b"], greedy(), priority=[1, 2, 3])


def test_one_bad_prompt_refuses_the_batch_before_anything_runs() -> None:
    llm = make_llm()
    with pytest.raises(RequestError):
        llm.generate(["fine", ""], greedy())
    with pytest.raises(ParamsError):
        llm.generate(["fine", "fine"], [greedy(), greedy(logprobs=10**6)])
    assert llm.engine.step_count == 0
    assert_clean(llm.engine)


def test_a_request_that_fails_alone_leaves_the_others_complete() -> None:
    class Broken(TreeSampler):
        def step(self, logits: Any, metadata: Any) -> Any:
            message = "broken"
            raise RuntimeError(message)

    llm = make_llm(plugins=[SamplerPlugin(Broken())])
    good, bad = llm.generate([[1], [2]], [greedy(), TreeParams(max_tokens=3)])
    assert good.error is None
    assert "broken" in str(bad.error)


def test_ctrl_c_aborts_what_was_running_and_the_next_call_works() -> None:
    model = FakeModel()
    llm = make_llm(model)
    calls = []

    def interrupt(_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], greedy(ignore_eos=True))
    assert_clean(llm.engine)
    assert llm.generate([[1, 2]], greedy())[0].outputs[0].token_ids == model.expected_tokens([1, 2], 8)


def test_streaming_yields_pieces_that_join_to_the_whole() -> None:
    llm = make_llm()
    pieces = list(llm.stream("hello", greedy(max_tokens=6, ignore_eos=True)))
    assert len(pieces) == 6
    whole = llm.generate("hello", greedy(max_tokens=6, ignore_eos=True))[0].outputs[0].text
    assert "".join(p.outputs[0].text for p in pieces) == whole


def test_a_stream_loses_nothing_while_others_are_generated() -> None:
    model = FakeModel()
    llm = make_llm(model)
    params = greedy(max_tokens=6, ignore_eos=True)
    streams = [llm.stream({"prompt_token_ids": prompt}, params) for prompt in ([1, 2], [3])]
    pieces = [[next(stream)] for stream in streams]
    llm.generate([[5, 6]], greedy(max_tokens=20, ignore_eos=True))
    assert not llm.engine.requests, "both have ended meanwhile"
    for got, stream in zip(pieces, streams, strict=True):
        got += list(stream)
    alone = [llm.generate([prompt], params)[0].outputs[0] for prompt in ([1, 2], [3])]
    for got, whole in zip(pieces, alone, strict=True):
        assert [token for piece in got for token in piece.outputs[0].token_ids] == whole.token_ids
        assert "".join(piece.outputs[0].text for piece in got) == whole.text
        assert got[-1].finished
    assert not llm._kept
    assert not llm._open


def test_leaving_a_stream_early_aborts_it() -> None:
    llm = make_llm()
    stream = llm.stream("hello", greedy(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    assert_clean(llm.engine)


def test_results_can_be_taken_as_they_finish() -> None:
    llm = make_llm()
    lengths = [8, 1, 4]
    params = [greedy(max_tokens=n, ignore_eos=True) for n in lengths]
    assert [place for place, _ in llm.generate_as_finished([[1], [2], [3]], params)] == [1, 2, 0]


def test_chat_lays_conversations_out_by_the_template() -> None:
    llm = make_llm(tokenizer=TemplateTokenizer())
    hello = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(hello, greedy())
    assert one.prompt == "user: hi / assistant: "
    two = llm.chat([hello, [*hello, {"role": "assistant", "content": "yo"}]], greedy(), add_generation_prompt=False)
    assert [o.prompt for o in two] == ["user: hi / ", "user: hi / assistant: yo / "]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user"}], "messages\\[0\\]"),
        ([{"content": "x"}], "messages\\[0\\]"),
        ([{"role": "user", "content": "boom"}], "roles must alternate"),
    ],
)
def test_messages_the_template_cannot_take_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_llm(tokenizer=TemplateTokenizer()).chat(messages, greedy())


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(RequestError, match="chat_template"):
        make_llm().chat([{"role": "user", "content": "hi"}], greedy())


def test_a_skipped_tokenizer_is_named_when_it_is_needed() -> None:
    plugin = FakePlugin(FakeModel(), None)
    config = EngineConfig.from_options(
        model="fake", loader="fake", attention="fake", num_blocks=64, skip_tokenizer_init=True
    )
    llm = LLM.from_config(config, load_registry(extra=[plugin]))
    with pytest.raises(FoloError, match="skip_tokenizer_init"):
        llm.get_tokenizer()
    assert llm.generate([[1, 2]], SamplingParams(max_tokens=2))[0].outputs[0].text == ""


def test_every_bad_option_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("demo", dtpe="float32", max_num_seqs=0, seed="x")
    assert len(caught.value.problems) == 3


def test_a_terminal_shows_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    llm = make_llm()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    llm.generate(["a", "b"], greedy())
    llm.generate(["a", "b"], greedy(), use_tqdm=False)
    assert "2/2" in capsys.readouterr().err
