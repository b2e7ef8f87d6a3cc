"""``python -m mirror_opt``: the command ``mirror-opt``."""

import sys

from mirror_opt.cli import main

if __name__ == "__main__":
    sys.exit(main())
