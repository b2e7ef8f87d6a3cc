"""Draws the tables of the pages and the pictures of docs/images from the rows in bench/results.

    python bench/report.py            # rewrites the marked parts of all pages, and the pictures
    python bench/report.py --check    # exit status 1 when a page is not what the rows say

A part of README.md or docs/*.md between ``<!-- rows: NAME -->`` and ``<!-- end -->`` is replaced by
what the part ``NAME`` in ``bench/reports`` makes of the rows. No number in it is written by hand.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from reports import (  # noqa: F401  # they register
    cost,
    defaults,
    fewshot,
    stability,
    steadiness,
    step_cpu,
    training,
    validity,
)
from reports.frame import PARTS, PICTURES, ROOT

MARK = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewritten(page: Path) -> str:
    docs = os.path.relpath(ROOT / "docs", page.parent)

    def fill(match: re.Match) -> str:
        # Links are made for a page in the root.
        made = PARTS[match[2]]().replace("(docs/", f"({docs}/")
        return f"{match[1]}{made}\n{match[3]}"

    return MARK.sub(fill, page.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old, new = page.read_text(), rewritten(page)
        if new != old:
            stale.append(page.name)
            if not check:
                page.write_text(new)
    if check:
        print(f"stale: {', '.join(stale)}" if stale else "all pages say what the rows say")
        return int(bool(stale))
    for draw in PICTURES:
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
