"""Benchmarks. `make bench`: the fused losses beside their peers, into bench/results/."""
