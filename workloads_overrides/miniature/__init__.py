"""Miniature data in the on-disk formats of AlgoPerf's workloads, from packages of the registry.

    python -m workloads_overrides.miniature ogbg FOLDER
    python -m workloads_overrides.miniature imagenet FOLDER

A run on such a folder takes the same path through AlgoPerf as one on the full data set, in
seconds and on a CPU. It says nothing about how well anything trains.
"""
