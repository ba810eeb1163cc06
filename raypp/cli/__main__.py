"""Run the command line as ``python -m raypp.cli.main``."""

from raypp.cli.main import main

main()
