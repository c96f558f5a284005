"""``python -m fedss``."""

import sys

from fedss.cli import main

if __name__ == "__main__":
    sys.exit(main())
