"""What README.md shows a reader to do can be done."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mirror_opt.cli import _parser

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
OPTIMIZER, META = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def printed(code: str, capsys) -> float:
    exec(compile(code, "README.md", "exec"), {})
    (value,) = re.findall(r"tensor\(([-\d.e]+)", capsys.readouterr().out)
    return float(value)


def test_the_drop_in_example_finds_the_truth_that_gradient_descent_does_not(capsys):
    assert printed(OPTIMIZER, capsys) < 0.05
    flat = OPTIMIZER.replace("maps.Hypentropy(beta=1e-4)", "maps.Euclidean()")
    assert flat != OPTIMIZER
    assert printed(flat, capsys) > 0.5


def test_the_meta_learning_example_learns(capsys):
    loop = "for i in range(3000):"
    assert META.count(loop) == 1
    untrained = printed(META.replace(loop, "for i in range(0):"), capsys)
    assert printed(META.replace(loop, "for i in range(150):"), capsys) < untrained / 3


@pytest.mark.parametrize("command", [x for x in COMMANDS if x.startswith("mirror-opt ")])
def test_commands_are_understood(command):
    _, unknown = _parser().parse_known_args(shlex.split(command, comments=True)[1:])
    assert not unknown


def test_targets_of_make_and_files_exist():
    targets = re.findall(r"^make (\w+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    scripts = re.findall(r"`python (bench/\w+\.py)", TEXT)
    assert scripts
    assert [x for x in scripts if not (ROOT / x).exists()] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    links = [x for x in re.findall(r"\]\(([\w./-]+)\)", page.read_text()) if "://" not in x]
    assert [x for x in links if not (page.parent / x).exists()] == []
