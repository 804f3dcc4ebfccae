"""Questions asked of many runs: the comparison, sweeps and ablations, the gradient's variance, costs. Results: results/README.md."""
