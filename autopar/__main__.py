"""`python -m autopar`."""

import sys

from autopar.cli.main import process

if __name__ == "__main__":
    sys.exit(process())
