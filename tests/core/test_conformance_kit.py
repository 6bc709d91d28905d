"""``pytest --folo-conformance`` runs anywhere, passes good samplers and fails each broken one for its own reason."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from sites import Site

BROKEN = Path(__file__).parents[1] / "broken_plugin" / "acme_broken"
REASONS = {
    "reads-neighbours": ("neighbours do not matter", "a row reads its neighbours"),
    "global-random": ("same seed gives the same tokens", "two runs with the same seeds differ"),
    "counts-steps": ("late arrival does not matter", "joining a running batch changes tokens"),
    "keeps-state": ("ended requests leave no state", "the id is still in open"),
    "ignores-masks": ("masked tokens are never chosen", "masked tokens were chosen"),
    "returns-foreign": ("finish returns what ended", "a sequence that is not the request's own"),
    "state-by-row": ("preemption does not matter", "preemption changes the answer"),
    "loops-over-rows": ("cost of a step", "do the work of all rows in one operation"),
    "falls-with-others": ("nan ends one request", "r0: ended in an error"),
    "accepts-nonsense": ("params are sound", "was accepted: give the field a rule"),
    "loses-answers": ("finish returns what ended", "returned 1 of 2 ended, 2 wanted"),
    "never-ends": ("blocks come back", "its rows hold their blocks"),
    "undeclared-fork": ("capabilities are declared", "'forks' is not among its capabilities"),
    "too-wide": ("params keep their promises", "3 rows lived at once, num_sequences says 2"),
    "not-steady": ("running ahead does not matter", "does steady_after promise too much?"),
}
ALONE = {
    "keeps-state": 2,
    "ignores-masks": 1,
    "loops-over-rows": 1,
    "accepts-nonsense": 1,
    "loses-answers": 1,
    "not-steady": 1,
}
"""How many checks fail of those that must fail few: the others find nothing wrong."""


def run_pytest(site: Site, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Run pytest in ``folder``; return what it printed, and each test's outcome and text."""
    report = site.path / "report.xml"
    report.unlink(missing_ok=True)
    words = ["-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    code = f"import os, sys, pytest; os.chdir({str(folder)!r}); code = pytest.main({words!r}); "
    code += "print('imported torch:', 'torch' in sys.modules); sys.exit(code)"
    done = site.run(code, OMP_NUM_THREADS="1")
    results = {}
    for case in ET.parse(report).getroot().iter("testcase") if report.exists() else ():  # noqa: S314 (its own report)
        found = next((child for child in case if child.tag in {"failure", "error", "skipped"}), None)
        text = "" if found is None else f"{found.get('message')}\n{found.text}"
        results[f"{case.get('classname')}::{case.get('name')}"] = ("passed" if found is None else found.tag, text)
    return done, results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with a site beside it that holds the broken plugin."""
    base = tmp_path_factory.mktemp("kit")
    (base / "empty").mkdir()
    (base / "site").mkdir()
    site = Site(base / "site")
    site.install("acme-broken", None, entries={"acme-broken": "acme_broken"})
    (site.path / "acme_broken").symlink_to(BROKEN)
    return site, base / "empty"


@pytest.fixture(scope="module")
def results(folder):
    with pytest.MonkeyPatch.context() as patch:
        # Measuring coverage doubles the time of this long run; that of sound samplers, below, measures the same checks.
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        done, results = run_pytest(*folder, "--folo-conformance", "acme-broken")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    return results


def failures(results: dict, part: str) -> dict[str, str]:
    prefix = f"acme-broken:{part}::"
    return {
        n.removeprefix(prefix): text
        for n, (outcome, text) in results.items()
        if n.startswith(prefix) and outcome == "failure"
    }


@pytest.mark.parametrize("part", REASONS)
def test_a_broken_sampler_fails_for_its_own_reason(results, part):
    check, message = REASONS[part]
    found = failures(results, part)
    assert message in found[check]
    assert len(found) == ALONE.get(part, len(found)), found.keys()


def test_the_reasons_differ():
    assert len(REASONS) >= 8
    assert len({message for _, message in REASONS.values()}) == len(REASONS)


@pytest.mark.parametrize("part", ["honest", "honest-fork"])
def test_an_honest_sampler_passes(results, part):
    assert failures(results, part) == {}
    passed = [node for node, (outcome, _) in results.items() if outcome == "passed" and f":{part}::" in node]
    assert len(passed) >= 17


def test_the_plugin_itself_passes(results):
    own = {node: outcome for node, (outcome, _) in results.items() if node.startswith("acme-broken::")}
    assert set(own.values()) == {"passed"}
    assert len(own) == 5


def test_a_skip_says_why(results):
    outcome, text = results["acme-broken:honest::greedy is the most likely"]
    assert outcome == "skipped"
    assert "'greedy-invariant' is not among its capabilities" in text


def test_ours_and_the_third_partys_pass_in_an_empty_folder(folder):
    options = [f"--folo-conformance={name}" for name in ("folo-sampling:greedy", "folo-sampling:random", "typical")]
    done, results = run_pytest(*folder, *options, "-v")
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(results) >= 60
    assert {outcome for outcome, _ in results.values()} <= {"passed", "skipped"}
    assert "folo-sampling:greedy::neighbours do not matter PASSED" in done.stdout
    assert results["folo-sampling:random::greedy is the most likely"][0] == "passed"


def test_without_the_option_nothing_is_imported_or_collected(folder):
    done, _ = run_pytest(*folder)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "imported torch: False" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme-nowhere", "acme-nowhere .* is broken"),
        ("acme-broken:nothing", "acme-broken:nothing: no such part; the plugin offers .*acme-broken:honest,"),
    ],
)
def test_a_wrong_name_is_a_usage_error(folder, name, message):
    done, _ = run_pytest(*folder, "--folo-conformance", name)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.search(message, done.stderr), done.stderr


def test_the_folders_own_tests_run_only_if_a_path_is_given(folder, tmp_path):
    site, _ = folder
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # its own root, wherever temporary folders are
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    options = ("--folo-conformance=acme-broken:honest", "-k", "own or described")
    _, alone = run_pytest(site, tmp_path, *options)
    _, both = run_pytest(site, tmp_path, *options, ".")
    assert list(alone) == ["acme-broken::every part is described"]
    assert sorted(both) == ["acme-broken::every part is described", "test_own::test_own"]
