r"""The command ``mirror-opt``: train, evaluate, compare, plot, maps, info.

Input that cannot be used gives one line on stderr and exit status 2, an interruption status 130, a
reader of the output that has left status 141.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from mirror_opt import fewshot, meta
from mirror_opt.errors import InputError
from mirror_opt.runs import listing, plots, results
from mirror_opt.runs.compare import METHODS, compare, open_comparison
from mirror_opt.runs.config import GUARDS, stated_default
from mirror_opt.runs.directory import CONFIG
from mirror_opt.runs.evaluate import evaluate_run
from mirror_opt.runs.options import resume_command
from mirror_opt.runs.train import open_run, train

__all__ = ["main"]

_TRAINING = ("train", "compare")
_ROOM = ("with room to write", "needs room to write")
_RIGHTS = ("that can be read and written", "has to be readable and writable")
# By the error where --out cannot be written: which to pass, and what one that is there needs.
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    0: ("that is a directory, or can be made one", "has to be a directory to read and write in"),
}
# What is no part of what a run is.
_HOW = (
    "command",
    "function",
    "parser",
    "out",
    "resume",
    "overwrite",
    "replaced",
    "download",
    "save_every",
    "methods",
)


class _Parser(argparse.ArgumentParser):
    r"""Reports a mistake in one line, without the usage, which is several."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mirror-opt: error: {message} (see: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs the command line ``argv`` (default: the process's own); returns the exit status."""
    arguments = argparse.Namespace()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every encoding has the sign of an interval
    try:
        try:
            _, unknown = _parser().parse_known_args(argv, arguments)
            if unknown:  # told by the command's own parser, whose help has the options
                arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            _check_out(arguments)
            arguments.function(arguments)
        finally:
            _flush()
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return 141
    except OSError as error:
        return _fail(_told(error, arguments))
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(
            "not enough memory; pass a smaller network or smaller tasks (--filters, --shots, "
            "--queries, --tasks-per-batch), or another --device"
        )
    return 0


def _flush() -> None:
    r"""Writes what is left of the output while a failure can still be told."""
    try:
        print(end="", flush=True)
    except OSError as error:
        # The interpreter would try once more at exit, and print what happens.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(
            f"standard output: {error.strerror}; send it where there is room to write"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises an error like any other, or fails to count so many bytes; numpy and
    # torch have words of their own for sizes that no machine can address.
    signs = (
        "can't allocate memory",
        "Storage size calculation overflowed",
        "array is too big",
        "Maximum allowed dimension exceeded",
        "Overflow when unpacking long",
    )
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in signs)


def _fail(message: str) -> int:
    print(f"mirror-opt: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _told(error: OSError, arguments: argparse.Namespace) -> str:
    r"""The file and the reason, and what to pass where it is --out that cannot be written."""
    message = f"{error.filename}: " if error.filename else ""
    message += error.strerror or str(error)
    if "out" not in arguments and arguments.command not in _TRAINING:
        return message
    if isinstance(error.filename, str) and _cannot_write(error.filename, _out(arguments)):
        is_new = arguments.command in _TRAINING and "resume" not in arguments
        new, old = advice = _ADVICE.get(error.errno or 0, _ADVICE[0])
        if advice is _ROOM and (command := _to_go_on(arguments)):
            message += f"; free some space, then go on with: {command}"
        else:
            message += f"; pass an --out {new}" if is_new else f"; it {old}"
    return message


def _cannot_write(name: str, out: Path) -> bool:
    r"""Whether a file that failed is in ``out``, or a folder around it, and was not for reading."""
    path, top = os.path.abspath(name), os.path.abspath(out)
    unreadable = os.path.isfile(path) and not os.access(path, os.R_OK)
    return os.path.commonpath([path, top]) in (path, top) and not unreadable


def _interrupted(arguments: argparse.Namespace) -> int:
    hint = ""
    if getattr(arguments, "command", None) in _TRAINING:
        command = _to_go_on(arguments)
        hint = f"; go on with: {command}" if command else "; the run had not begun"
    print(f"mirror-opt: interrupted{hint}", file=sys.stderr)
    return 130


def _to_go_on(arguments: argparse.Namespace) -> str | None:
    r"""The command that goes on with the training that was stopped; None before it has begun."""
    if arguments.command not in _TRAINING:
        return None
    out = _out(arguments)
    # A run that was to be replaced is not the one that was stopped.
    if _stamp(out) in (None, getattr(arguments, "replaced", None)):
        return None
    moved = "resume" in arguments and "data_dir" in arguments
    data = {"data_dir": arguments.data_dir} if moved else {}
    return resume_command(arguments.command, out, **data)


def _stamp(out: Path) -> int | None:
    r"""What tells one writing of a run's config from another; None where there is no config."""
    path = out / CONFIG
    return path.stat().st_mtime_ns if path.exists() else None


# The commands.


def _train(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    modes = _modes(arguments)
    config = open_run(out, _given(arguments), **modes)
    rows = train(config, out, overwrite=modes["overwrite"], **_how(arguments))
    _finish(out, rows)


def _compare(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    modes = _modes(arguments)
    methods = None
    if "methods" in arguments:
        methods = tuple(name.strip() for name in arguments.methods.split(","))
    configs = open_comparison(out, _given(arguments), methods, **modes)
    rows = compare(configs, out, overwrite=modes["overwrite"], **_how(arguments))
    _finish(out, rows)


def _evaluate(arguments: argparse.Namespace) -> None:
    print(results.table(evaluate_run(arguments.out, _given(arguments))))


def _plot(arguments: argparse.Namespace) -> None:
    for path in plots.draw(arguments.out, data_dir=getattr(arguments, "data_dir", None)):
        print(path)


def _maps(arguments: argparse.Namespace) -> None:
    print(listing.of_maps())


def _info(arguments: argparse.Namespace) -> None:
    print(listing.of_what_is_here())


def _finish(out: Path, rows: list[dict[str, Any]]) -> None:
    print(results.table(rows))
    plots.draw(out)
    print(f"results, checkpoints and plots are in {out}")


# What was given.


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name not in _HOW}


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("download", "save_every")
    return {name: getattr(arguments, name) for name in names if name in arguments}


def _modes(arguments: argparse.Namespace) -> dict[str, bool]:
    modes = {name: name in arguments for name in ("resume", "overwrite")}
    arguments.replaced = _stamp(_out(arguments)) if modes["overwrite"] else None
    return modes


def _check_out(arguments: argparse.Namespace) -> None:
    if "out" in arguments and os.path.exists(arguments.out) and not os.path.isdir(arguments.out):
        raise InputError(f"--out {arguments.out} is not a directory; pass one, or one to be made")


def _out(arguments: argparse.Namespace) -> Path:
    if "out" in arguments:
        return Path(arguments.out)
    name = getattr(arguments, "method", "mirror") if arguments.command == "train" else "compare"
    return Path("runs") / f"{getattr(arguments, 'task', 'unnamed')}-{name}"


# The options. None has a default here: what was not given is told apart, so that a resumed run
# keeps its own, and the defaults depend on task and method.


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mirror-opt",
        description="Meta-learn mirror maps on few-shot tasks, and compare them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version("mirror_opt"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        sub.set_defaults(function=function, parser=sub)
        return sub

    sub = command("train", _train, "meta-train one method and evaluate it on new tasks")
    sub.add_argument("--method", help=f"{', '.join(meta.METHODS)} (default: mirror)")
    _training_options(sub)
    sub = command("compare", _compare, "train several methods on the same tasks and budget")
    sub.add_argument(
        "--methods",
        help=f"comma-separated, of {', '.join(meta.METHODS)} (default: {','.join(METHODS)})",
    )
    _training_options(sub)
    sub = command("evaluate", _evaluate, "evaluate the checkpoints of a run on new tasks")
    _task_options(sub, trained=True)
    _evaluation_options(sub, trained=True)
    sub.add_argument("--out", type=_directory, required=True, help="the run's directory")
    sub = command("plot", _plot, "redraw the pictures of a run from its rows and checkpoints")
    sub.add_argument("--data-dir", help="where the data of omniglot or folder is now")
    sub.add_argument("--out", type=_directory, required=True, help="the run's directory")
    command("maps", _maps, "list the mirror maps")
    command("info", _info, "versions, devices, data and cache folders, backends")
    return parser


def _training_options(sub: argparse.ArgumentParser) -> None:
    _task_options(sub)
    add = sub.add_argument
    add("--map", help="the mirror map of method mirror (default: kronecker; see: mirror-opt maps)")
    add("--map-options", help="options of the map as name=value,..., such as terms=4,units=4")
    stated = _adder(sub, trained=False)
    stated("--iterations", stated_default("iterations"), "meta-iterations", type=int)
    per_batch = stated_default("tasks_per_batch")
    stated("--tasks-per-batch", per_batch, "tasks per meta-iteration", type=int)
    steps = "inner steps trained through: 5, or 1-5 for a random number"
    stated("--train-steps", stated_default("train_steps"), steps)
    rate = "by method and task"
    stated("--lr", rate, "inner step size alpha", type=float)
    stated("--init-lr", rate, "outer rate of the initialisation", type=float)
    stated("--map-lr", rate, "outer rate of the map's parameters", type=float)
    add("--learn-lr", action="store_true", help="learn a rate for each inner step, from --lr on")
    stated("--rate-lr", rate, "outer rate of the inner rates, with --learn-lr", type=float)
    add("--seed", type=int, help="decides initialisation and tasks (default: 0)")
    _evaluation_options(sub)
    default = "runs/TASK-METHOD, or runs/TASK-compare"
    add("--out", type=_directory, help=f"the run's directory (default: {default})")
    existing = sub.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in --out")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add("--download", action="store_true", help="fetch Omniglot from its official source")
    add("--save-every", type=float, help="seconds between checkpoints (default: 30)")


def _task_options(sub: argparse.ArgumentParser, trained: bool = False) -> None:
    add = _adder(sub, trained)
    add("--task", "", ", ".join(fewshot.TASKS))
    if not trained:  # the network is made for them
        add("--ways", stated_default("ways"), "classes per task", type=int)
        add("--filters", stated_default("filters"), "filters of the Conv4 network", type=int)
    shots, queries = stated_default("shots"), stated_default("queries")
    add("--shots", shots, "support examples per class, or points of a curve", type=int)
    add("--queries", queries, "query examples per class, or points of a curve", type=int)
    add("--data-dir", "MIRROR_OPT_DATA", "the data of omniglot or folder")
    add("--task-options", "", "further options of the task, such as split=background")


def _evaluation_options(sub: argparse.ArgumentParser, trained: bool = False) -> None:
    add = _adder(sub, trained)
    add("--adapt-steps", "0,1,2,3,5,10", "step counts to evaluate after")
    add("--test-tasks", stated_default("test_tasks"), "new tasks to evaluate on", type=int)
    guards = ", ".join(GUARDS)
    add("--guard", "auto", f"step-size safeguard: {guards}; auto: past the trained steps")
    add("--threads", "torch's", "CPU threads; 1 for shared cores", type=int)
    sub.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")


def _directory(text: str) -> str:
    if not text:  # as a path it would be the current directory
        raise argparse.ArgumentTypeError("pass a directory")
    return text


def _adder(sub: argparse.ArgumentParser, trained: bool) -> Callable[..., None]:
    r"""Adds options with their default, which is that of the run where one is ``trained``."""

    def add(name: str, default: str, help: str, **how: Any) -> None:
        default = "the run's" if trained else default
        sub.add_argument(name, help=f"{help} (default: {default})" if default else help, **how)

    return add


if __name__ == "__main__":
    sys.exit(main())
