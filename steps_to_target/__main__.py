"""Entry point of ``python -m steps_to_target``."""

import sys

from steps_to_target.cli import main

if __name__ == "__main__":
    sys.exit(main())
