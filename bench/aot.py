"""What do the compilers make of the Triton kernels? No GPU is needed.

    python bench/aot.py            # prints the rows as JSON
    python bench/aot.py --write    # makes them the table that tests/test_aot.py compares with
    python bench/aot.py --dump DIR # leaves the disassembly there

Every kernel is compiled ahead of time for each architecture and disassembled. A row holds registers
a thread, bytes of local memory (spills), accesses of 16 bytes, all instructions, and for the tiles
of the in-place step the hot path: instructions an element, and special-function instructions among
them, on the longest way through a whole tile that is certified after the second evaluation of psi
(not through masked accesses, the bracketed solve and the report of failures).
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mirror_opt.kernels import kronecker, multi_tensor, plans, separable

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "aot_table.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)

# The first label, or address, predicate, operation and operands of a line of nvdisasm.
LINE = re.compile(
    r"^(\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)(.*)"
)


class Variant(NamedTuple):
    """A kernel, the types of its arguments, what it is compiled for, and elements a thread."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 1
    lanes: int | None = None  # of a tile with a hot path
    aligned: tuple[str, ...] = ("n",)  # integers that are multiples of 16
    registers: int | None = None  # the most that a thread may have


def _pointers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "*fp32")


def _map(kind: tl.constexpr, **shape: int) -> Variant:
    names = "x_ptr gain_ptr w_ptr s_ptr c_ptr out_ptr"
    if kind == separable._STEP:
        names += " g_ptr lr_ptr"
    types = _pointers(names) | dict.fromkeys(("rows", "n", "columns", "gain_rows", "tiles"), "i32")
    shape = {"CB": 1, "NB": 256} | shape
    constants = {"K": 4, "KIND": kind.value, "ROUNDS": separable._ROUNDS, **shape}
    return Variant(separable._map_kernel, types | {"status_ptr": "*i32"}, constants)


def _backward(inverted: bool, **shape: int) -> Variant:
    names = "grad_ptr u_ptr gain_ptr w_ptr s_ptr c_ptr grad_u_ptr grad_gain_ptr partial_ptr"
    types = _pointers(names) | dict.fromkeys(("rows", "n", "columns", "gain_rows", "tiles"), "i32")
    shape = {"CB": 1, "NB": 256} | shape
    return Variant(separable._backward_kernel, types, {"K": 4, "INVERTED": inverted, **shape})


def _step(units: int, **options: Any) -> Variant:
    types = {"tensors_ptr": "*i64", "programs_ptr": "*i64", "status_ptr": "*i32"}
    types |= dict.fromkeys(("lr", "momentum", "weight_decay"), "fp32")
    off = "NESTEROV DECAY MAXIMIZE MOMENTUM ANCHOR DUAL DUAL_INIT LR_ON_DEVICE"
    constants = dict.fromkeys(off.split(), False) | dict.fromkeys(
        ("PARAM", "GRAD", "STATE"), tl.float32
    )
    constants |= {"K": units, "PRIMAL": True, "GAIN": False}
    wide = plans.WIDE
    constants |= {"WIDE": wide, "NARROW": plans.NARROW, **options}
    hot = wide if units <= 8 and constants["PRIMAL"] else None
    return Variant(multi_tensor._step_kernel, types, constants, multi_tensor._WARPS, hot)


def _rotated(n: int, left: bool, channel: tl.constexpr, terms: int = 1) -> Variant:
    types = _pointers("u_ptr factor_ptr gain_ptr w_ptr s_ptr c_ptr out_ptr") | {"eps": "fp32"}
    integers = ("n", "columns", "stretch", "period", "channels", "tiles")
    nb = max(triton.next_power_of_2(n), kronecker._SLICE)
    columns, warps, registers = kronecker._TILES[nb]
    constants = {"T": terms, "K": 4, "LEFT": left, "CHANNEL": channel.value, "NB": nb}
    constants |= {"SLICES": triton.cdiv(n, kronecker._SLICE), "SB": kronecker._SLICE}
    constants |= {"CB": columns}
    types |= dict.fromkeys(integers, "i32")
    aligned = ("n", "columns") if n % 16 == 0 else ("columns",)
    return Variant(kronecker._rotated_kernel, types, constants, warps, None, aligned, registers)


def _ones(variant: Variant) -> Variant:
    """As it is compiled where every integer is 1, which the launcher takes as a constant."""
    integers = [name for name, kind in variant.types.items() if kind == "i32"]
    types = {name: kind for name, kind in variant.types.items() if name not in integers}
    constants = variant.constants | dict.fromkeys(integers, 1)
    return variant._replace(types=types, constants=constants, aligned=())


_HALF = {"PARAM": tl.bfloat16, "GRAD": tl.bfloat16}
_GAIN = {"GAIN": True}
_COLLECT = Variant(
    separable._collect_kernel,
    _pointers("partial_ptr w_ptr s_ptr c_ptr grad_w_ptr grad_s_ptr grad_c_ptr")
    | {"length": "i32", "columns": "i32"},
    {"JB": 32, "CB": 32},
    warps=4,
)
VARIANTS = {
    "forward": _map(separable._FORWARD),
    "inverse": _map(separable._INVERSE),
    "step": _map(separable._STEP),
    "backward": _backward(False),
    "backward, inverted, rows of 4": _backward(True, CB=8, NB=4),
    "collect": _COLLECT,
    "step_, K=8": _step(8),
    "step_, K=16": _step(16),
    "step_, K=4, bfloat16": _step(4, **_HALF),
    "step_, K=4, dual state, momentum, bfloat16": _step(
        4, PRIMAL=False, DUAL=True, MOMENTUM=True, ANCHOR=True, **_GAIN, **_HALF
    ),
    "rotated, last mode of 9": _rotated(9, False, kronecker._ONE),
    "rotated, last mode of 9, 3 terms": _rotated(9, False, kronecker._ONE, 3),
    "rotated, last mode of 32": _rotated(32, False, kronecker._COLUMN),
    "rotated, last mode of 64": _rotated(64, False, kronecker._COLUMN),
    "rotated, first mode of 64": _rotated(64, True, kronecker._LINE),
    "rotated, first mode of 128, 3 terms": _rotated(128, True, kronecker._LINE, 3),
    "step, integers of 1": _ones(_map(separable._STEP)),
    "backward, integers of 1": _ones(_backward(False)),
    "collect, integers of 1": _ones(_COLLECT),
    "rotated, first mode, integers of 1": _ones(_rotated(1, True, kronecker._LINE)),
    "rotated, last mode, integers of 1": _ones(_rotated(1, False, kronecker._ONE)),
}


class Instruction(NamedTuple):
    guarded: bool
    operation: str
    operands: str


def compile_for(variant: Variant, architecture: int) -> bytes:
    """The cubin. Pointers are told to be aligned to 16 bytes, as the launcher finds and tells."""
    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {n: variant.constants.get(n) for n in names if types[n] == "constexpr"}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, n in enumerate(names)
        if types[n].startswith("*") or n in variant.aligned
    }
    source = ASTSource(variant.kernel, types, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": variant.warps, "maxnreg": variant.registers}
    return triton.compile(source, target, options).asm["cubin"]


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource usage, and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            command = (str(TOOLS / command[0]), *command[1:], file.name)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c")


def parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and where labels point to."""
    instructions: list[Instruction] = []
    labels = {}
    for match in filter(None, map(LINE.match, code.splitlines())):
        label, guard, operation, operands = match.groups()
        if label:
            labels[label] = len(instructions)
        else:
            # @!PT and @PT are as good as none.
            guarded = guard is not None and not guard.endswith("PT")
            instructions.append(Instruction(guarded, operation, operands))
    return instructions, labels


def hot_path(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The longest way through the tile loop that no cold block is on."""
    targets = {}
    for i, instruction in enumerate(instructions):
        label = re.search(r"`\((\.L\w+)\)", instruction.operands)
        if instruction.operation.startswith("BRA") and label:
            targets[i] = labels[label.group(1)]
    loops = [(to, at) for at, to in targets.items() if to < at]
    # The loop over tiles is the largest one with whole accesses.
    first, last = max(
        (
            loop
            for loop in loops
            if any("LDG.E.128" in x.operation for x in instructions[loop[0] : loop[1]])
        ),
        key=lambda loop: loop[1] - loop[0],
    )
    cold: set[int] = set()
    for start, end in loops:
        if first < start and end < last:
            cold.update(range(start, end + 1))
    leaders = sorted({first, *targets.values(), *(i + 1 for i in targets), last + 1})
    for start, end in itertools.pairwise(leaders):
        if any(_is_cold(x.operation) for x in instructions[start:end]):
            cold.update(range(start, end))

    @cache
    def after(i: int) -> tuple[int, int] | None:
        """(length, successor) of the longest way from i to the end of the loop."""
        if i == last:
            return (1, -1)
        found = []
        for j in _successors(i, instructions[i], targets.get(i)):
            if i < j <= last and j not in cold and (rest := after(j)):
                found.append((rest[0] + 1, j))
        return max(found, default=None)

    for i in range(last, first, -1):  # so that the recursion stays shallow
        after(i)
    path, i = [], first
    while i >= 0:
        path.append(instructions[i])
        i = after(i)[1]
    return path


def _is_cold(operation: str) -> bool:
    narrow = operation.startswith(("LDG", "STG")) and ".128" not in operation
    return narrow or operation.startswith(("ATOM", "RED."))


def _successors(i: int, x: Instruction, target: int | None) -> Iterator[int]:
    if target is not None:
        yield target
    # Besides the guard, a branch may name further predicates before its target.
    ends = x.operation.startswith(("BRA", "EXIT")) and not re.search(r"U?P\d,", x.operands)
    if x.guarded or not ends:
        yield i + 1


def measure(name: str, architecture: int, dump: Path | None = None) -> dict[str, Any]:
    variant = VARIANTS[name]
    usage, code = disassemble(compile_for(variant, architecture))
    if dump:
        (dump / f"{re.sub('[^0-9a-z]+', '-', name)}.sm_{architecture}").write_text(code)
    instructions, labels = parse(code)
    counts = [x.operation for x in instructions]

    def count(prefix: str, has: str = "") -> int:
        return sum(x.startswith(prefix) and has in x for x in counts)

    row = {
        "kernel": name,
        "architecture": architecture,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": count("LDL") + count("STL"),
        "loads_16": count("LDG", ".128"),
        "stores_16": count("STG", ".128"),
        "instructions": sum(x != "NOP" for x in counts),
    }
    if variant.lanes:
        path = hot_path(instructions, labels)
        each = variant.lanes // (32 * variant.warps)
        row["hot_instructions_per_element"] = round(len(path) / each, 1)
        special = sum(x.operation.startswith("MUFU") for x in path)
        row["hot_special_functions_per_element"] = round(special / each, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--dump", type=Path, help="folder for the disassembly")
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
    names = [name for name in VARIANTS if name.startswith(options.only)]
    rows = [measure(n, a, options.dump) for n in names for a in ARCHITECTURES]
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
    if options.write:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
