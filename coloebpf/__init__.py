"""coloebpf: non-stop service for Xen guests, with COLO's output comparison in eBPF."""

import sys
from pathlib import Path

__version__ = "0.1.0"

_VENDORED = Path(__file__).parent / "_vendor"  # the Debian package's: libraries that Debian lacks, or has too old
if _VENDORED.is_dir():
    sys.path.insert(0, str(_VENDORED))
