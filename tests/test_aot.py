"""The Triton kernels compiled ahead of time, for architectures that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "aot_table.json"
UPDATE = "if the change is meant, run: python bench/aot.py --write"


@pytest.fixture(scope="module")
def measured() -> dict:
    # A process of its own, since here Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "aot.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_nothing_spills_and_aligned_accesses_take_16_bytes(measured):
    rows = measured["rows"]
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert row["spills"] == 0, row
        # Reductions of rows of a few entries have no 16 bytes in one piece, nor have lines of 9.
        pieces = ("collect", "backward, inverted, rows of 4", "rotated, last mode of 9")
        if not row["kernel"].startswith(pieces) and not row["kernel"].endswith("integers of 1"):
            assert row["loads_16"] > 0, row
            assert row["stores_16"] > 0, row


def test_the_step_does_what_its_certificates_promise(measured):
    key = "hot_special_functions_per_element"
    rows = [row for row in measured["rows"] if key in row]
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    for row in rows:
        # One reciprocal square root a unit at either point, and two reciprocals.
        units = int(row["kernel"].split("K=")[1].split(",")[0])
        assert row[key] == 2 * units + 2, row


def test_registers_and_instructions_are_those_of_the_table(measured):
    table = json.loads(TABLE.read_text())
    if table["triton"] != measured["triton"]:
        pytest.skip(f"the table is of Triton {table['triton']}")
    known = {(row["kernel"], row["architecture"]): row for row in table["rows"]}
    for row in measured["rows"]:
        assert row == known.pop((row["kernel"], row["architecture"]), None), UPDATE
    assert not known, UPDATE
