"""A miniature `ogbg_molpcba:0.1.3`, the TFDS data set that AlgoPerf's ogbg workloads read.

Real molecules: the SMILES of B3DB (registry package `qc-b3db`) through OGB's own featuriser. Task
0 is B3DB's measured label, whether a molecule passes the blood-brain barrier. Seven further tasks
are molecular descriptors above their median, with three labels in ten left out; the other tasks
have no label at all, as the unmeasured assays of molpcba.
"""

import csv
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workloads_overrides.miniature import manifest

WORKLOADS = ["ogbg", "ogbg_gelu", "ogbg_silu", "ogbg_model_size"]
NUM_TASKS = 128
DESCRIPTORS = ("MolLogP", "TPSA", "MolWt", "NumHAcceptors", "NumHDonors", "RingCount", "BertzCT")
MISSING_LABELS = 0.3

# AlgoPerf's batches have room for this many nodes and edges per example of the batch size.
_NODES_PER_EXAMPLE, _EDGES_PER_EXAMPLE = 26, 56
# Graphs of uneven size leave gaps when they are packed into one batch per process.
_PACKING_MARGIN = 1.15
_BATCH_MULTIPLE = 8

Example = dict[str, NDArray[Any]]


def write(folder: Path, train: int, evaluation: int, seed: int) -> None:
    """Writes the data set with `train` molecules, and `evaluation` for validation and for test.

    Raises:
        ValueError: B3DB has fewer usable molecules than asked for.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    count = train + 2 * evaluation
    examples = _labelled(read_molecules(count, seed), seed)
    cuts = {
        "train": slice(0, train),
        "validation": slice(train, train + evaluation),
        "test": slice(train + evaluation, count),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="ogbg_molpcba",
        version="0.1.3",
        features=tfds.builder("ogbg_molpcba:0.1.3").info.features,
        split_datasets={name: list(enumerate(examples[cut])) for name, cut in cuts.items()},
        data_dir=folder,
    )
    largest = max(batch_size_for(examples[cut]) for name, cut in cuts.items() if name != "train")
    manifest.write(folder, WORKLOADS, manifest.properties_for(train, evaluation, largest))


def batch_size_for(examples: list[Example]) -> int:
    """The evaluation batch size at which all examples fit one batch, as AlgoPerf packs graphs."""
    nodes = sum(int(example["num_nodes"][0]) for example in examples)
    edges = 2 * sum(int(example["num_edges"][0]) for example in examples)
    needed = max(len(examples), nodes / _NODES_PER_EXAMPLE, edges / _EDGES_PER_EXAMPLE)
    return _BATCH_MULTIPLE * math.ceil(_PACKING_MARGIN * needed / _BATCH_MULTIPLE)


def read_molecules(count: int, seed: int) -> list[tuple[str, float]]:
    """Returns `count` shuffled (SMILES, passes the barrier) pairs with at least one bond."""
    from rdkit import Chem

    package = importlib.util.find_spec("B3DB")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("B3DB", name="B3DB")
    path = Path(package.submodule_search_locations[0]) / "B3DB_classification.tsv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["SMILES"], row["BBB+/BBB-"]) for row in csv.DictReader(file, delimiter="\t")]
    chosen: list[tuple[str, float]] = []
    for position in np.random.default_rng(seed).permutation(len(rows)):
        smiles, label = rows[position]
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is not None and molecule.GetNumBonds() > 0:
            chosen.append((smiles, float(label == "BBB+")))
        if len(chosen) == count:
            return chosen
    raise ValueError(f"asked for {count} molecules, B3DB has {len(chosen)} usable ones")


def _labelled(molecules: list[tuple[str, float]], seed: int) -> list[Example]:
    from rdkit import Chem
    from rdkit.Chem import Descriptors

    values = np.array(
        [
            [getattr(Descriptors, name)(molecule) for name in DESCRIPTORS]
            for molecule in (Chem.MolFromSmiles(smiles) for smiles, _ in molecules)
        ]
    )
    descriptor_labels = (values > np.median(values, axis=0)).astype(np.float32)
    missing = np.random.default_rng(seed).random(descriptor_labels.shape) < MISSING_LABELS
    labels = np.full((len(molecules), NUM_TASKS), np.nan, np.float32)
    labels[:, 0] = [passes for _, passes in molecules]
    labels[:, 1 : 1 + len(DESCRIPTORS)] = np.where(missing, np.nan, descriptor_labels)
    graphs = _graphs(smiles for smiles, _ in molecules)
    return [{**graph, "labels": row} for graph, row in zip(graphs, labels, strict=True)]


def _graphs(all_smiles: Iterator[str]) -> Iterator[Example]:
    from ogb.utils.mol import smiles2graph

    for smiles in all_smiles:
        graph = smiles2graph(smiles)
        # OGB lists each bond twice in a row, once per direction; molpcba's files hold it once.
        edge_index = graph["edge_index"].T[::2].astype(np.int64)
        yield {
            "num_nodes": np.array([graph["num_nodes"]], np.int64),
            "node_feat": graph["node_feat"].astype(np.float32),
            "num_edges": np.array([len(edge_index)], np.int64),
            "edge_feat": graph["edge_feat"][::2].astype(np.float32),
            "edge_index": edge_index,
        }
