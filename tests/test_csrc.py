"""The build of the compiled libraries: what it makes, and how it goes on without."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mirror_opt.backends import cpp, library

ROOT = Path(__file__).parents[1]

needs_sources = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests"
)


def build(tmp_path, **environment):
    """What a build of the libraries leaves in its package folder, and its report."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
               "--build-temp", str(tmp_path / "temp")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True,
                   capture_output=True)  # fmt: skip
    folder = tmp_path / "lib" / "mirror_opt" / "lib"
    return folder, json.loads((folder / "build.json").read_text())


@needs_sources
def test_the_build_can_be_switched_off(tmp_path):
    folder, report = build(tmp_path, MIRROR_OPT_BUILD_EXT="0")
    assert report == dict.fromkeys(("cpu", "cuda"), "it was not built: MIRROR_OPT_BUILD_EXT=0")
    assert not list(folder.glob("*.so"))


@needs_sources
def test_the_build_goes_on_without_a_compiler(tmp_path):
    folder, report = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert re.match(r"it could not be built: .*no-such-compiler", report["cpu"])
    assert not list(folder.glob("*.so"))


@needs_sources
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_built_without_a_device_only_when_it_is_asked_for(tmp_path):
    environment = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "PATH": "", "CUDA_HOME": ""}
    _, report = build(tmp_path, **environment)
    assert report["cuda"].startswith("it was not built: there was no CUDA device (MIRROR_OPT_BUILD")
    with pytest.raises(subprocess.CalledProcessError) as caught:  # nvcc not found, or without a CXX
        build(tmp_path, MIRROR_OPT_BUILD_EXT="cuda", **environment)
    assert b"libmirror_opt_cuda it could not be built: nvcc" in caught.value.stderr


@needs_sources
def test_what_is_named_and_cannot_be_built_is_an_error(tmp_path):
    environment = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build(tmp_path, MIRROR_OPT_BUILD_EXT="cpu", **environment)
    assert re.search(rb"it could not be built: .*no-such-compiler", caught.value.stderr)
    assert b"Traceback" not in caught.value.stderr


@pytest.mark.skipif(cpp.unavailable() is not None, reason="the CPU library is not built")
class TestLibrary:
    path = library._FOLDER / "libmirror_opt_cpu.so"

    @pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
    def test_it_needs_the_stable_abi_only(self):
        names = subprocess.run(
            ["nm", "-D", "--undefined-only", self.path], check=True, capture_output=True, text=True
        ).stdout.split()
        # Symbols of C++ libraries are mangled with their namespaces.
        assert not [name for name in names if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch)", name)]
        assert [name for name in names if name.startswith("aoti_torch_")]

    def test_instruction_sets_are_chosen_at_run_time(self):
        select = torch.ops.mirror_opt_cpu.instruction_set
        best = select("")
        assert best in ("portable", "avx2", "avx512")
        try:
            assert select("portable") == "portable"
            assert cpp.describe() == "CPU, portable"
            assert select("no such set") == "portable"
            assert select(best) == best
        finally:
            select(best)


@needs_sources
def test_unknown_libraries_are_refused(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "MIRROR_OPT_BUILD_EXT": "cpu, cud"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "MIRROR_OPT_BUILD_EXT: no library cud" in run.stderr
    assert not list(tmp_path.rglob("*.so"))


# Of the macros of LibTorch's stable interface those that the oldest torch that is served has.
MACROS = {
    "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}  # fmt: skip


@needs_sources
def test_the_sources_use_what_the_oldest_torch_has():
    text = "".join(path.read_text() for path in (ROOT / "csrc").iterdir())
    used = set(re.findall(r"\b((?:STABLE|STD|TORCH|C10|AT)_[A-Z_]+)\(", text))
    assert used == MACROS
