"""SMILES to graphs with OGB's features; apart, so that worker processes import little."""

import sys
from typing import Any


def graphs_from_smiles(smiles: list[str]) -> list[dict[str, Any] | None]:
    """OGB's graph for each SMILES, None where RDKit finds no molecule in it."""
    # OGB asks the network for a newer release of itself if the package `outdated` can be imported.
    sys.modules.setdefault("outdated", None)  # type: ignore[arg-type]
    from ogb.utils.mol import smiles2graph
    from rdkit import Chem, rdBase

    rdBase.DisableLog("rdApp.*")
    graphs: list[dict[str, Any] | None] = []
    for text in smiles:
        molecule = Chem.MolFromSmiles(text)  # smiles2graph itself crashes on a rejected SMILES
        usable = molecule is not None and molecule.GetNumAtoms() > 0
        graphs.append(smiles2graph(text) if usable else None)
    return graphs
