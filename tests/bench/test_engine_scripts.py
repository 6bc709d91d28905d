"""The engines' scripts, with stand-ins for the engines: what they send, and in which order answers come back."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from folo_core.config import EngineConfig
from folo_core.errors import ConfigError
from workloads import WORKLOADS

ENGINES = Path(__file__).parents[2] / "bench" / "cpu" / "engines"


def script(name):
    spec = importlib.util.spec_from_file_location(f"engine_{name}", ENGINES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class LlamaApi:
    """llama.cpp's memory and batches: positions must follow each other, and a slot must be empty when it is taken."""

    def __init__(self):
        self.memory = defaultdict(list)
        self.most_live = 0
        self.copies = []
        self.outputs = {}

    def llama_get_memory(self, context):
        return self

    def llama_memory_clear(self, memory, data):
        self.memory.clear()

    def llama_memory_seq_rm(self, memory, slot, start, end):
        del self.memory[slot]

    def llama_memory_seq_cp(self, memory, source, target, start, end):
        assert not self.memory[target]
        self.memory[target] = list(self.memory[source])
        self.copies.append(target)

    def llama_decode(self, context, batch):
        self.outputs = {}
        for i in range(batch.n_tokens):
            slot = batch.seq_id[i][0]
            assert batch.pos[i] == len(self.memory[slot]), "a token follows the one before"
            self.memory[slot].append(batch.token[i])
            if batch.logits[i]:
                self.outputs[i] = slot
        self.most_live = max(self.most_live, sum(map(bool, self.memory.values())))
        return 0

    def llama_sampler_sample(self, sampler, context, place):
        """The next token counts how long the sequence is, so an answer shows what it was computed from."""
        return 1000 * self.memory[self.outputs[place]][0] + len(self.memory[self.outputs[place]])


def llama(workload, *, parallel, tokens):
    module = script("llamacpp")
    engine = module.LlamaCpp.__new__(module.LlamaCpp)
    engine._api = LlamaApi()
    engine._options = {"parallel": parallel, "tokens": tokens}
    room = 10_000
    batch = SimpleNamespace(
        n_tokens=0, token=[0] * room, pos=[0] * room, n_seq_id=[0] * room, logits=[0] * room,
        seq_id=[[0] for _ in range(room)],
    )  # fmt: skip
    engine._ready = {workload["name"]: ("context", batch, "sampler")}
    return engine, engine.run(workload)


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_llama_cpp_admits_requests_as_slots_become_free_and_answers_in_order(parallel):
    workload = {
        "name": "mixed",
        "kind": "greedy",
        "width": 1,
        "prompts": [[1] * 5, [2] * 3, [3] * 9, [4] * 2, [5] * 4],
        "new": [3, 1, 6, 2, 4],
    }
    engine, ids = llama(workload, parallel=parallel, tokens=12)
    wanted = [
        [1000 * prompt[0] + len(prompt) + step for step in range(new)]
        for prompt, new in zip(workload["prompts"], workload["new"], strict=True)
    ]
    assert ids == wanted
    assert engine._api.most_live <= parallel
    assert not any(engine._api.memory.values()), "memory is given back"


def test_llama_cpp_answers_the_quoted_workload_with_the_lengths_it_asks_for():
    engine, ids = llama(WORKLOADS["C1"].message(), parallel=8, tokens=512)
    assert [len(answer) for answer in ids] == WORKLOADS["C1"].new
    assert engine._api.most_live == 8


def test_llama_cpp_computes_a_prompt_once_for_all_its_samples():
    engine, ids = llama(WORKLOADS["C4"].message(), parallel=8, tokens=512)
    assert [len(answer) for answer in ids] == [64] * 8
    assert engine._api.copies == list(range(1, 8))
    assert len({tuple(answer) for answer in ids}) == 1, "the stand-in draws nothing"


class Batches:
    """Stands for an engine that answers static batches: notes them, and continues each prompt with its first id."""

    def __init__(self):
        self.sizes = []

    def generate(self, prompts, length, each):
        self.sizes.append((len(prompts), length))
        return [[prompt[0]] * length for prompt in prompts for _ in range(each)]


@pytest.mark.parametrize("size", [1, 8])
def test_static_batches_are_sorted_by_length_and_answers_put_back_in_order(size):
    module = script("transformers")
    engine = module.Generate.__new__(module.Generate)
    engine._options = {"batch": size}
    batches = Batches()
    engine._batch = lambda prompts, new, workload: batches.generate(prompts, new, 1)
    workload = WORKLOADS["C1"].message()
    answers = engine.run(workload)
    assert answers == [[prompt[0]] * new for prompt, new in zip(workload["prompts"], workload["new"], strict=True)]
    lengths = [length for _, length in batches.sizes]
    assert [count for count, _ in batches.sizes] == [size] * (32 // size)
    assert lengths == sorted(lengths), "a batch runs as long as its longest answer"


def test_all_samples_of_a_prompt_are_returned():
    module = script("transformers")
    engine = module.Generate.__new__(module.Generate)
    engine._options = {"batch": 1}
    batches = Batches()
    engine._batch = lambda prompts, new, workload: batches.generate(prompts, new, workload["width"])
    answers = engine.run(WORKLOADS["C4"].message())
    assert [len(answer) for answer in answers] == [64] * 8


def test_ctranslate2_gets_texts_of_tokens_and_gives_ids():
    module = script("ctranslate2")
    sent = []

    def generate_batch(prompts, **options):
        sent.append((prompts, options))
        ids = [[int(prompt[0].removeprefix("t"))] * options["max_length"] for prompt in prompts]
        return [SimpleNamespace(sequences_ids=[answer] * options.get("num_hypotheses", 1)) for answer in ids]

    engine = module.Generator.__new__(module.Generator)
    engine._options = {"batch": 8}
    engine._vocabulary = [f"t{i}" for i in range(49_000)]
    engine._generator = SimpleNamespace(generate_batch=generate_batch)
    engine._known = {}
    workload = WORKLOADS["C3"].message()
    engine.warm(workload)
    answers = engine.run(workload)
    assert answers == [[prompt[0]] * 64 for prompt in workload["prompts"]]
    prompts, options = sent[-1]
    assert prompts[0] == [f"t{i}" for i in workload["prompts"][0]]
    assert (options["beam_size"], options["length_penalty"]) == (4, 1.0)
    assert options["min_length"] == options["max_length"] == 64
    engine.warm(WORKLOADS["C4"].message())
    assert [len(answer) for answer in engine.run(WORKLOADS["C4"].message())] == [64] * 8


class Manager:
    """Stands for transformers' batching manager: finishes requests in reverse order."""

    def __init__(self, children):
        self.children = children
        self.results = []

    def add_request(self, prompt, max_new_tokens, eos_token_id):
        name = f"req_{len(self.results)}"
        names = [name, *(f"{name}__child#{child}" for child in range(self.children))]
        self.results += [(each, [prompt[0]] * max_new_tokens) for each in names]
        return name

    def get_result(self, timeout):
        name, ids = self.results.pop()
        return SimpleNamespace(request_id=name, generated_tokens=ids, error=None, is_finished=lambda: True)


@pytest.mark.parametrize(("name", "answers"), [("C1", 32), ("C4", 8)])
def test_continuous_batching_gathers_answers_in_the_order_of_requests(name, answers):
    module = script("transformers_cb")
    workload = WORKLOADS[name].message()
    found = module.ContinuousBatching._answers(Manager(answers - 1 if name == "C4" else 0), workload)
    assert len(found) == answers
    if name == "C1":
        assert found == [[p[0]] * new for p, new in zip(workload["prompts"], workload["new"], strict=True)]


def test_folo_says_why_when_it_has_no_low_bit_weights(monkeypatch):
    def refuse(**options):
        raise ConfigError(f"{sorted(options)}: unknown")

    monkeypatch.setattr(EngineConfig, "from_options", refuse)
    with pytest.raises(NotImplementedError, match=r"this version of Folo refuses it: \['model', 'quantization'\]"):
        script("folo").Folo._quantised({"weights": "nowhere", "quantization": "int4"})
    assert script("folo").Folo._quantised({"weights": "nowhere"}) == {}
