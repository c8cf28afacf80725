"""Writes the folder that AlgoPerf's submissions repository expects.

external_tuning/kfac/ or self_tuning/kfac/ below FOLDER: the submission, requirements, licence and
readme, and for external tuning the search space.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = "# Needs nothing beyond AlgoPerf and its PyTorch.\n"


def write(folder: Path, ruleset: str) -> Path:
    """Writes the package below a folder, whole or not at all; returns where it is.

    Raises:
        FileExistsError: it is there already.
        OSError: the folder cannot be written.
    """
    target = folder / f"{ruleset}_tuning" / "kfac"
    if target.exists():
        raise FileExistsError(f"{target} exists: move it away first")
    half = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(ROOT / "submission", half, ignore=shutil.ignore_patterns("__pycache__"))
        files = ["LICENSE", *(["tuning_search_space.json"] if ruleset == "external" else [])]
        for name in files:
            shutil.copyfile(ROOT / name, half / name)
        (half / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
        half.rename(target)
    except shutil.Error as error:  # has a triple for each file: from, to, why
        raise OSError(error.args[0][0][2]) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes it and says where."""
    parser = argparse.ArgumentParser(
        prog="./run.sh package", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--ruleset", choices=("external", "self"), default="external")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", metavar="FOLDER",
                        help="default: dist")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        print(write(options.folder, options.ruleset))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
