"""``python -m sama_experiments.noisy_finetuning``."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
