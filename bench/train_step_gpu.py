"""A whole train step on a GPU, eager, compiled and as a CUDA graph: MirrorDescent, SGD, AdamW.

    python bench/train_step_gpu.py               # needs a CUDA device
    python bench/train_step_gpu.py --dry-run     # tiny, on the CPU, without graphs; no rows

The steps and the perceptron are those of ``compiled_step.py``: forward, backward and step, and the
step alone. A graph reads the learning rate from the device, where a scheduler may change it. All in
one process, medians over repeats, by events on the device.
Rows in $OUT/train_step_gpu.json, or bench/results/train_step_gpu.json.
"""

import argparse
import statistics
from functools import partial

from compiled_step import OPTIMIZERS, WIDTH, Contender
from results import add_rows
from step_gpu import Timer, parsed, provenance

NAME = "train_step_gpu"


def main() -> None:
    options = parsed(argparse.ArgumentParser(description=__doc__.splitlines()[0]), [])
    device, width, compiler = "cuda:0", WIDTH, "inductor"
    if options.dry_run:
        device, width, compiler = "cpu", 8, "aot_eager"
    timer = Timer(device, options.repeats)
    about = {} if options.dry_run else provenance(device)
    for name, make in OPTIMIZERS.items():
        rows = []
        for way in ("eager", "compiled", *["graph"] * timer.cuda):
            contender = Contender(make, compiler if way == "compiled" else None, device, width)
            for what in ("train", "step"):
                call = getattr(contender, what)
                seconds = timer(timer.graph(call) if way == "graph" else call, partial(int))
                cuts = statistics.quantiles(seconds, n=5)
                row = {
                    "name": name,
                    "what": what,
                    "way": way,
                    "parameters": contender.parameters,
                    "seconds": statistics.median(seconds),
                    "p20": cuts[0],
                    "p80": cuts[3],
                    "repeats": len(seconds),
                }
                rows.append(row | about)
                took = "ran" if options.dry_run else f"{row['seconds'] * 1e6:12.1f} us"
                print(f"{name:32} {what:6} {way:9}", took, flush=True)
        if not options.dry_run:
            add_rows(NAME, rows)


if __name__ == "__main__":
    main()
