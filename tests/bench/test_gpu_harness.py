"""The harness that measures Folo on a GPU: its parts, and the whole of it with tiny models on this processor."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import anchors  # noqa: E402
import attention_check  # noqa: E402
import ceilings  # noqa: E402
import gpu_workloads  # noqa: E402
import greedy_check  # noqa: E402 (torch may be missing)
import low_bit  # noqa: E402
import measure  # noqa: E402
import shapes  # noqa: E402
import startup  # noqa: E402
import traces  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "run.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)  # bench/cpu has a run.py, too
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- workloads and shapes -------------------------------------------------------------------------------------------


FULL = {workload.key: workload for workload in gpu_workloads.workloads(gpu_workloads.FULL)}
RATES = ceilings.Ceilings(copy=3.02e12, matmul=723e12)


def test_the_mixed_workload_is_the_one_that_is_quoted():
    mixed = FULL["W1 A"]
    assert len(mixed.prompts) == 256
    assert mixed.tokens == 133_966
    assert {100 <= len(prompt) <= 1024 for prompt in mixed.prompts} == {True}


@pytest.mark.parametrize(
    ("key", "requests", "length", "tokens"),
    [
        ("W2 B", 256, 512, 65_536),
        ("W3 A", 1, 128, 256),
        ("W3 B", 1, 128, 256),
        ("W4 A width 8", 16, 256, 2048),
        ("W4 B width 4", 16, 256, 2048),
        ("W5 A", 16, 1024, 32_768),
        ("W6 A", 256, 2112, 16_384),
    ],
)
def test_the_other_workloads_have_their_sizes(key, requests, length, tokens):
    workload = FULL[key]
    assert [len(prompt) for prompt in workload.prompts] == [length] * requests
    assert workload.tokens == tokens


def test_prompts_with_a_shared_beginning_differ_after_it():
    prompts = FULL["W6 A"].prompts
    assert len({tuple(prompt[:2048]) for prompt in prompts}) == 1
    assert len({tuple(prompt[2048:]) for prompt in prompts}) == 256


def test_every_anchor_is_a_line_that_can_come_out():
    keys = {key for key in FULL if key != "W6 A"} | {"W6 A cold", "W6 A second"}
    assert set(anchors.ANCHORS) == keys


@pytest.mark.parametrize(("shape", "billions"), [(shapes.A, 0.596), (shapes.B, 8.03)])
def test_the_shapes_have_as_many_parameters_as_the_models_they_are_like(shape, billions):
    untied = 0 if shape.config["tie_word_embeddings"] else shape.head_parameters
    assert (shape.layer_parameters + shape.head_parameters + untied) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_limits_are_those_that_follow_from_the_machines_rates():
    assert 1e3 * ceilings.token_limit(FULL["W3 A"], shapes.A, RATES) == pytest.approx(0.405, abs=0.01)
    assert 1e3 * ceilings.token_limit(FULL["W3 B"], shapes.B, RATES) == pytest.approx(4.98, abs=0.02)
    mixed = FULL["W1 A"]
    assert mixed.tokens / ceilings.limit_seconds(mixed, shapes.A, RATES) == pytest.approx(27_000, rel=0.05)


def test_a_known_prompt_costs_no_products():
    workload = FULL["W6 A"]
    cold, warm = (ceilings.limit_seconds(workload, shapes.A, RATES, cached=cached) for cached in (False, True))
    prompts = 2 * shapes.A.layer_parameters * (2048 + 256 * 64 - 256) / RATES.matmul
    assert cold - warm == pytest.approx(prompts)


def test_a_folder_without_weights_takes_no_room_and_passes_the_loaders_checks(tmp_path):
    from folo_hf.source import check_weights, weight_names

    folder = shapes.write_empty_folder(attr_evolve(shapes.TINY_B, 4096), tmp_path / "model")
    check_weights(folder)
    assert "lm_head.weight" in weight_names(folder)
    status = (folder / "model.safetensors").stat()
    assert status.st_size > 2 * 4096 * 64 * 2
    assert status.st_blocks * 512 < 64 * 1024
    tied = shapes.write_empty_folder(shapes.TINY_A, tmp_path / "tied")
    assert "lm_head.weight" not in weight_names(tied)


def attr_evolve(shape, vocab):
    import attrs

    return attrs.evolve(shape, config=shape.config | {"vocab_size": vocab})


# --- the table ------------------------------------------------------------------------------------------------------


def test_a_line_takes_the_median_and_sets_it_beside_anchor_target_and_limit():
    samples = [measure.Sample(key="W1 A", seconds=seconds, tokens=133_966) for seconds in (7.0, 5.0, 6.0)]
    line = anchors.line(FULL["W1 A"], shapes.A, samples, RATES, tiny=False)
    assert line.figure == pytest.approx(133_966 / 6)
    assert (line.slowest, line.fastest) == (pytest.approx(133_966 / 7), pytest.approx(133_966 / 5))
    assert line.ahead == pytest.approx(133_966 / 6 / 18_407)
    assert line.target == 22_000
    assert line.share == pytest.approx(line.figure / line.limit)


def test_a_request_alone_is_judged_by_milliseconds_where_fewer_are_better():
    samples = [measure.Sample(key="W3 B", seconds=0.010 + 255 * 0.0055, tokens=256, first=0.010)]
    line = anchors.line(FULL["W3 B"], shapes.B, samples, RATES, tiny=False)
    assert (line.unit, line.figure, line.first_token) == ("ms/token", pytest.approx(5.5), pytest.approx(10.0))
    assert line.ahead == pytest.approx(6.6 / 5.5)
    assert line.target == 5.9
    assert 0.85 < line.share < 1


def test_the_table_shows_every_line_and_leaves_unknown_anchors_open():
    samples = [measure.Sample(key="W1 A", seconds=6.0, tokens=133_966)]
    lines = [anchors.line(FULL["W1 A"], shapes.A, samples, RATES, tiny=tiny) for tiny in (False, True)]
    text = anchors.table(lines).splitlines()
    assert text[0].split()[:3] == ["workload", "unit", "figure"]
    assert "18,407" in text[1]
    assert "vLLM" in text[1]
    assert "18,407" not in text[2]


# --- traces ---------------------------------------------------------------------------------------------------------


def kernel(start, duration, name="k", category="kernel"):
    return {"cat": category, "ts": start, "dur": duration, "name": name}


def test_idle_time_is_what_no_kernel_covers():
    events = [kernel(0, 10), kernel(5, 10, "copy", "gpu_memcpy"), kernel(30, 10), {"cat": "cpu_op", "ts": 0, "dur": 99}]
    found = traces.idleness(events)
    assert found.span == pytest.approx(40e-6)
    assert found.busy == pytest.approx(25e-6)
    assert found.idle == pytest.approx(0.375)
    assert found.late_idle == pytest.approx(0.5)
    assert found.kernels == 3
    assert [name for name, _ in found.costliest] == ["k", "copy"]


def test_a_kernel_within_another_adds_nothing():
    assert traces.idleness([kernel(0, 100), kernel(10, 5), kernel(20, 80)]).idle == pytest.approx(0.0)


def test_without_a_device_there_is_nothing_to_say():
    assert traces.idleness([{"cat": "cpu_op", "ts": 0, "dur": 99}]) is None
    assert "nothing ran" in traces.show(None)


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_traces_are_read_packed_or_not(tmp_path, name):
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as file:
        json.dump({"traceEvents": [kernel(0, 1)]}, file)
    assert traces.read_events(tmp_path / name) == [kernel(0, 1)]


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return shapes.write_empty_folder(shapes.TINY_A, tmp_path_factory.mktemp("model") / "A")


def test_a_token_far_below_the_likeliest_does_not_hold(tiny_folder):
    prompt = [5, 9, 300, 7]
    right = greedy_check._generated(greedy_check.random_weights.draw(**drawn(tiny_folder)), prompt, 4)
    assert greedy_check.judge(tiny_folder, "cpu", [prompt], [right]).holds
    wrong = [(right[0] + 1) % 512, *right[1:]]
    found = greedy_check.judge(tiny_folder, "cpu", [prompt], [wrong])
    assert not found.holds
    assert found.equal_answers == 0
    assert found.widest > greedy_check.TIE


class Deaf:
    """A backend that attends to nothing."""

    wants_device_metadata = False

    def allocate(self, specs, num_blocks, block_size, device):
        pass

    def plan(self, metadata):
        return None

    def forward(self, layer, query, key, value, metadata, **options):
        return torch.zeros_like(query)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_attention_backends_are_compared_with_float32(attention):
    found = attention_check.check(shapes.TINY_A, "cpu", {"attention": attention}, tiny=True)
    assert [(each.window, each.holds) for each in found] == [(None, True), (8, True)]
    assert {each.backend for each in found} <= {"native", "sdpa"}


def test_a_backend_that_is_off_does_not_hold(monkeypatch):
    part = SimpleNamespace(build=lambda config: Deaf())
    monkeypatch.setattr(attention_check, "_chosen", lambda *_: ("deaf", None, part))
    assert not any(each.holds for each in attention_check.check(shapes.TINY_B, "cpu", {}, tiny=True))


def drawn(folder):
    from transformers import AutoConfig

    return {"config": AutoConfig.from_pretrained(folder), "dtype": torch.float32, "device": "cpu"}


def test_distances_count_roundings_of_the_largest_logit():
    class TwoWays:
        """Its second way to attend is off by two roundings in one logit."""

        device, dtype = torch.device("cpu"), torch.bfloat16
        off = 0.0

        def __call__(self, **_):
            row = [4.0, 4.0 - 0.03125 * 3, -1.0 + self.off]
            return SimpleNamespace(logits=torch.tensor([[row] * 3], dtype=torch.bfloat16))

        def set_attn_implementation(self, name):
            self.off = 0.0625 * (name == "eager")

    distances, noise = greedy_check._distances(TwoWays(), [0], [1, 0])
    assert distances.tolist() == [3.0, 0.0]
    assert noise == 2.0


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiny_models_run_through_all_workloads_and_checks(harness, tmp_path, capsys):
    trace, result = tmp_path / "trace.json", tmp_path / "result.json"
    arguments = ["--tiny", "--device", "cpu", "--rounds", "2", "--startup", "", "--json", str(result)]
    assert harness.main([*arguments, "--profile", str(trace), "--option", "max_num_batched_tokens=512"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(result.read_text())
    keys = {line["key"]: line for line in found["lines"]}
    assert set(keys) == set(anchors.ANCHORS)
    assert {line["rounds"] for line in keys.values()} == {2}
    assert all(key in shown for key in keys)
    assert [check["holds"] for check in found["attention"]] == [True] * 4
    for model in "AB":
        assert found["agreements"][model]["same"] + found["agreements"][model]["ties"] == 48
    assert found["options"] == {"max_num_batched_tokens": 512}
    assert found["unfinished"] is None
    assert traces.read_events(trace)


def test_out_of_time_shows_what_there_is(harness, tmp_path, capsys, monkeypatch):
    result = tmp_path / "result.json"
    monkeypatch.setattr(harness, "BEGIN", harness.time.monotonic())
    arguments = ["--tiny", "--device", "cpu", "--workloads", "W3", "--rounds", "1000000", "--startup", ""]
    harness.main([*arguments, "--time-limit", "4", "--no-checks", "--json", str(result)])
    assert "unfinished: --time-limit 4 s" in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert [line["key"] for line in found["lines"]] == ["W3 A"]
    assert found["lines"][0]["rounds"] == len(found["samples"]) > 0


def test_low_bit_products_are_timed_with_their_errors(capsys):
    (line,) = low_bit.measure("A qkv", [3], "cpu", scale=16)
    assert 0.02 < line["fp8 error"] < 0.05 < line["int4 error"] < 0.1
    assert "fp8 error" in capsys.readouterr().out


def test_a_short_answer_ends_the_run():
    workload = gpu_workloads.workloads(gpu_workloads.TINY)[1]
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1], finish_reason="error")])
    with pytest.raises(SystemExit, match=r"W2 B: request 0 has answers of \[1\] tokens, not 1 of 4 \(error\)"):
        measure.check_lengths(workload, [output] * 3)


def test_misspelt_arguments_are_refused(harness, capsys):
    for arguments in (["--workloads", "W9"], ["--option", "attention"], ["--models", "C"]):
        with pytest.raises(SystemExit):
            harness.parse(arguments)
    said = capsys.readouterr().err
    assert "W9: choose from W1" in said
    assert "give NAME=VALUE" in said


@pytest.mark.slow
def test_a_start_is_timed_from_the_processes_start_to_its_first_token(tiny_folder, tmp_path):
    folder = startup.write_folder(tiny_folder, tmp_path / "written", "cpu")
    environment = {**startup.os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = startup._start(folder, "cpu", {"max_model_len": 64}, environment, limit=120.0)
    assert 0 < found.ready <= found.first_token < 120
