"""Wheel and sdist: built, installed into clean environments elsewhere, and run."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMOKE = """
import pathlib, torch, mirror_opt
from mirror_opt import MirrorDescent, backends, maps
assert pathlib.Path(mirror_opt.__file__).is_relative_to({place!r}), mirror_opt.__file__
w = torch.ones(8, 4, requires_grad=True)
optimizer = MirrorDescent([w], 0.1, maps.SeparableNeural([w]), momentum=0.9)
for _ in range(3):
    optimizer.zero_grad()
    w.square().sum().backward()
    optimizer.step()
assert w.square().sum() < 32
print("library" if backends.cpp.unavailable() is None else "plain")
"""


def run(*command, cwd, **environment):
    # Only what an installation elsewhere has: nothing of this checkout.
    ours = ("PYTHON", "COVERAGE", "MIRROR_OPT")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**outside, **environment}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What is checked in, and no build of it."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if files.returncode:
        pytest.skip("this is no git checkout")
    for name in files.stdout.splitlines():
        if name.split("/")[0] not in ("bench", "tests") and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


def build(hook, source, target, **environment):
    """The file that a hook of the build backend makes."""
    code = f"from setuptools import build_meta as b; print(b.{hook}({str(target)!r}))"
    output = run(sys.executable, "-W", "ignore", "-c", code, cwd=source, **environment)
    return target / output.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("build_sdist", source, tmp_path_factory.mktemp("sdist"))


def unpacked(sdist, folder):
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def installed(wheel, folder):
    """The Python of a new environment that has the wheel, and sees the dependencies of this one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    place = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(place.strip())
    # Behind the wheel's own place on the path, and without the hook of an editable installation.
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{p}\n" for p in others))
    return python, site


def test_what_the_readme_shows_is_in_the_sdist(sdist, tmp_path):
    tree = unpacked(sdist, tmp_path / "unpacked")
    shown = re.findall(r"\]\((?!https?:)([^)#]+)", (tree / "README.md").read_text())
    assert any(name.endswith(".png") for name in shown)
    assert [name for name in [*shown, "CHANGELOG.md"] if not (tree / name).exists()] == []


# The sdist's wheel, with a compiler, is built of the same files as the tree's.
@pytest.mark.parametrize(
    ("kind", "compiler"), [("wheel", False), ("sdist", False), ("sdist", True)]
)
def test_a_clean_installation_runs(kind, compiler, source, sdist, tmp_path):
    if compiler and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no compiler")
    tree = source if kind == "wheel" else unpacked(sdist, tmp_path / "unpacked")
    (tmp_path / "wheels").mkdir()
    flag = {} if compiler else {"MIRROR_OPT_BUILD_EXT": "0"}
    wheel = build("build_wheel", tree, tmp_path / "wheels", **flag)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("libmirror_opt_cpu.so") for name in names) == compiler
    assert {"mirror_opt/kernels/separable.py", "mirror_opt/py.typed"} <= set(names)
    assert not any(name.startswith(("tests", "bench", "csrc")) for name in names)
    python, site = installed(wheel, tmp_path / "environment")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    served = run(python, "-c", SMOKE.format(place=str(site)), cwd=elsewhere)
    assert served.split() == ["library" if compiler else "plain"]
    info = run(python.parent / "mirror-opt", "info", cwd=elsewhere)
    assert ("MIRROR_OPT_BUILD_EXT=0" in info) == (not compiler)


def test_importing_the_package_does_not_load_the_compiler():
    # It takes as long to load as torch itself.
    code = "import sys, mirror_opt.cli; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
