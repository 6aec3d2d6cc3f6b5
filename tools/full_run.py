"""Run everything marked slow, in tests/ and in the notebooks, and record what came out in a Markdown file.

A test adds a figure of its own to the record with pytest's `record_property(name, value)`.
Usage (`make test-full`): python tools/full_run.py tests/last_full_run.md
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

BIN = Path(sys.executable).parent
NOTHING_COLLECTED = 5


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def slow_tests() -> tuple[int, list[tuple[str, ...]]]:
    """Run `pytest -m slow`; its exit status and one row (what, outcome, seconds, figures) a test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "slow", "-v", f"--junitxml={report}"]
        ).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    rows = []
    for case in cases:
        outcome = next(
            (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
        )
        figures = ", ".join(f"{p.get('name')} {p.get('value')}" for p in case.iter("property"))
        figures = figures or next((skip.get("message") for skip in case.iter("skipped")), "")
        rows.append(
            (
                f"{case.get('classname')}::{case.get('name')}",
                outcome,
                f"{float(case.get('time')):.0f}",
                figures,
            )
        )
    return 0 if status == NOTHING_COLLECTED else status, rows


def slow_notebooks() -> tuple[int, list[tuple[str, ...]]]:
    """Run the notebooks that have cells flagged `#| slow`, those cells included."""
    status, rows = 0, []
    for path in sorted(Path("nbs").rglob("*.ipynb")):
        if not re.search(r'"#\| *slow', path.read_text(encoding="utf-8")):
            continue
        start = time.monotonic()
        code = subprocess.run([BIN / "nbdev-test", path, "--flags", "slow", "--n-workers", "0"]).returncode
        rows.append((path.as_posix(), "failure" if code else "passed", f"{time.monotonic() - start:.0f}", ""))
        status = status or code
    return status, rows


def main(record: Path) -> int:
    commit = output("git", "rev-parse", "--short=12", "HEAD")
    changed = (
        " with uncommitted changes" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
    )
    pytest_status, tests = slow_tests()
    notebook_status, notebooks = slow_notebooks()
    lines = [
        "# The last full run",
        "",
        "Written by `make test-full`; everything that is too slow for `make test`.",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit}{changed}",
        f"- Python {platform.python_version()}, torch {version('torch')}, "
        f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "",
        "| what | outcome | seconds | figures |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in [*tests, *notebooks]),
    ]
    record.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"recorded in {record}")
    return pytest_status or notebook_status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
