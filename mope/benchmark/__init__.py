"""Benchmarks of the ops against what a user would write instead, on named shapes. Every result is checked before it is timed.

`mope bench` runs them on the user's own device. `bench/` in the repository runs them under pytest-benchmark and keeps the results.
"""
