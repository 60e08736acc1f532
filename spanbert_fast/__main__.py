"""`python -m spanbert_fast`, the same as the `spanbert-fast` command."""

import sys

from spanbert_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
