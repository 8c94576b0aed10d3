"""`python -m delock`, and `torchrun -m delock train ...`."""

import sys

from delock.cli import main

if __name__ == "__main__":
    sys.exit(main())
