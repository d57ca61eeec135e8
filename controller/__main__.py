"""`python -m controller` is `bulkhead`."""

from controller.cli import main

main(prog_name="bulkhead")
