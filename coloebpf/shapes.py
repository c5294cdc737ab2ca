"""The C structs as ctypes, taken from bcc's Key and Leaf and kept for the pins, so that a command needs no compile."""

import json
from pathlib import Path
from typing import Any

from coloebpf.errors import BpfError

RUN_DIR = Path("/run/coloebpf")


def file_of(pin_dir: Path, run: Path = RUN_DIR) -> Path:
    """Where the shapes of the maps at `pin_dir` are kept; bpffs takes no plain files."""
    return run / "shapes" / (str(pin_dir).strip("/").replace("/", "-") + ".json")


def save(pin_dir: Path, descriptions: dict[str, list[Any]], run: Path = RUN_DIR) -> None:
    """Writes what bcc says of each map's key and leaf: {map: [key, leaf]}; the file is there whole or not at all."""
    path = file_of(pin_dir, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(descriptions))
    draft.replace(path)


def note_source(pin_dir: Path, source: str, run: Path = RUN_DIR) -> None:
    """Keeps what the programs at `pin_dir` were made of."""
    file_of(pin_dir, run).with_suffix(".source").write_text(source)


def noted_source(pin_dir: Path, run: Path = RUN_DIR) -> str:
    """That again; "" if nothing is known."""
    try:
        return file_of(pin_dir, run).with_suffix(".source").read_text()
    except OSError:
        return ""


def forget(pin_dir: Path, run: Path = RUN_DIR) -> None:
    """Removes what save() and note_source() wrote."""
    for suffix in (".json", ".source"):
        file_of(pin_dir, run).with_suffix(suffix).unlink(missing_ok=True)


class Shapes:
    """Types of the maps pinned at `pin_dir`. Raises BpfError if nothing was loaded there since boot."""

    def __init__(self, pin_dir: Path, run: Path = RUN_DIR) -> None:
        from bcc import BPF

        self.path = path = file_of(pin_dir, run)
        try:
            self.said: dict[str, list[Any]] = json.loads(path.read_text())
        except OSError as e:
            raise BpfError(
                f"{path}: {e.strerror}; it tells how to read the maps at {pin_dir}: detach, then load again"
            ) from e
        self._decode = BPF._decode_table_type
        self._made: dict[tuple[str, int], Any] = {}

    def _get(self, name: str, which: int) -> Any:
        if (name, which) not in self._made:
            self._made[name, which] = self._decode(self.said[name][which])
        return self._made[name, which]

    def key(self, name: str) -> Any:
        """ctypes type of the map's key."""
        return self._get(name, 0)

    def leaf(self, name: str) -> Any:
        """ctypes type of the map's value."""
        return self._get(name, 1)
