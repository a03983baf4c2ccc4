"""`python -m moecl`."""

import sys

from moecl.cli import main

if __name__ == "__main__":
    sys.exit(main())
