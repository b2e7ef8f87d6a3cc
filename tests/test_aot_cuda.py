"""The CUDA library compiled by nvcc, for architectures that need not be here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # whose disassembler is used

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "aot_cuda_table.json"
UPDATE = "if the change is meant, run: python bench/aot_cuda.py --write"

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("cuda")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "aot_cuda.py"), "--library", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), folder / "mirror_opt" / "lib"


def test_every_source_is_in_the_library():
    # The library has one; another would have to be measured too.
    assert [path.name for path in (ROOT / "csrc").glob("*.cu")] == ["step_cuda.cu"]


def test_nothing_spills_and_aligned_accesses_take_16_bytes(built):
    measured, _ = built
    assert measured["spilled_bytes"] == 0
    assert {row["architecture"] for row in measured["rows"]} == {80, 90}
    for row in measured["rows"]:
        assert row["loads_16"] >= 7, row  # parameter, gradient, gain, momentum, anchor, zeta, z_0
        assert row["stores_16"] >= 3, row  # parameter, momentum, zeta


def test_registers_and_instructions_are_those_of_the_table(built):
    measured, _ = built
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != measured["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    assert measured == table, UPDATE


# In a process of its own: the same operators cannot be defined twice, and other tests define them.
LOAD = """
import sys
from pathlib import Path
import torch
from mirror_opt.backends import library

library._FOLDER = Path(sys.argv[1])
print(library.load("cuda") or torch.ops.mirror_opt_cuda.step_.default._schema)
"""


def test_a_forced_build_loads_or_says_what_torch_lacks(built):
    command = [sys.executable, "-c", LOAD, str(built[1])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if torch.version.cuda is None:
        assert "libmirror_opt_cuda.so does not load" in said
        assert "undefined symbol: aoti_torch_get_current_cuda_stream" in said
    else:
        assert said.startswith("mirror_opt_cuda::step_(Tensor(a!)[] params, ")
