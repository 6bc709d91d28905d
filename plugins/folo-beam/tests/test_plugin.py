"""The distribution as a plugin: the conformance kit, its parameters' rules, and its size."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest
import torch

import folo_beam
from folo_beam import BeamParams
from folo_beam.grid import likeliest
from folo_core.errors import ParamsError
from folo_core.testing.conformance import PluginConformance, SamplerConformance

SOURCE = Path(folo_beam.__file__).parent
SEARCH = ("__init__.py", "params.py", "plugin.py", "sampler.py", "grid.py")


class TestPlugin(PluginConformance):
    plugin = "folo-beam"


class TestBeam(SamplerConformance):
    plugin, name = "folo-beam", "beam"

    def params(self, part):
        return [
            BeamParams(),
            BeamParams(width=1),
            BeamParams(width=3, n=3, early_stopping=True),
            BeamParams(width=6, n=6, num_groups=3, diversity_penalty=0.8),
            BeamParams(width=4, n=2, early_stopping="never", length_penalty=0.0, max_tokens=4),
        ]


class TestConstrained(TestBeam):
    def params(self, part):
        wanted = [BeamParams(width=4, n=4, must_include=[(4, 6), (8,)]), BeamParams(width=3, n=2, must_include=[(30,)])]
        return [*wanted, BeamParams(), BeamParams(width=2, n=2, must_include=[(1,), (1, 2)])]

    def test_cost_of_a_step(self, part):
        pytest.skip("phrases are followed candidate by candidate, in Python; the README says so")


def code_lines(path):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    text = path.read_text(encoding="utf-8")
    strings = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    docs = {
        line
        for node in strings
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in layout]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docs


def test_plain_and_diverse_beam_search_take_at_most_250_lines_of_code():
    on_devices = {"ahead.py", "device.py", "steps.py"}
    assert {path.name for path in SOURCE.glob("*.py")} == {*SEARCH, "constraints.py", *on_devices}
    assert 150 < sum(len(code_lines(SOURCE / name)) for name in SEARCH) <= 250
    assert len(code_lines(SOURCE / "constraints.py")) <= 140


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width: 0: must be an integer >= 1"),
        ({"width": True}, "width: True"),
        ({"width": 4, "n": 5}, r"n: 5: must be <= width \(4\)"),
        ({"width": 4, "num_return_sequences": 5}, "num_return_sequences: 5: must be <= width"),
        ({"width": 4, "num_return_sequences": 2, "n": 3}, "n: 3: num_return_sequences=2 says otherwise"),
        ({"num_return_sequences": 0}, "num_return_sequences: 0"),
        ({"length_penalty": float("inf")}, "length_penalty: inf"),
        ({"length_penalty": 17}, "length_penalty: 17.0: must be a finite number from -16 to 16"),
        ({"early_stopping": "always"}, "early_stopping: 'always': must be True, False or \"never\""),
        ({"early_stopping": 1}, "early_stopping: 1"),
        ({"width": 4, "num_groups": 3, "diversity_penalty": 1}, r"num_groups: 3: must divide width \(4\)"),
        ({"num_groups": 2}, "diversity_penalty: 0.0 with num_groups=2"),
        ({"diversity_penalty": 0.5}, "diversity_penalty: 0.5 with num_groups=1"),
        ({"num_groups": 2, "diversity_penalty": -1}, "diversity_penalty: -1.0"),
        ({"num_groups": 2, "diversity_penalty": 1, "must_include": ["a"]}, "must_include: .*num_groups"),
        ({"must_include": [[]]}, "must_include: "),
        ({"must_include": [""]}, "must_include: "),
        ({"must_include": [3, 4]}, "must_include: "),
        ({"must_include": [[-1]]}, "must_include: "),
        ({"must_include": [[i] for i in range(63)]}, "must_include: .*at most 62"),
        ({"must_include": [[1, 2, 3]], "max_tokens": 2}, r"must_include: 3 tokens: must fit max_tokens \(2\)"),
        ({"temperature": 0.7}, "temperature: 0.7: beam search draws nothing"),
        ({"top_k": 5}, "top_k: 5: beam search draws nothing"),
        ({"top_p": 0.5}, "top_p: 0.5: beam search draws nothing"),
        ({"min_p": 0.5}, "min_p: 0.5: beam search draws nothing"),
        ({"best_of": 3}, "best_of: 3: .*set width"),
    ],
)
def test_bad_fields_are_refused_with_a_mend(fields, message):
    with pytest.raises(ParamsError, match=message):
        BeamParams(**fields)


def test_what_depends_on_the_engine_is_checked_against_it():
    with pytest.raises(ParamsError, match=r"width: 9: must be <= 8 \(max_sequences_per_request\)"):
        BeamParams(width=9).validate_for(vocab_size=10, max_sequences=8)
    with pytest.raises(ParamsError, match="must_include: 10: outside the vocabulary; token ids end at 9"):
        BeamParams(must_include=["text", [1, 10]]).validate_for(vocab_size=10)


def test_the_fields_of_transformers_are_taken():
    params = BeamParams(width=4, num_return_sequences=3, early_stopping="never", temperature=0, must_include="one text")
    assert (params.num_answers, params.num_sequences, params.must_include) == (3, 4, ("one text",))
    assert BeamParams(n=2).num_answers == 2
    assert BeamParams().num_answers == 1


@pytest.mark.parametrize(("vocab_size", "count"), [(37, 5), (37, 50), (1000, 5), (5003, 9), (49152, 5), (640, 5)])
def test_the_likeliest_tokens_are_those_of_a_full_sort(vocab_size, count):
    logits = torch.randn((6, vocab_size), generator=torch.Generator().manual_seed(0)) * 4
    logits[1, ::2] = -torch.inf
    logits[2, -3:] += 20
    exact = logits.log_softmax(-1).topk(min(count, vocab_size), 1)
    ids, logprobs = likeliest(logits.clone(), count, [])
    assert torch.equal(ids[logprobs > -torch.inf], exact.indices[logprobs > -torch.inf])
    torch.testing.assert_close(logprobs, exact.values, atol=1e-5, rtol=1e-6)


def test_wanted_tokens_come_along_once():
    logits = torch.randn((2, 50), generator=torch.Generator().manual_seed(0))
    exact = logits.log_softmax(-1)
    best = int(logits[0].argmax())
    ids, logprobs = likeliest(logits.clone(), 3, [[best, 7, 9], [11]])
    for row, wanted in ((0, {best, 7, 9}), (1, {11})):
        found = [(i, p) for i, p in zip(ids[row].tolist(), logprobs[row].tolist(), strict=True) if p > -torch.inf]
        assert wanted <= {i for i, _ in found}
        assert len({i for i, _ in found}) == len(found)
        assert all(p == pytest.approx(exact[row, i].item(), abs=1e-5) for i, p in found)
