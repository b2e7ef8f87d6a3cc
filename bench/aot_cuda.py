"""What nvcc makes of the CUDA library, without a GPU.

    python bench/aot_cuda.py           # rows as JSON
    python bench/aot_cuda.py --write   # makes them the table of tests/test_aot_cuda.py

The library is built as an installation builds it. A row holds registers a thread, bytes of stack
(arguments of the functions that are not inlined), accesses of 16 bytes, and all instructions of the
module for one architecture; beside the rows stand the bytes that ptxas spilled in all of them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aot import TOOLS, disassemble, parse

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "aot_cuda_table.json"


def build(folder: Path) -> tuple[Path, str]:
    """The library, and what the compiler said of registers and spills."""
    environment = {**os.environ, "MIRROR_OPT_BUILD_EXT": "cuda", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder),
               "--build-temp", str(folder / "temp")]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    library = folder / "mirror_opt" / "lib" / "libmirror_opt_cuda.so"
    if not library.exists():
        report = json.loads((library.parent / "build.json").read_text())
        raise RuntimeError(f"the CUDA library: {report['cuda']}")
    return library, result.stdout + result.stderr


def measure(library: Path) -> list[dict[str, Any]]:
    """One row for each architecture that the library has code for."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [str(TOOLS / "cuobjdump"), "-xelf", "all", str(library)], cwd=folder, check=True,
            capture_output=True,
        )  # fmt: skip
        rows = [row for path in sorted(Path(folder).glob("*.cubin")) if (row := _row(path))]
    return sorted(rows, key=lambda row: row["architecture"])


def _row(cubin: Path) -> dict[str, Any] | None:
    usage, code = disassemble(cubin.read_bytes())
    kernel = re.search(r"Function \S*step_kernel\S*:\s+REG:(\d+) STACK:(\d+)", usage)
    if kernel is None:  # what links the modules
        return None
    operations = [x.operation for x in parse(code)[0]]

    def count(prefix: str) -> int:
        return sum(x.startswith(prefix) and ".128" in x for x in operations)

    return {
        "kernel": "step_",
        "architecture": int(re.search(r"sm_(\d+)", cubin.name).group(1)),
        "registers": int(kernel.group(1)),
        "stack": int(kernel.group(2)),
        "loads_16": count("LDG"),
        "stores_16": count("STG"),
        "instructions": sum(x != "NOP" for x in operations),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--library", type=Path, help="folder in which to leave the library")
    options = parser.parse_args()
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        library, said = build(options.library or Path(folder))
        rows = measure(library)
    if "ptxas info" not in said:
        raise RuntimeError(f"nvcc does not tell of spills: {said}")
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    lines = ",\n".join(map(json.dumps, rows))
    version = re.search(r"V([\d.]+)", release.stdout).group(1)
    text = f'{{"nvcc": "{version}", "spilled_bytes": {spilled}, "rows": [\n{lines}\n]}}\n'
    if options.write:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
