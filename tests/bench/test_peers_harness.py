"""The harness that measures Folo beside other engines: its own parts, with engines that only pretend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import contest
import peers
import plot
import run as harness
import settings
import verdict
from contest import Contest, Run, Worker, check
from machine import ENOUGH, CpuTime, Gate
from peers import ENGINES, SkippedError
from settings import Candidate
from verdict import Agreement, Results
from workloads import HIGHEST_ID, LOWEST_ID, WORKLOADS

ROOT = Path(__file__).parents[2]

# --- workloads ------------------------------------------------------------------------------------------------------


def test_the_mixed_workload_is_the_one_that_is_quoted():
    mixed = WORKLOADS["C1"]
    assert len(mixed.prompts) == 32
    assert mixed.tokens == sum(mixed.new) == 2356
    assert {16 <= len(prompt) <= 256 for prompt in mixed.prompts} == {True}
    assert {16 <= new <= 128 for new in mixed.new} == {True}
    assert mixed.longest <= 256 + 128


@pytest.mark.parametrize(
    ("name", "prompts", "length", "tokens"), [("C2", 1, 64, 64), ("C3", 8, 64, 512), ("C4", 1, 256, 512)]
)
def test_the_other_workloads_have_their_sizes(name, prompts, length, tokens):
    workload = WORKLOADS[name]
    assert [len(prompt) for prompt in workload.prompts] == [length] * prompts
    assert workload.tokens == tokens


def test_ids_are_those_of_ordinary_tokens_and_prompts_differ():
    for workload in WORKLOADS.values():
        assert all(LOWEST_ID <= token <= HIGHEST_ID for prompt in workload.prompts for token in prompt)
        assert len({tuple(prompt) for prompt in workload.prompts}) == len(workload.prompts)


def test_the_same_ids_are_asked_of_low_bit_weights():
    assert WORKLOADS["C1q"].prompts == WORKLOADS["C1"].prompts
    assert WORKLOADS["C2q"].message() == WORKLOADS["C2"].message() | {"name": "C2q", "quantised": True}


def test_a_result_has_the_workloads_unit():
    assert WORKLOADS["C2"].result(3.2) == pytest.approx(50.0)  # ms/token
    assert WORKLOADS["C4"].result(8.0) == pytest.approx(64.0)  # tok/s


# --- settings -------------------------------------------------------------------------------------------------------


def test_every_candidate_names_what_exists():
    table = settings.load()
    for candidate in table.candidates:
        assert candidate.engine in ENGINES
        assert set(candidate.workloads) <= set(WORKLOADS)
    for engine in table.best:
        for workload, name in table.best[engine].items():
            assert table.chosen(engine, workload).name == name


def test_every_engine_has_a_script_and_pinned_requirements():
    for engine in ENGINES.values():
        assert (ROOT / "bench" / "cpu" / "engines" / f"{engine.name}.py").is_file()
        if engine.environment is not None:
            lines = (ROOT / "bench" / "cpu" / "requirements" / f"{engine.environment}.txt").read_text().splitlines()
            pinned = [line for line in lines if line[0] not in "#-"]
            assert pinned
            assert all("==" in line for line in pinned)


def table_of(*candidates, best=None):
    return settings.Settings(list(candidates), best or {})


def test_the_best_candidate_is_chosen_else_the_first_that_suits():
    one = Candidate(engine="vllm", name="one", workloads=["C1"])
    two = Candidate(engine="vllm", name="two", workloads=["C1", "C2"])
    assert table_of(one, two).chosen("vllm", "C1") is one
    assert table_of(one, two).chosen("vllm", "C2") is two
    assert table_of(one, two, best={"vllm": {"C1": "two"}}).chosen("vllm", "C1") is two
    assert table_of(one, two, best={"vllm": {"C1": "two"}}).chosen("vllm", "C1", ["one"]) is one
    assert table_of(one, two, best={"vllm": {"C1": "two"}}).chosen("vllm", "C1", ["three"]) is two


def test_an_engine_without_a_candidate_is_skipped_with_the_reason():
    table = settings.Settings([], {}, {"llamacpp": {"C3": "no beams"}})
    with pytest.raises(SkippedError, match=r"^no beams$"):
        table.chosen("llamacpp", "C3")
    with pytest.raises(SkippedError, match=r"^it has no such mode$"):
        table.chosen("llamacpp", "C4")


def test_threads_are_bound_unless_a_candidate_says_otherwise():
    bound = Candidate(engine="vllm", name="a", workloads=[]).environment("/peer/bin/python")
    assert (bound["OMP_NUM_THREADS"], bound["OMP_PROC_BIND"]) == ("2", "true")
    loose = Candidate(
        engine="vllm", name="a", workloads=[], threads=1, bind=False, env={"X": "{environment}/lib"}
    ).environment("/peer/bin/python")
    assert (loose["OMP_NUM_THREADS"], loose["OMP_PROC_BIND"], loose["X"]) == ("1", "false", "/peer/lib")


def test_tuning_keeps_what_people_wrote(tmp_path):
    path = tmp_path / "settings.toml"
    written = '# why\n[candidates.vllm.eager]\nworkloads = ["C1"]\neager = true\n'
    path.write_text(f"{written}{settings.MARK}\n[best.vllm]\nC1 = 'old'\n")
    settings.store({"vllm": {"C1": "eager"}}, path)
    assert path.read_text().startswith(written)
    table = settings.load(path)
    assert table.best == {"vllm": {"C1": "eager"}}
    assert table.chosen("vllm", "C1").options == {"threads": 2, "eager": True}


# --- the machine ----------------------------------------------------------------------------------------------------


def gate_seeing(*measurements):
    """A gate on two cores that measures these rates one after the other, and notes how often it paused."""
    pauses = []
    found = iter(measurements)
    return Gate(rates=lambda cpus: next(found), pause=pauses.append, cpus=[0, 1], tries=3, best=100.0), pauses


def test_the_gate_opens_when_both_cores_are_there():
    gate, pauses = gate_seeing([99.0, 95.0])
    assert gate.wait() == pytest.approx(0.95)
    assert pauses == []


def test_the_gate_waits_while_a_core_is_taken():
    gate, pauses = gate_seeing([50.0, 50.0], [100.0, 60.0], [98.0, 97.0])
    assert gate.wait() == pytest.approx(0.97)
    assert len(pauses) == 2


def test_the_gate_gives_up_after_its_tries():
    gate, pauses = gate_seeing([50.0, 50.0], [50.0, 50.0], [50.0, 51.0])
    assert gate.wait() == pytest.approx(0.5)
    assert len(pauses) == 2


def test_a_core_that_turns_out_faster_is_the_measure_from_then_on():
    gate, _ = gate_seeing([200.0, 200.0], [100.0, 100.0])
    assert gate.cores() == 1.0
    assert gate.cores() == 0.5


def test_the_time_that_others_took_is_what_is_left_of_all():
    before = CpuTime(busy=100.0, own=10.0, wall=0.0, cores=2)
    assert before.foreign_until(CpuTime(busy=120.0, own=28.0, wall=10.0, cores=2)) == pytest.approx(0.1)
    assert before.foreign_until(CpuTime(busy=119.9, own=30.0, wall=10.0, cores=2)) == 0.0


# --- workers --------------------------------------------------------------------------------------------------------

FAKE = """
import time
class Fake:
    describes = {"fake": "1"}
    def run(self, workload):
        print("noise on standard output")
        if workload["kind"] == "beam":
            raise NotImplementedError("no beams here")
        if workload["kind"] == "sample":
            raise ValueError("broken")
        if workload["name"] == "C1":
            time.sleep(60)
        return [[7] * new for new in workload["new"]]
def load(options):
    if options.get("fails"):
        raise OSError("no such weights")
    return Fake()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Start the real worker script with an engine that pretends."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "fake.py").write_text(FAKE)
    script = tmp_path / "worker.py"
    script.write_text((ROOT / "bench" / "cpu" / "worker.py").read_text())
    monkeypatch.setattr(contest, "WORK", tmp_path)
    started = []

    def start(**options):
        started.append(Worker([sys.executable, "-P", str(script), "fake", json.dumps(options)], {}, "fake"))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def test_a_worker_answers_and_lives_on_after_what_it_cannot_do(fake):
    worker = fake()
    assert worker.describes == {"fake": "1"}
    worker.warm(WORKLOADS["C2"], 20)
    with pytest.raises(SkippedError, match=r"^no beams here$"):
        worker.run(WORKLOADS["C3"], 20)
    with pytest.raises(SkippedError, match=r"^ValueError: broken$"):
        worker.run(WORKLOADS["C4"], 20)
    seconds, ids = worker.run(WORKLOADS["C2"], 20)
    assert 0 < seconds < 20
    assert ids == [[7] * 64]


def test_a_worker_that_takes_too_long_is_ended_and_says_so_again(fake):
    worker = fake()
    with pytest.raises(SkippedError, match=r"^not finished in 0 s$"):
        worker.run(WORKLOADS["C1"], 0.2)
    assert worker.process.wait(10) != 0
    with pytest.raises(SkippedError, match="ended"):
        worker.run(WORKLOADS["C2"], 20)


def test_an_engine_that_cannot_load_says_why(fake):
    with pytest.raises(SkippedError, match=r"^OSError: no such weights$"):
        fake(fails=True)


def test_answers_of_other_lengths_are_refused():
    check(WORKLOADS["C4"], [[1] * 64] * 8)
    with pytest.raises(SkippedError, match=r"gave answers of \[63\] tokens where \[64\] were asked for"):
        check(WORKLOADS["C2"], [[1] * 63])


def test_an_environment_that_cannot_be_made_is_a_reason_to_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "WORK", tmp_path)
    monkeypatch.setattr(peers, "HERE", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "vllm.txt").write_text("/nowhere/at-all.whl\n")
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    race = Contest({}, say=lambda text: None)
    race.prepare("vllm")
    with pytest.raises(SkippedError, match="could not be installed"):
        race.worker(Candidate(engine="vllm", name="a", workloads=["C2"]), WORKLOADS["C2"])


# --- the verdict ----------------------------------------------------------------------------------------------------


def ran(engine, number, seconds, *, cores=1.0, foreign=0.0):
    return Run(
        workload="C2", engine=engine, candidate="usual", round=number, seconds=seconds, cores=cores, foreign=foreign
    )


@pytest.fixture
def results():
    runs = [ran("folo", 1, 2.0), ran("vllm", 1, 4.0), ran("folo", 2, 4.0), ran("vllm", 2, 5.0), ran("vllm", 3, 9.0)]
    answers = {"C2": {"folo": [[1, 2, 3], [1, 2, 3], [5, 6, 7]], "vllm": [[1, 2, 3], [1, 2, 4], [5, 0, 0]]}}
    return Results(runs, answers, {"C2": {"llamacpp": "no compiler"}})


def test_ratios_pair_the_runs_of_a_round(results):
    assert results.ratios("C2", "vllm") == [2.0, 1.25], "the third round has no partner"
    assert results.next_round("C2") == 4
    assert results.next_round("C1") == 1


def test_disturbed_runs_count_only_if_there_are_no_others(results):
    results.runs.append(ran("vllm", 4, 99.0, cores=ENOUGH - 0.01))
    results.runs.append(ran("ctranslate2", 4, 1.0, foreign=0.5))
    assert [run.round for run in results.of("C2", "vllm")] == [1, 2, 3]
    assert [run.round for run in results.of("C2", "ctranslate2")] == [4]


def test_agreement_says_how_many_and_where_the_others_part():
    found = Agreement.between([[1, 2, 3], [1, 2, 3], [5, 6, 7]], [[1, 2, 3], [1, 2, 4], [5, 0, 0]])
    assert found == Agreement(equal=1, total=3, first_difference=1.5)
    assert Agreement.between([[1]], [[1]]) == Agreement(equal=1, total=1, first_difference=None)


def test_the_table_holds_figures_ratios_agreement_and_reasons(results):
    lines = verdict.plain(results).splitlines()
    assert lines[0].startswith("C2: one request")
    cells = {line.split("  ")[0]: line for line in lines[2:]}
    assert "46.9" in cells["Folo"]  # 3 s for 64 tokens
    assert "31.2 - 62.5" in cells["Folo"]
    assert "1.62 x as fast" in cells["vLLM CPU"]
    assert "1.25 - 2.00" in cells["vLLM CPU"]
    assert "1/3" in cells["vLLM CPU"]
    assert "3 rounds, first difference at 1.5" in cells["vLLM CPU"]
    assert "skipped: no compiler" in cells["llama.cpp"]


def test_a_disturbed_run_is_marked_in_the_table(results):
    results.runs.append(ran("folo", 4, 99.0, cores=0.5))
    line = next(line for line in verdict.plain(results).splitlines() if line.startswith("Folo"))
    assert line.endswith("3 rounds, 1 contended")


def test_the_summary_is_json_with_the_same_figures(results):
    found = json.loads(json.dumps(verdict.summary(results)))["C2"]["vllm"]
    assert found["times_as_fast_is_folo"] == {"median": 1.625, "low": 1.25, "high": 2.0}
    assert found["agreement"] == {"equal": 1, "total": 3, "first_difference": 1.5}
    assert found["ms/token"]["low"] == pytest.approx(62.5)


def test_results_survive_their_file(results, tmp_path):
    path = tmp_path / "results.json"
    args = harness.parse(["--workloads", "C2"])
    harness.write(results, Contest({}, say=lambda text: None), args, path)
    again = harness.read(path)
    assert again == results


def test_unknown_names_are_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        harness.parse(["--engines", "folo,vlm"])
    assert "vlm: there are folo, transformers" in capsys.readouterr().err


def test_a_picture_needs_a_library_and_says_so_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        harness.parse(["--plot", "out.png"])
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err


def test_the_picture_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


# --- a whole session ------------------------------------------------------------------------------------------------


class Pretender:
    """A worker that takes as long as it is told."""

    def __init__(self, log, engine, seconds):
        self.log, self.engine, self.seconds = log, engine, seconds
        self.process = type("Process", (), {"pid": -1})()

    def warm(self, workload, limit):
        if self.engine == "vllm" and workload.kind == "beam":
            raise SkippedError("no beams")

    def run(self, workload, limit):
        self.log.append(self.engine)
        if self.seconds is None:
            raise SkippedError("not finished in 300 s")
        return self.seconds, [[1] * new for new in workload.new]

    def close(self):
        self.log.append(f"{self.engine} closed")


def session_of(tmp_path, arguments, candidates, seconds):
    log = []
    race = Contest({}, say=lambda text: None, gate=gate_seeing(*[[100.0, 100.0]] * 99)[0])
    race.running.update(
        {
            (candidate.engine, candidate.name): Pretender(log, candidate.engine, seconds[candidate.name])
            for candidate in candidates
        }
    )
    args = harness.parse([*arguments, "--json", str(tmp_path / "out.json")])
    return harness.Session(args, race, table_of(*candidates), Results()), log


def test_engines_take_turns_in_alternating_order_and_one_that_fails_drops_out(tmp_path):
    names = {"folo": 1.0, "vllm": 2.0, "llamacpp": None}
    candidates = [Candidate(engine=name, name=name, workloads=["C2"]) for name in names]
    arguments = ["--rounds", "2", "--engines", "folo,vllm,llamacpp,ctranslate2"]
    session, log = session_of(tmp_path, arguments, candidates, names)
    session.measure(WORKLOADS["C2"])
    assert log == ["folo", "vllm", "llamacpp", "vllm", "folo"]
    assert session.results.ratios("C2", "vllm") == [2.0, 2.0]
    assert session.results.skipped["C2"] == {
        "llamacpp": "not finished in 300 s",
        "ctranslate2": "it has no such mode",
    }
    assert harness.read(tmp_path / "out.json") == session.results


def test_an_engine_that_cannot_do_a_workload_is_skipped_before_it_runs(tmp_path):
    candidates = [Candidate(engine="vllm", name="vllm", workloads=["C3"])]
    session, log = session_of(tmp_path, ["--engines", "vllm"], candidates, {"vllm": 1.0})
    session.measure(WORKLOADS["C3"])
    assert log == []
    assert session.results.skipped == {"C3": {"vllm": "no beams"}}


def test_tuning_stores_the_first_of_the_fastest_candidates(tmp_path, monkeypatch):
    stored = []
    monkeypatch.setattr(settings, "store", lambda best: stored.append(json.dumps(best)))
    seconds = {"slow": 3.0, "first of the fast": 2.05, "fastest by a hair": 2.0, "broken": None}
    candidates = [Candidate(engine="vllm", name=name, workloads=["C2"]) for name in seconds]
    session, log = session_of(tmp_path, ["--rounds", "1", "--engines", "vllm"], candidates, seconds)
    workers = dict(session.contest.running)
    monkeypatch.setattr(Contest, "close", lambda self: None)
    session.tune(WORKLOADS["C2"])
    assert len(workers) == 4
    assert log == ["vllm"] * 4
    assert json.loads(stored[-1]) == {"vllm": {"C2": "first of the fast"}}
