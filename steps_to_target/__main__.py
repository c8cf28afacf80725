"""Entry point of ``python -m steps_to_target``."""

from steps_to_target.cli import command

if __name__ == "__main__":
    command()
