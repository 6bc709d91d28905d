"""A native stack of layers equals the same layers written out plainly in float64."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from torch.nn import functional

from folo_kernels import library as native
from folo_kernels.decoder import DecoderStack, LayerWeights
from folo_kernels.matrix import Epilogue, Format, PackedMatrix, Plain
from folo_kernels.store import BlockStore, LayerShape, PackedStep

pytestmark = pytest.mark.usefixtures("library")

BLOCK = 4
CHUNKS = [[9, 1, 1], [1, 6, 1], [23, 1, 4]]
"""Tokens of three sequences in three steps."""


@attrs.frozen
class Design:
    hidden: int = 40
    heads: int = 4
    kv_heads: int = 2
    size: int = 12
    rotary: int = 12
    feed: int = 50
    layers: int = 3
    gate: Epilogue = Epilogue.SILU_GATE
    sandwich: bool = False
    head_norms: bool = False
    bias: bool = False
    windows: tuple[int | None, ...] = (None, None, None)
    softcap: float | None = None
    scale: float = 0.3
    epsilon: float = 1e-5
    weights: Format = Format.FLOAT32


DESIGNS = {
    "llama": Design(),
    "qwen2": Design(bias=True, heads=6, kv_heads=1),
    "qwen3": Design(head_norms=True, size=17, rotary=16),
    "gemma": Design(gate=Epilogue.GELU_TANH_GATE, sandwich=True, softcap=3.0, windows=(5, None, 2), epsilon=1e-2),
    "gemma3": Design(gate=Epilogue.GELU_TANH_GATE, sandwich=True, head_norms=True, windows=(3, 3, None)),
    "partly-turned": Design(rotary=6, heads=2, kv_heads=2, hidden=33, feed=7),
    "wide": Design(hidden=136, heads=8, kv_heads=4, size=64, rotary=64, feed=200, layers=2, windows=(None, 8)),
    "8-bits": Design(weights=Format.INT8),
    "4-bits": Design(weights=Format.INT4, gate=Epilogue.GELU_TANH_GATE, bias=True),
}


def made_layer(design):
    """One layer, and its weights as they are stored."""

    def linear(outputs, inputs):
        bias = torch.randn(outputs) * 0.3 if design.bias else None
        return Plain(torch.randn(outputs, inputs) * inputs**-0.5, bias)

    def norm(size, wanted=True):  # noqa: FBT002 (short)
        return torch.rand(size) + 0.5 if wanted else None

    queries, keys = design.heads * design.size, design.kv_heads * design.size
    parts = {
        "qkv": [linear(width, design.hidden) for width in (queries, keys, keys)],
        "out": [linear(design.hidden, queries)],
        "gate_up": [linear(design.feed, design.hidden) for _ in range(2)],
        "down": [linear(design.hidden, design.feed)],
    }
    matrices = {name: PackedMatrix(linears, design.weights, gated=name == "gate_up") for name, linears in parts.items()}
    stored = {
        name: [Plain(weight, part.bias) for weight, part in zip(matrices[name].plain(), linears, strict=True)]
        for name, linears in parts.items()
    }
    norms = {
        "input_norm": norm(design.hidden),
        "feed_norm": norm(design.hidden),
        "query_norm": norm(design.size, design.head_norms),
        "key_norm": norm(design.size, design.head_norms),
        "attention_norm": norm(design.hidden, design.sandwich),
        "output_norm": norm(design.hidden, design.sandwich),
    }
    return matrices, norms, stored


def rotary(design, positions):
    """Cosines and sines ``[tokens, rotary]``; the halves differ, as nothing says that they must not."""
    rates = torch.linspace(1.0, 0.01, design.rotary)
    angles = positions[:, None] * rates
    return angles.cos(), angles.sin()


def normed(x, weight, epsilon):
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def applied(plain, x):
    return functional.linear(x, plain.weight.double(), None if plain.bias is None else plain.bias.double())


def turned(x, cosine, sine):
    size = cosine.shape[1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    cosine, sine = cosine.double()[:, None], sine.double()[:, None]
    swapped = torch.cat([-second, first], -1)
    return torch.cat([x[..., :size] * cosine + swapped * sine, x[..., size:]], -1)


def plain_layer(design, index, norms, stored, x):
    """One layer over a whole sequence ``[tokens, hidden]``."""
    positions = torch.arange(len(x))
    h = normed(x, norms["input_norm"], design.epsilon)
    q, k, v = (applied(plain, h).unflatten(-1, (-1, design.size)) for plain in stored["qkv"])
    cosine, sine = rotary(design, positions.float())
    q = turned(normed(q, norms["query_norm"], design.epsilon), cosine, sine)
    k = turned(normed(k, norms["key_norm"], design.epsilon), cosine, sine)
    k, v = (each.repeat_interleave(design.heads // design.kv_heads, 1) for each in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * design.scale
    if design.softcap is not None:
        scores = torch.tanh(scores / design.softcap) * design.softcap
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= (design.windows[index] or len(x)))
    attended = torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    x = x + normed(applied(stored["out"][0], attended.flatten(1)), norms["attention_norm"], design.epsilon)
    gate, up = (applied(plain, normed(x, norms["feed_norm"], design.epsilon)) for plain in stored["gate_up"])
    silu = design.gate == Epilogue.SILU_GATE
    act = functional.silu(gate) if silu else functional.gelu(gate, approximate="tanh")
    return x + normed(applied(stored["down"][0], act * up), norms["output_norm"], design.epsilon)


class Run:
    """A stack, three sequences with random inputs, and what each should become."""

    def __init__(self, design):
        torch.manual_seed(7)
        self.design = design
        layers = [made_layer(design) for _ in range(design.layers)]
        lengths = [sum(chunks) for chunks in CHUNKS]
        self.inputs = [torch.randn(length, design.hidden) for length in lengths]
        self.wanted = []
        for x in self.inputs:
            wide = x.double()
            for index, (_, norms, stored) in enumerate(layers):
                wide = plain_layer(design, index, norms, stored, wide)
            self.wanted.append(wide)
        shape = LayerShape(kv_heads=design.kv_heads, key_size=design.size, value_size=design.size)
        blocks = [-(-length // BLOCK) for length in lengths]
        self.store = BlockStore([shape] * design.layers, sum(blocks) + 1, BLOCK)
        for tensor in self.store.tensors():
            tensor.fill_(torch.nan)
        places = (torch.randperm(sum(blocks)) + 1).split(blocks)
        self.tables = np.zeros((len(lengths), max(blocks)), np.int32)
        for table, own in zip(self.tables, places, strict=True):
            table[: len(own)] = own
        self.stack = DecoderStack(
            [self._weights(index, *layer[:2]) for index, layer in enumerate(layers)], self.store, design.hidden
        )

    def _weights(self, index, matrices, norms):
        design = self.design
        return LayerWeights(
            **matrices, **norms, heads=design.heads, epsilon=design.epsilon, scale=design.scale, gate=design.gate,
            window=design.windows[index], softcap=design.softcap,
        )  # fmt: skip

    def steps(self):
        """What the stack makes of each step's tokens, and what it should."""
        done = [0] * len(CHUNKS)
        for turn in range(3):
            parts = [(i, done[i], done[i] + chunks[turn]) for i, chunks in enumerate(CHUNKS)]
            done = [end for *_, end in parts]
            positions = torch.cat([torch.arange(begin, end) for _, begin, end in parts])
            owners = np.repeat(np.arange(len(parts)), [end - begin for _, begin, end in parts])
            slots = torch.from_numpy(self.tables[owners, positions // BLOCK]) * BLOCK + positions % BLOCK
            starts = np.cumsum([0, *(end - begin for _, begin, end in parts)])
            step = PackedStep(starts, np.array(done), self.tables, slots.long(), self.store.group)
            hidden = torch.cat([self.inputs[i][begin:end] for i, begin, end in parts])
            turns = rotary(self.design, positions.float())
            self.stack.run(hidden, [turns] * self.design.layers, step)
            yield hidden, torch.cat([self.wanted[i][begin:end] for i, begin, end in parts])


@pytest.mark.parametrize("name", DESIGNS)
def test_a_stack_equals_its_layers_written_out(name):
    for found, wanted in Run(DESIGNS[name]).steps():
        assert float((found - wanted).norm() / wanted.norm()) < 2e-6
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "fault",
    [{"epsilon": 2e-2}, {"scale": 0.31}, {"windows": (5, None, 3)}, {"softcap": None}, {"gate": Epilogue.SILU_GATE}],
    ids=lambda fault: next(iter(fault)),
)
def test_the_comparison_sees_each_setting(fault, monkeypatch):
    """Else a setting that is not passed on would go unnoticed."""
    inner = Run._weights
    monkeypatch.setattr(
        Run, "_weights", lambda self, index, *rest: attrs.evolve(inner(self, index, *rest), **changed(fault, index))
    )
    errors = [float((found - wanted).norm() / wanted.norm()) for found, wanted in Run(DESIGNS["gemma"]).steps()]
    assert max(errors) > 1e-4


def changed(fault, index):
    return {"window": fault["windows"][index]} if "windows" in fault else fault


def test_threads_change_no_bit_and_the_stages_are_timed(library):
    found = []
    try:
        for threads in (1, 2):
            native.use_threads(library, threads)
            run = Run(DESIGNS["wide"])
            found.append(torch.cat([hidden for hidden, _ in run.steps()]))
            seconds = run.stack.stage_seconds()
            assert tuple(seconds) == native.STAGES
            assert all(value > 0 for value in seconds.values())
    finally:
        native.use_threads(library, 2)
    assert torch.equal(*found)


def test_a_nan_row_spoils_no_other_sequence():
    run, clean = Run(DESIGNS["llama"]), Run(DESIGNS["llama"])
    run.inputs[1][0] = torch.nan
    for (found, _), (wanted, _), turn in zip(run.steps(), clean.steps(), range(3), strict=True):
        counts = [chunks[turn] for chunks in CHUNKS]
        for index, (one, other) in enumerate(zip(found.split(counts), wanted.split(counts), strict=True)):
            assert one.isnan().all() if index == 1 else torch.equal(one, other)


def test_a_store_of_another_number_of_layers_is_refused():
    run = Run(DESIGNS["llama"])
    with pytest.raises(ValueError, match="zip"):
        DecoderStack(run.stack._keep[0][:2], run.store, 40)
