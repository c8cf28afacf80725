"""A laptop-sized AlgoPerf: small real data, the same model families, call order, clock and logs.

`python -m quickstart.runner` trains one submission on one workload, `python -m quickstart`
compares the methods of `settings/`, `python -m quickstart.tuning` tunes them.
"""
