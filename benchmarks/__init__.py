"""Measurements beside each other in one run; results go to ``benchmarks/results/`` as JSON."""
