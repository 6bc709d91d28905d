"""Tokenizers are given what they lack, and padded batches are padded on the left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, save_model, save_tokenizer
from transformers import AutoModelForCausalLM

from folo_core.execution.loading import Tokenizer
from folo_hf.batch import prepare_batch
from folo_hf.tokenizer import PAD_TOKEN, load_tokenizer


def test_pad_comes_from_eos(tmp_path, caplog):
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")  # noqa: S106
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == VOCAB - 1
    assert len(tokenizer) == VOCAB
    assert tokenizer.padding_side == "left"
    assert "no pad token" in caplog.text


def test_pad_is_added_where_there_is_no_eos(tmp_path, caplog):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == PAD_TOKEN
    assert tokenizer.pad_token_id == VOCAB
    assert len(tokenizer) == VOCAB + 1
    for text in ("no bos token", "no eos token", "neither pad nor eos"):
        assert text in caplog.text


def test_a_whole_tokenizer_is_left_alone(tmp_path, caplog):
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>", pad_token="<unk>")  # noqa: S106
    assert load_tokenizer(tmp_path).pad_token_id == VOCAB - 3
    assert not caplog.text


def test_it_is_what_the_core_calls(tmp_path):
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")  # noqa: S106
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("w3 w5 nonsense") == [3, 5, VOCAB - 3]
    assert tokenizer.decode([3, VOCAB - 1]) == "w3 </s>"
    assert tokenizer.decode([3, VOCAB - 1], skip_special_tokens=True) == "w3"
    assert set(tokenizer.all_special_ids) >= {VOCAB - 1, VOCAB - 2}


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6))
def test_padded_batch(sequences):
    batch = prepare_batch(sequences, pad_token_id=77)
    width = max(map(len, sequences))
    for row, sequence in enumerate(sequences):
        padding = width - len(sequence)
        assert batch.input_ids[row].tolist() == [77] * padding + sequence
        assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(sequence)
        assert batch.position_ids[row].tolist() == [0] * padding + list(range(len(sequence)))


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pad_is_refused(sequences):
    with pytest.raises(ValueError, match="sequences"):
        prepare_batch(sequences, 0)


def test_left_padding_keeps_each_rows_next_token(tmp_path, llama_config):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, llama_config)).eval()
    sequences = [[5, 9, 33], [40], list(range(10, 30))]
    batch = prepare_batch(sequences, pad_token_id=0)
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits[:, -1]
        alone = torch.stack([model(torch.tensor([sequence])).logits[0, -1] for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
