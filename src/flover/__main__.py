"""`python -m flover`."""

import sys

from flover.cli import main

if __name__ == "__main__":
    sys.exit(main())
