"""``python -m sama_experiments.data_pruning``."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
