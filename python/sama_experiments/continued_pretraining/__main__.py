"""``python -m sama_experiments.continued_pretraining``."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
