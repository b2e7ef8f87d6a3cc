"""Small runs of the command line, and how it ends."""

from mirror_opt.cli import main

SMALL = [
    *("--iterations", "2", "--tasks-per-batch", "2", "--queries", "2", "--train-steps", "1"),
    *("--adapt-steps", "0,1", "--test-tasks", "2"),
]
IMAGES = ["--ways", "2", "--filters", "2", *SMALL]


def run(*arguments):
    """The exit status, argparse's own exits included."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def fails(capsys, *arguments):
    """The one line that a command refuses with."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("mirror-opt: error: ")
    return line
