"""`python -m rebel`, for `accelerate launch -m rebel train ...`."""

import sys

from rebel.cli import main

if __name__ == "__main__":
    sys.exit(main())
