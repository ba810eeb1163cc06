"""Run the command line as ``python -m raypp.cli``."""

from raypp.cli import main

main()
