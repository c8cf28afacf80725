"""Is a workload's data where AlgoPerf will look for it?

If not: which file is missing, and how to get it. AlgoPerf itself finds out after a minute, while it
builds the model, or tries to download. Only that files exist is looked at.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workloads_overrides.errors import LaunchError

if TYPE_CHECKING:
    from workloads_overrides.runner_flags import RunnerFlags

ROOT = Path(__file__).resolve().parents[1]
CLONE = ROOT / ".cache" / "algoperf"
MOLECULES = Path("ogbg_molpcba", "0.1.3")
IMAGENET_V2 = Path("imagenet_v2", "matched-frequency", "3.0.0")
README = 'section "Data" of workloads_overrides/README.md'


def require_data(workload: str, flags: "RunnerFlags") -> None:
    """Checks that the files of ogbg and of the ImageNet workloads are there; others are left alone.

    Args:
        workload: AlgoPerf's name.
        flags: Of the runner, complete.

    Raises:
        LaunchError: Something is missing; the message names it, and the command that gets it.
    """
    data_dir = Path(str(flags.value("data_dir"))).expanduser()
    v2 = flags.value("imagenet_v2_data_dir")
    missing = first_missing(workload, data_dir, Path(v2).expanduser() if v2 else None)
    if missing is not None:
        raise LaunchError(f"{missing}; {how_to_get(workload, data_dir)}")


def first_missing(
    workload: str, data_dir: Path, imagenet_v2_data_dir: Path | None = None
) -> str | None:
    """What is missing first, in words; None if nothing is, or the workload is another one."""
    if workload.startswith("ogbg"):
        return next(_missing_molecules(data_dir), None)
    if workload.startswith("imagenet"):
        return next(_missing_images(data_dir, imagenet_v2_data_dir or data_dir), None)
    return None


def how_to_get(workload: str, data_dir: Path) -> str:
    """The command of AlgoPerf's own set-up script that puts the data into `data_dir`."""
    # The script appends ogbg, or imagenet and pytorch, to the folder that it is given.
    steps = 1 if workload.startswith("ogbg") else 2
    parents = data_dir.expanduser().absolute().parents
    parent = shlex.quote(str(parents[min(steps, len(parents)) - 1]))
    venv = Path(os.environ.get("ALGOPERF_VENV_DIR", ROOT / ".venv-algoperf")).absolute()
    own = venv / "bin" / "python"
    python = shlex.quote(str(own) if own.exists() else sys.executable)
    script = f"(cd {shlex.quote(str(CLONE))} && {python} datasets/dataset_setup.py"
    if workload.startswith("ogbg"):
        size = "37 MB to download, 830 MB on disk"
        command = f"{script} --data_dir={parent} --ogbg)"
    else:
        size = "150 GB to download, as much on disk; register on image-net.org for the two URLs"
        command = (
            f"{script} --data_dir={parent} --temp_dir={parent}/tmp --imagenet "
            "--framework=pytorch --imagenet_train_url=URL --imagenet_val_url=URL)"
        )
    return f"get it ({size}) with\n  {command}\nor see {README}"


def _missing_molecules(data_dir: Path) -> Iterator[str]:
    folder = data_dir / MOLECULES
    if not folder.is_dir() and (data_dir / "ogbg" / MOLECULES).is_dir():
        yield f"{folder} is missing; --data_dir={data_dir / 'ogbg'} has it: give that"
    for name in ("dataset_info.json", "features.json"):
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
    for split in ("train", "validation", "test"):
        pattern = f"ogbg_molpcba-{split}.tfrecord-*"
        found = sorted(folder.glob(pattern))
        if not found:
            yield f"{folder / pattern} is missing"
        wanted = int(found[0].name.rpartition("-of-")[2]) if found else 0
        if len(found) != wanted:
            yield f"{folder}: {len(found)} of {wanted} files {pattern} are there"


def _missing_images(data_dir: Path, imagenet_v2_data_dir: Path) -> Iterator[str]:
    if not (data_dir / "train").is_dir() and (data_dir / "pytorch" / "train").is_dir():
        yield f"{data_dir / 'train'} is missing; --data_dir={data_dir / 'pytorch'}: give that"
    classes = {}
    for split in ("train", "val"):
        folder = data_dir / split
        classes[split] = _folders(folder)
        if not classes[split]:
            archives = "" if split == "train" else " (the archive was unpacked, not sorted)"
            state = f"has no folders of classes{archives}" if folder.is_dir() else "is missing"
            yield f"{folder} {state}"
    if classes["train"] != classes["val"]:
        yield (
            f"{data_dir}: train/ has {len(classes['train'])} classes, val/ has "
            f"{len(classes['val'])} or others"
        )
    info = imagenet_v2_data_dir / IMAGENET_V2 / "dataset_info.json"
    if not info.is_file():
        yield f"{info} is missing (ImageNet v2, the test split)"


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []
