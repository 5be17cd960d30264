"""Benchmarks of kernels beside their peers: each is checked against float64, then timed.

A file here for each kernel, with `cases(quick)`: the shapes, how inputs are made, ours, the
reference and the peers. harness.py checks and times them, floor.py says what the device allows.
`python kernels/bench/dense.py` and `llmtrain bench kernels` run them.
"""
