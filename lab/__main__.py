"""`python -m lab` is `bulkhead lab`."""

from lab.cli import lab

lab(prog_name="bulkhead lab")
