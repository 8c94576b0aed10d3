"""`python -m delock`, and `torchrun -m delock train ...`."""

import os
import sys

from delock.cli import main
from delock.cli.ranks import is_rank_zero

if __name__ == "__main__":
    code = main()
    if (
        not is_rank_zero()
    ):  # a rank with nothing left to write: torch's threads have been seen to abort a process that takes its time to leave
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
