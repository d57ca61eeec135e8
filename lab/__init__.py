"""Private Open vSwitch and network namespaces: what the lab, the tests and the benchmarks run in.

Standard library only, so that the system's Python (which has Mininet) and the virtual environment's can both use it.
"""
