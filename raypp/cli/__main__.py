"""``python -m raypp.cli``."""

from raypp.cli.main import main

main()
