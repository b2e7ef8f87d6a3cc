"""What the pages say is what the rows say."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def test_pages_are_drawn_from_the_rows():
    command = [sys.executable, str(BENCH / "report.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}: run bench/report.py"


def test_the_default_rates_are_the_steadiest_of_the_rows():
    command = [sys.executable, "-c", "from reports.defaults import check; check()"]
    result = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
