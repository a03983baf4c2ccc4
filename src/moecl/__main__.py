"""`python -m moecl`."""

from moecl.cli import main

main()
