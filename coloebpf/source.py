"""The C source as one text: bcc rewrites map calls only in the file it is given, so our includes are resolved here."""

import re
from pathlib import Path

from coloebpf.errors import BpfError

_HERE = Path(__file__).resolve().parent
BPF_DIR = _HERE / "bpf" if (_HERE / "bpf").is_dir() else _HERE.parent / "bpf"  # a link, in the Debian package
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.M)


def one_text(name: str = "coloebpf.c", directory: Path = BPF_DIR) -> str:
    """`name` with each of our own includes replaced by its file. Raises BpfError for a missing file."""
    path = directory / name
    try:
        text = path.read_text()
    except OSError as e:
        raise BpfError(f"{path}: {e.strerror}; the package is not complete") from e
    return _INCLUDE.sub(lambda m: one_text(m.group(1), directory), text)
