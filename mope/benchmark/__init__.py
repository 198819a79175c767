"""The ops beside what a user would write instead: named shapes, opponents, and measurements that follow a check.

`mope bench` runs it on the user's own device; `bench/` of the repository runs it under pytest-benchmark and keeps the results.
"""
