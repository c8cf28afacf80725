"""Real molecules: 35,633 ChEMBL compounds measured against 30 targets, from a package's CSV files.

The package `MoleculeACE` (MIT licence; van Tilborg et al., J. Chem. Inf. Model. 2022) carries its
data inside its wheel. The wheel is fetched with pip, checked against a fixed SHA-256, and only
read: neither it nor its dependencies are installed. A molecule is *active* in a task if 100 nM of
it or less suffice. Features are those of OGB (`smiles2graph`), as in AlgoPerf's ogbg-molpcba.

    python -m quickstart.molecules --data_dir=data
"""

import argparse
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from quickstart.errors import QuickstartError, run_reporting_errors, writing
from quickstart.graphs import PackedGraphs
from quickstart.packages import PackageFile, fetch
from quickstart.smiles import graphs_from_smiles

DEFAULT_DATA_DIR = Path(__file__).resolve().parents[1] / "data"
WHEEL = PackageFile(
    "MoleculeACE==3.0.0",
    "MoleculeACE-3.0.0-py3-none-any.whl",
    "c2028c9a75281eab53d3b3e7dc11cbc8ac970d008bac4a0d3927f11ac2024bdc",
)
ACTIVE_BELOW_NM = 100.0
SPLIT_SEED = 20260101
SPLIT_FRACTIONS = (0.8, 0.1)  # training, validation; the rest is the test set

_CSV_FOLDER = "MoleculeACE/Data/benchmark_data/"
_VERSION = {
    "format": 1,
    "wheel_sha256": WHEEL.sha256,
    "active_below_nm": ACTIVE_BELOW_NM,
    "split_seed": SPLIT_SEED,
    "features": "ogb 1.3.6 smiles2graph",
}
_GRAPH_ARRAYS = ("nodes", "edges", "senders", "receivers", "n_node", "n_bond", "labels")
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class MoleculeData:
    """The molecules and how they are split.

    Attributes:
        graphs: all molecules.
        splits: numbers of the molecules in 'train', 'validation' and 'test'.
        checksum: SHA-256 of all of the above, which names this data set.
    """

    graphs: PackedGraphs
    splits: dict[str, npt.NDArray[np.int64]]
    checksum: str


def cache_path(data_dir: Path) -> Path:
    """Where the prepared molecules lie inside a data folder."""
    return data_dir / "molecules" / "molecules.npz"


def load(data_dir: Path) -> MoleculeData:
    """Reads the prepared molecules.

    Raises:
        QuickstartError: if they are missing, damaged, or were made by another version.
    """
    path = cache_path(data_dir)
    fix = f"run `python -m quickstart.molecules --data_dir={data_dir}`"
    if not path.exists():
        raise QuickstartError(f"no molecules in {data_dir} ({path} is missing): {fix}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        description = json.loads(str(arrays.pop("description")))
        checksum = description.pop("checksum")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise QuickstartError(f"{path} is damaged ({error}): {fix} to make it again") from error
    if description != _VERSION:
        raise QuickstartError(f"{path} was made by another version: {fix} to make it again")
    if checksum != _checksum(arrays):
        raise QuickstartError(f"{path} is damaged (its checksum differs): {fix} to make it again")
    graphs = PackedGraphs(**{name: arrays[name] for name in _GRAPH_ARRAYS})
    return MoleculeData(graphs, {name: arrays[name] for name in _SPLITS}, checksum)


def prepare(data_dir: Path) -> MoleculeData:
    """Reads the prepared molecules, making them first where they are missing or unusable.

    Raises:
        QuickstartError: if the package cannot be fetched, is not the expected one, or the folder
            cannot be written.
    """
    path = cache_path(data_dir)
    if path.exists():
        try:
            return load(data_dir)
        except QuickstartError as error:
            print(f"{error.args[0].split(': run')[0]}; making it again", file=sys.stderr)
    wheel = fetch(WHEEL, data_dir / "downloads")
    smiles, labels = read_activities(wheel)
    graphs, rejected = featurize(smiles, labels)
    if rejected:
        shown = ", ".join(rejected[:3])
        print(f"left out {len(rejected)} SMILES that RDKit rejects: {shown}", file=sys.stderr)
    save(data_dir, graphs)
    return load(data_dir)


def save(data_dir: Path, graphs: PackedGraphs) -> None:
    """Splits the graphs and writes them to the data folder, whole or not at all."""
    arrays: dict[str, npt.NDArray[Any]] = {**asdict(graphs), **random_split(len(graphs))}
    description = json.dumps({**_VERSION, "checksum": _checksum(arrays)})
    with writing(cache_path(data_dir)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, description=np.array(description))


def read_activities(wheel: Path) -> tuple[list[str], npt.NDArray[np.int8]]:
    """Merges the package's 30 CSV files on the SMILES string.

    Returns:
        The SMILES in alphabetical order, and labels (molecules, 30): 1 active, 0 not, -1 unknown.
    """
    import pandas as pd  # Only needed here, and slow to import.

    columns = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(_CSV_FOLDER) and name.endswith(".csv"):
                table = pd.read_csv(io.BytesIO(archive.read(name)))
                activity = table.set_index("smiles")["exp_mean [nM]"]
                columns[Path(name).stem] = (activity <= ACTIVE_BELOW_NM).astype(np.int8)
    merged = pd.DataFrame(columns).sort_index()
    return [str(s) for s in merged.index], merged.fillna(-1).to_numpy(dtype=np.int8)


def featurize(
    smiles: list[str], labels: npt.NDArray[np.int8], processes: int = 2
) -> tuple[PackedGraphs, list[str]]:
    """Turns SMILES into graphs with OGB's features.

    Args:
        smiles: the molecules.
        labels: (molecules, tasks).
        processes: how many processes share the work; 0 does it in this one.

    Returns:
        The graphs of the molecules that RDKit accepts, and the SMILES that it rejects.
    """
    chunks = [smiles[i : i + 256] for i in range(0, len(smiles), 256)]
    graphs: list[dict[str, Any] | None] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("molecules", total=len(smiles))
        for chunk in _map_in_processes(chunks, processes):
            graphs += chunk
            progress.advance(task, len(chunk))
    kept = [graph for graph in graphs if graph is not None]
    if not kept:
        raise QuickstartError("RDKit rejects every molecule: the SMILES column holds no SMILES")
    # OGB lists each bond as two neighbouring edges; one of them is enough.
    bonds = [graph["edge_index"][:, ::2] for graph in kept]
    packed = PackedGraphs(
        nodes=np.concatenate([graph["node_feat"] for graph in kept]).astype(np.uint8),
        edges=np.concatenate([graph["edge_feat"][::2] for graph in kept]).astype(np.uint8),
        senders=np.concatenate([ends[0] for ends in bonds]).astype(np.int16),
        receivers=np.concatenate([ends[1] for ends in bonds]).astype(np.int16),
        n_node=np.array([graph["num_nodes"] for graph in kept], dtype=np.int32),
        n_bond=np.array([ends.shape[1] for ends in bonds], dtype=np.int32),
        labels=labels[[graph is not None for graph in graphs]],
    )
    return packed, [s for s, graph in zip(smiles, graphs, strict=True) if graph is None]


def random_split(count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Random 80/10/10 split of `count` molecules, always the same."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    first = int(SPLIT_FRACTIONS[0] * count)
    second = first + int(SPLIT_FRACTIONS[1] * count)
    parts = (order[:first], order[first:second], order[second:])
    return {name: np.sort(part) for name, part in zip(_SPLITS, parts, strict=True)}


def _map_in_processes(
    chunks: list[list[str]], processes: int
) -> Iterator[list[dict[str, Any] | None]]:
    if processes == 0:
        yield from map(graphs_from_smiles, chunks)
        return
    # Not forked: JAX, which jraph imports, has threads that a fork would cut off.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(graphs_from_smiles, chunks)


def _checksum(arrays: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def describe(data: MoleculeData) -> str:
    """One line about the size of the data set."""
    graphs = data.graphs
    sizes = ", ".join(f"{len(members):,} {name}" for name, members in data.splits.items())
    known = float((graphs.labels >= 0).mean())
    return (
        f"{len(graphs):,} molecules ({sizes}), {graphs.num_tasks} tasks, {known:.1%} of labels "
        f"present, {graphs.n_node.mean():.1f} atoms and {graphs.n_bond.mean():.1f} bonds on average"
    )


def main(arguments: Iterable[str] | None = None) -> int:
    """Prepares the molecules and says what there is."""
    parser = argparse.ArgumentParser(
        prog="python -m quickstart.molecules", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data_dir", "--data-dir", type=Path, default=DEFAULT_DATA_DIR)
    options = parser.parse_args(None if arguments is None else list(arguments))
    print(describe(prepare(options.data_dir.expanduser())))
    return 0


if __name__ == "__main__":
    run_reporting_errors(main)
