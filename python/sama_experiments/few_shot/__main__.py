"""``python -m sama_experiments.few_shot``."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
