"""Ours against SOAP, Muon, Shampoo, NAdamW and Nesterov on six small real tasks.

Every method is tuned with as many points; the best point of each then runs with the study's seeds.
Runs write logs, a run with a log is not done again, and several processes may share a folder.
`python -m experiments.optimizers.page` writes docs/optimizers.md from the logs.

SOAP, Muon and Shampoo need the packages of requirements/experiments.txt.
"""

from experiments.optimizers.command import PAPER, PAPER_SIZE, SMALL, add_flags, draw, run, tables

__all__ = ["PAPER", "PAPER_SIZE", "SMALL", "add_flags", "draw", "run", "tables"]
