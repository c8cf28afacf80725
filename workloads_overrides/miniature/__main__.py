"""Command line: `python -m workloads_overrides.miniature {ogbg,imagenet} FOLDER`."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp

REQUIREMENTS = {
    "ogbg": "tensorflow-cpu tensorflow-datasets rdkit qc-b3db, and `--no-deps ogb==1.3.6`",
    "imagenet": "tensorflow-cpu tensorflow-datasets scikit-image scikit-learn pillow",
}
DEFAULT_SIZES = {"ogbg": (3000, 500), "imagenet": (640, 80)}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one miniature data folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workloads_overrides.miniature",
        description="Write miniature data in the on-disk format of an AlgoPerf workload.",
    )
    parser.add_argument("data", choices=sorted(REQUIREMENTS), help="which data set to imitate")
    parser.add_argument("folder", type=Path, help="new folder, to be given as --data_dir")
    parser.add_argument("--train", type=int, help="training examples")
    parser.add_argument("--evaluation", type=int, help="examples for validation, and for test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    train, evaluation = DEFAULT_SIZES[options.data]
    train = train if options.train is None else options.train
    evaluation = evaluation if options.evaluation is None else options.evaluation
    if min(train, evaluation) < 1:
        parser.error("--train and --evaluation must be at least 1")
    folder = options.folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"{folder} exists already; give a new folder")
    try:
        write_whole(
            folder, lambda part: _write(options.data, part, train, evaluation, options.seed)
        )
    except ImportError as error:
        needed = REQUIREMENTS[options.data]
        print(f"error: {error}; install with pip: {needed}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}: {train} training examples, {evaluation} each to validate and to test")
    return 0


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder beside the final one and renames it: all of it, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(part)
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(data: str, folder: Path, train: int, evaluation: int, seed: int) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no word about CPU instructions
    # TensorFlow takes seconds to import and may be missing: only where data is really written.
    if data == "ogbg":
        from workloads_overrides.miniature import molecules

        molecules.write(folder, train, evaluation, seed)
    else:
        from workloads_overrides.miniature import photographs

        photographs.write(folder, train, evaluation, seed)


if __name__ == "__main__":
    sys.exit(main())
