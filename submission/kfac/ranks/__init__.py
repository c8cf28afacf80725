"""Several processes: sums over ranks, and who makes which inverse."""
