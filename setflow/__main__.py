"""``python -m setflow`` is the command ``setflow``."""

import sys

from setflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
