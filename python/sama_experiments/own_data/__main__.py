"""``python -m sama_experiments.own_data``, which is ``sama-kernels``."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
