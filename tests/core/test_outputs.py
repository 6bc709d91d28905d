"""Text on its way out: incremental detokenisation, stop strings, and what each output kind shows."""

from __future__ import annotations

from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines import greedy, make_engine, run
from folo_core.engine.detokenizer import MOST_PENDING, Detokenizer, find_stop_string, held_back
from folo_core.sampling_params import RequestOutputKind
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel


class ByteTokenizer:
    """A token per byte, like the last resort of byte-level tokenizers; id 256 is special and has no text."""

    eos_token_id = 256
    all_special_ids = [256]  # noqa: RUF012 (the protocol's plain attribute)
    calls = 0
    decoded = 0

    def __len__(self) -> int:
        return 257

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        self.calls += 1
        self.decoded += len(token_ids)
        pieces = b"".join(
            b"<s>" if t == 256 and not skip_special_tokens else bytes([t])
            for t in token_ids
            if t < 256 or not skip_special_tokens
        )
        return pieces.decode("utf-8", errors="replace")


class SpaceDroppingTokenizer(ByteTokenizer):
    """Drops the space at the start of every text it decodes, as sentencepiece tokenizers do."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens).removeprefix(" ")


def stream(tokenizer: Any, prompt: list[int], tokens: list[int]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=True)
    pieces = [detokenizer.append(token) for token in tokens]
    return [*pieces, detokenizer.flush()], detokenizer


@given(text=st.text(max_size=40), prompt=st.text(min_size=1, max_size=8))
def test_streamed_pieces_join_to_the_text(text: str, prompt: str) -> None:
    assume("\ufffd" not in text + prompt)
    pieces, detokenizer = stream(ByteTokenizer(), list(prompt.encode()), list(text.encode()))
    assert "".join(pieces) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in pieces), "no character is shown before it is whole"


@given(tokens=st.lists(st.integers(0, 256), max_size=60))
def test_any_bytes_at_all_stream_to_what_they_decode_to_as_a_whole(tokens: list[int]) -> None:
    pieces, detokenizer = stream(ByteTokenizer(), [65], tokens)
    assert "".join(pieces) == detokenizer.text
    whole = ByteTokenizer().decode([t for t in tokens if t != 256])
    if "\ufffd" not in whole:
        assert detokenizer.text == whole
    kept = [character for character in whole if character != "\ufffd"]
    assert [character for character in detokenizer.text if character != "\ufffd"] == kept or "\ufffd" in whole


def test_a_space_after_the_prompt_is_kept() -> None:
    pieces, _ = stream(SpaceDroppingTokenizer(), list(b"Hello"), list(b" world"))
    assert "".join(pieces) == " world"


def test_special_tokens_between_words_do_not_swallow_a_space() -> None:
    pieces, _ = stream(SpaceDroppingTokenizer(), list(b"Hello"), [*b" a", 256, 256, *b" b"])
    assert "".join(pieces) == " a b"


def test_bytes_that_never_make_a_character_are_shown_in_the_end() -> None:
    pieces, detokenizer = stream(ByteTokenizer(), [65], [0x80] * 20)
    assert detokenizer.text == "\ufffd" * 20
    assert pieces[MOST_PENDING - 1] != ""


@given(tokens=st.lists(st.integers(0, 256), max_size=60), looks=st.sets(st.integers(0, 59)), data=st.data())
def test_tokens_that_are_only_pushed_make_the_same_text_whenever_it_is_asked_for(
    tokens: list[int], looks: set[int], data: st.DataObject
) -> None:
    tokens = data.draw(st.sampled_from([tokens, list("Grüße, 😀 wörld! ".encode() * 3)]))
    tokenizer = data.draw(st.sampled_from([ByteTokenizer(), SpaceDroppingTokenizer()]))
    pieces, _ = stream(tokenizer, list(b"Hello"), tokens)
    lazy = Detokenizer(tokenizer, list(b"Hello"), skip_special_tokens=True)
    for place, token in enumerate(tokens):
        lazy.push(token)
        if place in looks:
            assert "".join(pieces[: place + 1]) == lazy.text
    lazy.flush()
    assert "".join(pieces) == lazy.text


def test_text_that_is_wanted_at_the_end_is_decoded_at_the_end() -> None:
    tokenizer = ByteTokenizer()
    lazy = Detokenizer(tokenizer, [65], skip_special_tokens=True)
    for token in b"x" * 3000:
        lazy.push(token)
    assert tokenizer.calls == 0
    assert lazy.text == "x" * 3000
    assert tokenizer.calls == 2, "the context, and the context with all that was pushed"


def test_a_streamed_token_takes_little_more_than_one_decoding() -> None:
    tokenizer = ByteTokenizer()
    stream(tokenizer, [65], list(b"x" * 1600))
    assert tokenizer.calls <= 1600 * 1.2


def test_detokenising_takes_linear_work() -> None:
    tokenizer = ByteTokenizer()
    stream(tokenizer, [65], list(b"x" * 3000) + [256] * 500 + [0x80] * 500)
    assert tokenizer.decoded < 4000 * 150
    assert tokenizer.calls <= 2 * 4000 + 2


@given(
    tokens=st.lists(st.integers(0, 255), max_size=20),
    cut=st.integers(0, 20),
    tails=st.tuples(st.binary(max_size=6), st.binary(max_size=6)),
)
def test_forked_detokenizers_go_their_own_ways(tokens: list[int], cut: int, tails: tuple[bytes, bytes]) -> None:
    parent = Detokenizer(ByteTokenizer(), [65], skip_special_tokens=True)
    for token in tokens[:cut]:
        parent.append(token)
    child = parent.fork()
    for token in tails[0]:
        parent.append(token)
    for token in tails[1]:
        child.append(token)
    for detokenizer, tail in ((parent, tails[0]), (child, tails[1])):
        detokenizer.flush()
        _, alone = stream(ByteTokenizer(), [65], [*tokens[:cut], *tail])
        assert detokenizer.text == alone.text


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_are_found_as_soon_as_they_are_complete_and_never_shown_before(text: str, stop: list[str]) -> None:
    shown = ""
    for end in range(1, len(text) + 1):
        found = find_stop_string(text[:end], 1, stop)
        expected = [s for s in stop if text[:end].endswith(s)]
        assert (found is not None) == bool(expected)
        if found is not None:
            assert found == (end - max(map(len, expected)), max(expected, key=len))
            assert text[: found[0]].startswith(shown), "nothing of a stop string was shown"
            return
        shown = text[: end - held_back(text[:end], stop)]


def _spelling_model(tokens: list[int]) -> FakeModel:
    """A model over bytes that says exactly these tokens, then spaces."""
    model = FakeModel(vocab_size=257, max_model_len=128)

    def edit(logits: Any, pasts: list[list[int]]) -> Any:
        for row, past in enumerate(pasts):
            place = len(past) - 1
            logits[row] = 0
            logits[row, tokens[place] if place < len(tokens) else 32] = 1
        return logits

    model.edit_logits = edit
    return model


def say(tokens: list[int], **fields: Any) -> tuple[list[Any], Any]:
    """Run one request over these tokens; return its streamed pieces and its final output."""
    outputs = {}
    for kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY):
        engine, _ = make_engine(_spelling_model(tokens), tokenizer=ByteTokenizer())
        params = greedy(**({"output_kind": kind, "max_tokens": len(tokens)} | fields))
        engine.add_request("a", [65], params)
        outputs[kind] = []
        while engine.has_unfinished_requests:
            outputs[kind] += engine.step()
    pieces = [output.outputs[0].text for output in outputs[RequestOutputKind.DELTA]]
    (final,) = outputs[RequestOutputKind.FINAL_ONLY]
    assert "".join(pieces) == final.outputs[0].text, "streamed text == final text"
    return pieces, final.outputs[0]


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    pieces, final = say(list(b"one two STOP three"), stop=["STOP"])
    assert final.text == "one two "
    assert (final.finish_reason, final.stop_reason) == ("stop", "STOP")
    assert bytes(final.token_ids) == b"one two STOP"
    assert not any("S" in piece for piece in pieces)


def test_a_false_start_of_a_stop_string_is_shown_once_it_is_over() -> None:
    _, final = say(list(b"STO no STOP"), stop=["STOP"])
    assert final.text == "STO no "


def test_the_stop_string_is_kept_when_asked_for() -> None:
    assert say(list(b"one STOP two"), stop="STOP", include_stop_str_in_output=True)[1].text == "one STOP"


def test_a_stop_string_amid_a_multi_byte_character_is_found() -> None:
    _, final = say(list("caf\u00e9 \U0001f600 rest".encode()), stop=["\U0001f600"])
    assert final.text == "caf\u00e9 "


def test_an_unfinished_character_at_the_limit_is_shown_as_a_replacement() -> None:
    tokens = list("ab\U0001f600".encode())[:4]
    _, final = say(tokens)
    assert final.text.startswith("ab")
    assert set(final.text[2:]) == {"\ufffd"}
    assert final.finish_reason == "length"


def test_a_stop_string_that_only_the_last_flush_completes_still_counts() -> None:
    _, final = say([*b"ab", 0xF0], stop=["\ufffd"])
    assert (final.text, final.finish_reason) == ("ab", "stop")


def test_min_tokens_holds_stop_strings_back() -> None:
    _, final = say(list(b"xSTOPySTOPz"), stop=["STOP"], min_tokens=8)
    assert final.text == "xSTOPy"


def test_a_stop_token_has_no_text_unless_asked_for() -> None:
    assert say(list(b"ab!c"), stop_token_ids=[33])[1].text == "ab"
    assert say(list(b"ab!c"), stop_token_ids=[33], include_stop_str_in_output=True)[1].text == "ab!"


def test_eos_ends_and_has_no_text() -> None:
    _, final = say([*b"ab", 256, *b"cd"])
    assert (final.text, final.finish_reason, final.stop_reason) == ("ab", "stop", None)
    assert final.token_ids == [*b"ab", 256]


def test_special_tokens_show_when_asked_for() -> None:
    _, final = say([*b"ab", 256, *b"cd"], ignore_eos=True, skip_special_tokens=False)
    assert final.text == "ab<s>cd"


def test_without_detokenising_there_is_no_text() -> None:
    _, final = say(list(b"abc"), detokenize=False)
    assert (final.text, bytes(final.token_ids)) == ("", b"abc")


def test_decoded_tokens_stand_beside_logprobs() -> None:
    _, final = say(list(b"hi"), logprobs=1)
    assert [next(iter(entry.values())).decoded_token for entry in final.logprobs] == ["h", "i"]
    assert [next(iter(entry.values())).rank for entry in final.logprobs] == [1, 1]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_streams_of_a_mixed_batch_join_to_their_final_texts(data: st.DataObject) -> None:
    engine, _ = make_engine(max_num_batched_tokens=16, max_num_seqs=4)
    reference, _ = make_engine()
    for place in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(st.lists(st.integers(0, FAKE_VOCAB - 2), min_size=1, max_size=12))
        stop = data.draw(st.lists(st.text("abcdefgh ", min_size=1, max_size=2), max_size=2))
        fields = {"max_tokens": 10, "stop": stop, "ignore_eos": True}
        engine.add_request(str(place), prompt, greedy(output_kind=RequestOutputKind.DELTA, **fields))
        reference.add_request(str(place), prompt, greedy(**fields))
    texts: dict[str, str] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            texts[output.request_id] = texts.get(output.request_id, "") + output.outputs[0].text
    assert texts == {name: output.outputs[0].text for name, output in run(reference).items()}
