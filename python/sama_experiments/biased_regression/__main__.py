"""``python -m sama_experiments.biased_regression``."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
