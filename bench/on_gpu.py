"""What the benchmarks on a GPU share: options, timing, provenance, and going on after a failure.

Imported before anything that imports Triton, which decides then whether to interpret kernels.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from results import revision
from steps import MODELS

from mirror_opt.runs.results import versions


def parsed(parser: argparse.ArgumentParser, models: Sequence[str] = ()) -> argparse.Namespace:
    """The options, with those that all benchmarks have; ``--models`` where there are any."""
    names = lambda text: [x for x in text.split(",") if x]  # noqa: E731
    if models:
        parser.add_argument("--models", type=names, default=models, help=", ".join(MODELS))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, no rows")
    options = parser.parse_args()
    unknown = set(options.models if models else ()) - set(MODELS)
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}: pass some of {', '.join(MODELS)}")
    if options.repeats < 10:
        parser.error(f"--repeats {options.repeats}: pass 10 or more")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device: pass --dry-run to try the script without one")
    return options


class Timer:
    """Seconds of a step: the device's alone, by events, or as a loop on the host sees it."""

    def __init__(self, device: str, repeats: int):
        self.cuda, self.repeats = device != "cpu", repeats
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            # Reading four times what the cache holds leaves nothing of a step there, and nothing
            # that has yet to be written back.
            self.other = torch.zeros(cache, dtype=torch.float32, device=device)
            self.sink = torch.zeros((), dtype=torch.float32, device=device)

    def device(self, step: Callable[[], Any], restore: Callable[[], Any]) -> dict[str, Any]:
        """The device's time of a step that is launched at once (a graph), with a cold cache."""
        for _ in range(3):
            step()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(self.repeats)]
        for start, end in marks:
            restore()
            torch.sum(self.other, 0, out=self.sink)
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return _summary([start.elapsed_time(end) / 1e3 for start, end in marks], self.repeats)

    def host(self, step: Callable[[], Any], restore: Callable[[], Any]) -> dict[str, Any]:
        """A step's share of a loop of steps, whatever is slower, the host or the device."""
        for _ in range(3 if self.cuda else 1):  # compiles, makes tables and states
            step()
        if not self.cuda:  # the time of an interpreter says nothing
            return {}
        each, taken = self.repeats // 10, []
        for _ in range(10):
            restore()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(each):
                step()
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - start) / each)
        return _summary(taken, 10 * each)

    def graph(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of the step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def _summary(seconds: list[float], repeats: int) -> dict[str, Any]:
    cuts = statistics.quantiles(seconds, n=5)
    median = statistics.median(seconds)
    return {"seconds": median, "p20": cuts[0], "p80": cuts[3], "repeats": repeats}


class Attempts:
    """Parts of a benchmark of which each may fail without the others."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.failed.append(what)
            print(f"failed: {what}", flush=True)
            traceback.print_exc()

    def end(self) -> None:
        """Exits with status 1 where something failed."""
        if self.failed:
            sys.exit(f"failed: {'; '.join(self.failed)}")


def nvidia_smi(field: str) -> str:
    """What nvidia-smi says of the first device."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def clock_under(work: Callable[[], Any]) -> float:
    """Hertz of the multiprocessors while the device does some work over and over."""
    seen: list[float] = []

    def look() -> None:
        seen.extend(float(nvidia_smi("clocks.sm")) for _ in range(3))

    looking = threading.Thread(target=look)
    looking.start()
    while looking.is_alive():
        work()
    looking.join()
    torch.cuda.synchronize()
    most = float(nvidia_smi("clocks.max.sm"))
    if not seen or max(seen) < most / 2:
        raise RuntimeError(f"clocks of {seen} MHz under load, where {most} MHz are possible")
    return max(seen) * 1e6


def provenance(device: str) -> dict[str, Any]:
    try:
        known = revision()
    except (OSError, subprocess.CalledProcessError):  # no git, or a tree without its history
        known = "unknown"
    return {
        "revision": known,
        "driver": nvidia_smi("driver_version"),
        "triton": triton.__version__,
        **versions(device),
    }
