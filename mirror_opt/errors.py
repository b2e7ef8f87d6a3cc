"""The exception for input that a person can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be used.

    The message is one line: what is wrong, the value that was given, and what to pass instead.
    It is raised before any state changes. The command line prints it and exits with status 2.
    """
