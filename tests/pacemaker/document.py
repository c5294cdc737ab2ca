"""What docs/pacemaker.md tells an operator to write and to run, as it stands there.

The cluster of the tests is made of it: what is wrong in the document fails there.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/pacemaker.md"
INDENT = "    "

# All that differs between the document's hosts and the tests'. Systemd's part is Cluster's.
HERE = {
    r"\bpair=web\b": "pair=guest",  # the lab's only pair
    r"^coloebpf protect web$": "coloebpf protect guest",
}


def here(command: str) -> str:
    """A command of the document, for the lab."""
    for pattern, text in HERE.items():
        command = re.sub(pattern, text, command)
    return command


def _blocks() -> list[list[str]]:
    """Runs of indented lines."""
    found: list[list[str]] = [[]]
    for line in PAGE.read_text().splitlines():
        if line.startswith(INDENT):
            found[-1].append(line.removeprefix(INDENT))
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def _block(start: str) -> list[str]:
    """The only one that begins so."""
    (found,) = [block for block in _blocks() if block[0].startswith(start)]
    return found


def packages() -> list[str]:
    """What the document has an operator install."""
    (line,) = _block("apt-get install ")
    return line.split()[2:]


def corosync_conf() -> str:
    return "\n".join(_block("totem {")) + "\n"


def ring_addresses() -> dict[str, list[str]]:
    """By node: one of each link."""
    pattern = r"name: (\w+)\n\s+nodeid: \d+\n\s+ring0_addr: (\S+)\n\s+ring1_addr: (\S+)"
    return {name: [one, other] for name, one, other in re.findall(pattern, corosync_conf())}


def commands(start: str) -> list[str]:
    """Of the block that begins so, without the remarks behind them."""
    return [line.partition(" #")[0].strip() for line in _block(start)]


def shown(command: str) -> str:
    """What the document says that `command` shows: the remark behind it."""
    (found,) = [
        line.partition(" #")[2].strip() for block in _blocks() for line in block if line.startswith(f"{command} ")
    ]
    return found


def arbiter(other: str) -> tuple[list[str], int]:
    """The pair's fence command and its timeout, on the host whose other one is `other`: the document has it for b."""
    section = tomllib.loads("\n".join(_block("[arbiter.command]")))["arbiter"]["command"]
    assert set(section) == {"fence", "timeout_s"}
    return [other if word == "b" else word for word in section["fence"]], section["timeout_s"]


def in_text(command: str) -> str:
    """A command out of the document's sentences and tables, which must have it."""
    assert f"`{command}`" in PAGE.read_text(), f"docs/pacemaker.md has no `{command}`"
    return here(command)


def fence_parameters() -> dict[str, dict[str, str]]:
    """By node: what its fence device is told."""
    found = {}
    for line in commands("crm configure property "):
        if " stonith:" in line:
            words = line.split()
            settings = dict(word.split("=", 1) for word in words[words.index("params") + 1 :])
            found[settings["pcmk_host_list"]] = settings
    return found
