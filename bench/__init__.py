"""Benchmarks: loss, attention, prefix and skipping on one harness, and what a GPU does.

harness.py times cases in turn, memory.py takes their peak memory, results.py and tables.py hold what was found;
`python -m bench.report` makes every table and picture again from bench/results/*.json, without measuring.
"""
