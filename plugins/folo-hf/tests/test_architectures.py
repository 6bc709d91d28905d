"""Architectures through paged attention give transformers' own tokens; what cannot run is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, SMALL, VOCAB, PagedDecoder, make_loader, save_model
from transformers import AutoModelForCausalLM

from folo_core.errors import UnsupportedModelError
from folo_hf.native import NativeLinear, NativeMlp
from folo_hf.passes import FusedPart

PROMPTS = [[5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13], [40], list(range(10, 40))]
NEW_TOKENS = 12

WINDOWS = {
    "qwen2-sliding": [None, 8],
    "gemma2": [8, None],
    "gemma3": [8, None],
    "mistral": [8, 8],
    "phi3": [8, 8],
    "starcoder2": [8, 8],
}


def assert_same_greedy(reference, got_tokens, got_logits, prompt):
    """Tokens as transformers' generate, where no two candidates tie; logprobs of all positions within 1e-4."""
    ids = torch.tensor([prompt])
    wanted = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(got_logits), do_sample=False, eos_token_id=[]
    )[0].tolist()
    with torch.no_grad():
        own = reference(torch.tensor([got_tokens])).logits[0, len(prompt) - 1 : -1].float()
    torch.testing.assert_close(got_logits.cpu().log_softmax(-1), own.log_softmax(-1), rtol=0, atol=1e-4)
    best, second = own.topk(2).values.unbind(-1)
    clear = best - second > 1e-3
    assert clear.sum() > len(clear) / 2, "the weights leave too many ties for the comparison to mean anything"
    first_tie = len(clear) if clear.all() else int(clear.logical_not().nonzero()[0])
    assert got_tokens[: len(prompt) + first_tie] == wanted[: len(prompt) + first_tie]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(name, tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES[name]())
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    tokens, logits = PagedDecoder(model).run(PROMPTS, NEW_TOKENS)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, got, rows in zip(PROMPTS, tokens, logits, strict=True):
        assert rows.shape == (NEW_TOKENS, VOCAB)
        assert_same_greedy(reference, got, rows, prompt)


def test_what_the_loader_says_of_a_model(tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["deepseek-v3"]())
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    spec = model.kv_cache_specs[0]
    assert (spec.num_kv_heads, spec.head_size, spec.v_head_size, spec.dtype) == (4, 16, 12, torch.float32)
    assert model.info.architecture == "DeepseekV3ForCausalLM"
    assert model.info.kv_bytes_per_token == 2 * 4 * (16 + 12) * 4
    assert (model.info.num_layers, model.info.vocab_size, model.info.max_model_len) == (2, VOCAB, 128)
    assert (model.info.dtype, model.info.device, model.info.eos_token_ids) == ("float32", "cpu", (2,))
    assert model.info.num_parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_sliding_windows_reach_the_backend(name, tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES[name]())
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    decoder = PagedDecoder(model)
    seen = []
    inner = decoder.backend.forward

    def forward(layer, *args, **options):
        seen.append((layer, options["sliding_window"], options["softcap"]))
        return inner(layer, *args, **options)

    decoder.backend.forward = forward
    decoder.run([[1, 2, 3]], 1)
    softcap = 2.0 if name == "gemma2" else None
    assert seen == [(layer, window, softcap) for layer, window in enumerate(WINDOWS[name])]


def test_the_passes_are_in_what_was_compared(tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["llama"]())
    module = make_loader(folder, skip_tokenizer_init=True).load_model(None).module
    kinds = {type(child) for child in module.modules()}
    assert {NativeLinear, NativeMlp, FusedPart} <= kinds
    assert torch.nn.Linear not in kinds


def test_the_head_runs_for_wanted_rows_alone(tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["llama"]())
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    seen = []
    model.module.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    PagedDecoder(model).run([list(range(20)), [5]], 1, chunk=20)
    assert seen == [1, 1]


def test_a_class_that_cannot_choose_rows_gives_the_same_ones(tmp_path, monkeypatch):
    folder = save_model(tmp_path, ARCHITECTURES["llama"]())
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    wanted = PagedDecoder(model).run(PROMPTS, 3)
    inner = transformers.LlamaForCausalLM.forward

    def forward(self, input_ids, position_ids, use_cache, return_dict):
        return inner(self, input_ids, position_ids=position_ids, use_cache=use_cache, return_dict=return_dict)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    tokens, logits = PagedDecoder(model).run(PROMPTS, 3)
    assert tokens == wanted[0]
    torch.testing.assert_close(logits, wanted[1], rtol=0, atol=1e-5)


def test_two_models_in_one_process_do_not_mix(tmp_path):
    folders = [save_model(tmp_path / name, ARCHITECTURES[name]()) for name in ("llama", "qwen3")]
    alone = []
    for folder in folders:
        model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
        alone.append(PagedDecoder(model).run(PROMPTS, 4)[0])
    models = [make_loader(folder, skip_tokenizer_init=True).load_model(None) for folder in folders]
    decoders = [PagedDecoder(model) for model in models]
    assert [decoder.run(PROMPTS, 4)[0] for decoder in decoders] == alone
    assert alone[0] != alone[1]


def test_a_collected_model_leaves_no_name_behind(tmp_path):
    import gc

    from transformers import AttentionInterface

    folder = save_model(tmp_path, ARCHITECTURES["llama"]())
    before = set(AttentionInterface._global_mapping)
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    assert len(set(AttentionInterface._global_mapping) - before) == 1
    del model
    gc.collect()
    assert set(AttentionInterface._global_mapping) <= before


REFUSED_EARLY = {
    "t5": (transformers.T5Config, "T5|t5", "encoder-decoder"),
    "bart": (transformers.BartConfig, "Bart|bart", "encoder-decoder"),
    "mamba": (transformers.MambaConfig, "MambaForCausalLM", "recurrent state"),
    "jamba": (transformers.JambaConfig, "JambaForCausalLM", "recurrent state"),
    "recurrent-gemma": (transformers.RecurrentGemmaConfig, "RecurrentGemma", "recurrent state"),
    "rwkv": (transformers.RwkvConfig, "Rwkv", "recurrent state"),
    "qwen3-next": (transformers.Qwen3NextConfig, "Qwen3Next", "recurrent state"),
    "bloom": (transformers.BloomConfig, "BloomForCausalLM", "AttentionInterface"),
    "mpt": (transformers.MptConfig, "MptForCausalLM", "AttentionInterface"),
    "falcon": (transformers.FalconConfig, "FalconForCausalLM", "AttentionInterface"),
    "llama4": (transformers.Llama4TextConfig, "Llama4ForCausalLM", "chunked_attention"),
    "lfm2": (
        lambda: transformers.Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2),
        "Lfm2ForCausalLM",
        "conv",
    ),
    "minimax": (transformers.MiniMaxConfig, "MiniMaxForCausalLM", "linear_attention"),
    "vit": (transformers.ViTConfig, "vit", "no causal language model"),
}

REFUSED_BY_PROBE = {
    "gpt-oss": (lambda: transformers.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, sliding_window=8), "s_aux"),
    "bert": (lambda: transformers.BertConfig(**SMALL), "is_causal=False"),
    "doge": (lambda: transformers.DogeConfig(**SMALL), "attention_mask"),
    "diffllama": (lambda: transformers.DiffLlamaConfig(**SMALL), "once a step"),
}


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_refused_before_its_weights_are_looked_for(name, tmp_path):
    make_config, who, why = REFUSED_EARLY[name]
    make_config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"(?s)({who}).*{why}"):
        make_loader(tmp_path, skip_tokenizer_init=True).load_model(None)


@pytest.mark.parametrize("name", REFUSED_BY_PROBE)
def test_refused_by_what_it_does(name, tmp_path):
    make_config, why = REFUSED_BY_PROBE[name]
    folder = save_model(tmp_path, make_config())
    with pytest.raises(UnsupportedModelError, match=f"(?s)cannot run through paged attention.*{why}"):
        make_loader(folder, skip_tokenizer_init=True).load_model(None)


def test_a_checkpoint_without_a_language_model_head_is_refused(tmp_path, llama_config):
    llama_config.architectures = ["LlamaForSequenceClassification"]
    llama_config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForSequenceClassification.*no language model head"):
        make_loader(tmp_path, skip_tokenizer_init=True).load_model(None)


def test_the_probe_finds_mixing_between_sequences(tmp_path, llama_config, monkeypatch):
    """A layer that averages neighbours, as a convolution does, gives other logits when sequences are packed."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    inner = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: inner(self, x + x.roll(1, dims=1)))
    folder = save_model(tmp_path, llama_config)
    with pytest.raises(UnsupportedModelError, match="mixes tokens outside attention"):
        make_loader(folder, skip_tokenizer_init=True).load_model(None)


def test_the_probe_finds_ignored_positions(tmp_path, llama_config, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    inner = LlamaRotaryEmbedding.forward

    def forward(self, x, position_ids):
        return inner(self, x, torch.arange(position_ids.shape[1])[None])

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    folder = save_model(tmp_path, llama_config)
    with pytest.raises(UnsupportedModelError, match="ignores position ids"):
        make_loader(folder, skip_tokenizer_init=True).load_model(None)
