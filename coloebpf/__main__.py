"""`python -m coloebpf`."""

import sys

from coloebpf.cli import main

if __name__ == "__main__":
    sys.exit(main())
