"""Research settings of AlgoPerf workloads: a launcher, the paper's budgets, miniature data.

Nothing here is part of the submission: `submission/` never imports this package. The launcher
(`python -m workloads_overrides.launch`) changes workload properties and device assumptions in
memory and then hands over to AlgoPerf's own, unmodified `submission_runner`.
"""
