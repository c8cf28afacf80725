"""Entry point of ``python -m quickstart``: the study."""

import sys

from quickstart import options


def command() -> None:
    """Reads the command line, and only then imports what training needs."""
    options.parse(sys.argv[1:])
    from quickstart.errors import run_reporting_errors
    from quickstart.study import main

    run_reporting_errors(main)


if __name__ == "__main__":
    command()
