"""Benchmarks: what Carillon's figures are on this machine, beside its peers. `python -m tests.bench --help`."""
