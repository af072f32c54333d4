"""The tool behind ./dev: set-up, tests, linters, benchmarks, the lab.

Runs on Debian's own Python with nothing but its standard library, because it is what installs the rest.
"""
