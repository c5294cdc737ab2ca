"""The C structs as ctypes, taken from bcc's Key and Leaf and kept beside the pins' names, so that a command needs no compile."""

import ctypes as ct
import json
from pathlib import Path
from typing import Any

from coloebpf.errors import BpfError

RUN_DIR = Path("/run/coloebpf")


def _file(pin_dir: Path, run: Path) -> Path:
    return run / "shapes" / (str(pin_dir).strip("/").replace("/", "-") + ".json")


def save(pin_dir: Path, descriptions: dict[str, list[Any]], run: Path = RUN_DIR) -> None:
    """Writes what bcc says of each map's key and leaf: {map: [key, leaf]}."""
    path = _file(pin_dir, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(descriptions))


def forget(pin_dir: Path, run: Path = RUN_DIR) -> None:
    """Removes what save() wrote."""
    _file(pin_dir, run).unlink(missing_ok=True)


class Shapes:
    """Types of the maps pinned at `pin_dir`. Raises BpfError if nothing was attached there since boot."""

    def __init__(self, pin_dir: Path, run: Path = RUN_DIR) -> None:
        from bcc import BPF

        try:
            said = json.loads(_file(pin_dir, run).read_text())
        except OSError as e:
            raise BpfError(f"{_file(pin_dir, run)}: {e.strerror}; no dataplane was attached with pins at {pin_dir}") from e
        self._decode = BPF._decode_table_type
        self._said = said
        self._made: dict[tuple[str, int], Any] = {}

    def _get(self, name: str, which: int) -> Any:
        if (name, which) not in self._made:
            self._made[name, which] = self._decode(self._said[name][which])
        return self._made[name, which]

    def key(self, name: str) -> Any:
        """ctypes type of the map's key."""
        return self._get(name, 0)

    def leaf(self, name: str) -> Any:
        """ctypes type of the map's value."""
        return self._get(name, 1)


def as_dict(value: Any) -> Any:
    """A ctypes value as what JSON knows."""
    if isinstance(value, ct.Structure):
        return {name: as_dict(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, ct.Array):
        return [as_dict(x) for x in value]
    return value
