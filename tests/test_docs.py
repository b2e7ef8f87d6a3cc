"""The API pages are built from the docstrings without a warning, and show the public names."""

import re
import subprocess
import sys
from pathlib import Path

import mirror_opt
from mirror_opt import maps

ROOT = Path(__file__).parent.parent
# What Markdown makes; other words in angle brackets would not be seen.
TAGS = {"a", "br", "code", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p"}
TAGS |= {"pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul", "blockquote"}


def test_the_api_pages_build_without_a_warning(tmp_path):
    # As `make docs` does, elsewhere.
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (pages,) = re.findall(r"^PAGES *= (.*)$", makefile, re.MULTILINE)
    (rule,) = re.findall(r"/python (.* pdoc .*) build/api \$\(PAGES\)", makefile)
    command = [sys.executable, *rule.split(), str(tmp_path), *pages.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    package = (tmp_path / "mirror_opt.html").read_text()
    assert all(name in package for name in mirror_opt.__all__)
    page = (tmp_path / "mirror_opt" / "maps.html").read_text()
    assert all(cls.__name__ in page for cls in maps.REGISTRY.values())
    assert "separable_step_" in (tmp_path / "mirror_opt" / "ops.html").read_text()
    for page in tmp_path.rglob("*.html"):
        for docstring in re.findall(r'<div class="docstring">(.*?)</div>', page.read_text(), re.S):
            prose = re.sub(r"<(pre|code)>.*?</\1>", "", docstring, flags=re.S)
            tags = set(re.findall(r"</?([A-Za-z][\w-]*)", prose))
            assert tags <= TAGS, f"{page.name}: {tags - TAGS} in {docstring}"
            assert "\\|" not in prose, f"{page.name}: {docstring}"


def test_what_is_for_the_command_line_is_there_when_it_is_asked_for():
    code = (
        "import mirror_opt, sys; assert 'matplotlib' not in sys.modules; "
        "mirror_opt.fewshot.Glyphs; mirror_opt.runs.train"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
