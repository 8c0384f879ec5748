"""Runs the command line: ``python -m lac_vla`` is ``lac``."""

from lac_vla.cli import main

main()
