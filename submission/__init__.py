"""The AlgoPerf submission: K-FAC-expand and K-FAC-reduce."""
