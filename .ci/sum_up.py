"""Add up the test suites' JUnit reports and print ``N passed, N failed, N skipped``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET


def outcome(case: ET.Element) -> str:
    """Say how one test ended."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def main(folder: str) -> int:
    """Print the sum over all reports in ``folder``; fail if a test failed or none ran."""
    reports = sorted(Path(folder).glob("*.xml"))
    counts = Counter(outcome(case) for report in reports for case in ET.parse(report).iter("testcase"))
    sys.stdout.write(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped\n")
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
