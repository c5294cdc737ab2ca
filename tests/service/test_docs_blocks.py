"""Every block of the documentation is something that a test knows: configuration, commands, or drawn text that is named here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coloebpf.cli import parser
from coloebpf.errors import ConfigError
from coloebpf.lab.plan import RUN_ROOT
from coloebpf.service.config import Config, parse
from coloebpf.service.config_example import example
from tests.service.test_docs import PAGES, TREE, blocks
from tests.xen.__main__ import _parser as xen_parser

# What is neither configuration nor typed: pictures, and what commands print. Each by its page and its beginning.
DRAWN = (
    ("README.md", "                          client\n"),
    ("design.md", "client -> bridge -> [P1 p1_mirror]"),
    (
        "libxl-colo.md",
        "xl remus -c -p -s '' web \"exec python -m coloebpf.xen.relay SOCKET\"        xl migrate-receive",
    ),
    ("operations.md", "ok   config "),
    ("operations.md", "23 ok, 1 to look at"),
    ("operations.md", "host primary: coloebpf"),
    ("operations.md", "guest (pair 0, primary): lockstep"),
    ("operations.md", "  dataplane   0 of"),
    ("operations.md", "pair guest, role pri, state lockstep"),
    ("operations.md", "tc:\n"),
    ("operations.md", "INFO coloebpf.pair: checkpoint"),
    ("qemu.md", "SVM of checkpoint n:"),
    ("xen-disks.md", "PVM -- quorum -- image                 SVM -- replication"),
    ("xen.md", "bridge -- web0 (hooks)"),
)


# ---- what commands may be --------------------------------------------------------------------------------------------------------


def starts_with(*beginnings: str) -> Callable[[list[str]], bool]:
    return lambda words: any(" ".join(words).startswith(begin) for begin in beginnings)


def a_script(words: list[str]) -> bool:
    """Of this tree: it has the argument that it is given."""
    text = (TREE / words[0]).read_text()
    return len(words) == 1 or re.search(rf"^\s*([\w|]+\|)?{re.escape(words[1])}(\|[\w|]+)?\)", text, re.M) is not None


def of_tests_xen(words: list[str]) -> bool:
    if words[1:3] != ["-m", "tests.xen"]:
        return False
    rest = words[3:]
    try:
        xen_parser().parse_args(rest[: rest.index("--")] if "--" in rest else rest)
    except SystemExit:
        return False
    return True


def of_coloebpf(words: list[str]) -> bool:
    """`...` stands for what the reader has to fill in."""
    rest = ["x" if word == "..." else word for word in words[1:]]
    try:
        parser().parse_args(rest[: rest.index("--")] if "--" in rest else rest)
    except SystemExit:
        return False
    return True


def a_filter(words: list[str]) -> bool:
    """jq can compile it: with nothing to read it does no more."""
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def packages(words: list[str]) -> bool:
    if words[1] != "install":
        return False
    names = [word for word in words[2:] if not word.startswith(("./", "DIRECTORY"))]
    return all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name) for name in names) and known(names)


def known(names: list[str]) -> bool:
    """To apt, if it knows any packages at all."""

    def shown(name: str) -> bool:
        return subprocess.run(["apt-cache", "show", name], capture_output=True, check=False).returncode == 0

    return not shown("base-files") or all(map(shown, names))


def run_here(words: list[str]) -> bool:
    return subprocess.run(words, cwd=TREE, capture_output=True, check=False).returncode == 0


CHECKS: dict[str, Callable[[list[str]], bool]] = {
    "coloebpf": of_coloebpf,
    "make": lambda words: all(re.search(rf"^{word}:", (TREE / "Makefile").read_text(), re.M) for word in words[1:]),
    "apt-get": packages,
    "deploy/install-deps.sh": a_script,
    "deploy/xen/rebuild.sh": a_script,
    ".venv/bin/python": of_tests_xen,
    "promtool": run_here,
    "mv": lambda words: len(words) > 2,
    "cp": lambda words: (TREE / words[1]).exists(),
    "jq": a_filter,
    "grep": lambda words: bool(re.compile(words[-1])),
    "ls": starts_with("ls /sys/fs/bpf/coloebpf/lab/lab/primary"),
    # Maps and programs: test_docs.py.
    "bpftool": starts_with("bpftool map dump pinned ", "bpftool map lookup pinned ", "bpftool -j map "),
    "ip": starts_with("ip netns exec colo-lab-primary bpftool net show"),
    f"{RUN_ROOT}/lab/switch-off-primary": lambda words: len(words) == 1,
    "systemctl": lambda words: words[1] in ("enable", "restart", "reload", "stop", "start")
    and set(words[2:]) <= {"--now", "coloebpf", "corosync", "pacemaker"},
    # Run by test_etcd_access.py in the form of etcd's own requests.
    "etcdctl": starts_with(
        "etcdctl role add", "etcdctl role grant-permission coloebpf --prefix=true readwrite /coloebpf/", "etcdctl user "
    ),
    # Run on a cluster by tests/pacemaker, parameters and times: test_pacemaker.py.
    "crm": starts_with(*(f"crm configure {what} " for what in ("property", "primitive", "clone", "location"))),
    "crm_mon": lambda words: set(words[1:]) <= {"-1", "-1A", "-1rf"},
}  # fmt: skip


class Block(NamedTuple):
    page: str
    text: str

    @property
    def drawn(self) -> bool:
        return any(page == self.page and self.text.startswith(begin) for page, begin in DRAWN)

    @property
    def kind(self) -> str:
        first = self.text.split("\n")[0]
        if self.drawn:
            return "drawn"
        if re.fullmatch(r"\[\[?[\w.]+\]\]?", first):
            return "configuration"
        if first == "totem {":
            return "corosync"
        for line in typed(self.text):
            for words in commands(line):
                if words[0] not in CHECKS:
                    return f"unknown: {self.page} has {words[0]!r} in: {line}"
        return "shell"


BLOCKS = [Block(page.name, text) for page in PAGES for text in blocks(page)]


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if not block.drawn and block.kind == kind]


def typed(text: str) -> Iterator[str]:
    """A session's commands stand behind '# ', with their output between them."""
    lines = text.split("\n")
    session = lines[0].startswith("# ")
    for line in lines:
        if line.startswith("# "):
            yield line[2:]
        elif not session:
            yield line


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without comments, variables and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&"):
            while words and re.match(r"[A-Z]\w*=", words[0]):
                words.pop(0)
            if words:
                yield words[: words.index(">")] if ">" in words else words
            words = []
        else:
            words.append(word)


def test_each_block_is_of_some_kind() -> None:
    kinds = {block.kind for block in BLOCKS}
    assert kinds == {"drawn", "configuration", "corosync", "shell"}


def test_what_is_drawn_is_there() -> None:
    gone = [
        (page, begin) for page, begin in DRAWN if not any(b.page == page and b.text.startswith(begin) for b in BLOCKS)
    ]
    assert gone == []


# ---- configuration ---------------------------------------------------------------------------------------------------


def toml(table: dict[str, Any], at: str = "") -> Iterator[str]:
    """A table as TOML again."""
    rest = [(key, value) for key, value in table.items() if isinstance(value, dict)]
    many = [
        (key, value) for key, value in table.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    nested = {key for key, _ in rest + many}
    yield from (f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in nested)
    for key, value in rest:
        yield f"[{at}{key}]"
        yield from toml(value, f"{at}{key}.")
    for key, values in many:
        for value in values:
            yield f"[[{at}{key}]]"
            yield from toml(value, f"{at}{key}.")


def completed(block: str) -> str:
    """A whole file: the example's, with what the block says in place of what it has there."""
    said = tomllib.loads(block.replace("...", '"..."'))
    whole = tomllib.loads(example())
    usual = whole["pair"][0]
    nic = usual["nic"][0]
    kept = {key: value for key, value in usual.items() if not isinstance(value, dict | list)}
    for pair in said.get("pair", []):
        nics = [{**nic, "number": number, **one} for number, one in enumerate(pair.get("nic", [{}]))]
        pair |= {key: value for key, value in kept.items() if key not in pair} | {"nic": nics}
    return "\n".join(toml(whole | said))


@pytest.mark.parametrize("block", of_kind("configuration"), ids=lambda block: block.page)
def test_configuration_is_taken(block: Block) -> None:
    """By the service's own reader, with the rest of a file around it."""
    read = parse(completed(block.text), Path(block.page))
    assert isinstance(read, Config)


@pytest.mark.parametrize(
    ("old", "new"), [("commit_timeout_ms", "commit_timeout"), ("10.9.9.1:7790", "10.9.9.1"), ('"web1"', '"web0"')]
)
def test_a_mistake_in_one_is_found(old: str, new: str) -> None:
    [block] = [block for block in of_kind("configuration") if block.page == "xen.md"]
    assert old in block.text
    with pytest.raises(ConfigError):
        parse(completed(block.text.replace(old, new)), Path("xen.md"))


COROSYNC = {  # corosync.conf(5), votequorum(5): what a documented cluster uses
    "": {"totem", "nodelist", "quorum", "logging"},
    "totem": {"version", "cluster_name", "transport", "crypto_cipher", "crypto_hash", "token"},
    "nodelist": {"node"},
    "nodelist.node": {"name", "nodeid", "ring0_addr", "ring1_addr"},
    "quorum": {"provider", "two_node", "device", "expected_votes", "wait_for_all"},
    "quorum.device": {"model", "votes", "net"},
    "quorum.device.net": {"host", "algorithm", "tls"},
    "logging": {"to_syslog", "to_logfile", "logfile"},
}


def corosync_faults(text: str) -> list[str]:
    """Of a corosync.conf: sections that don't close, and names that Corosync would not know."""
    inside: list[str] = []
    wrong = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        name = re.match(r"(\w+)\s*(\{$|:\s*\S)", line)
        if line == "}":
            if not inside:
                wrong.append("a } too many")
            else:
                inside.pop()
        elif name is None or name[1] not in COROSYNC.get(".".join(inside), set()):
            wrong.append(line)
        if line.endswith("{") and name is not None:
            inside.append(name[1])
    return wrong + inside


def test_corosync_is_taken() -> None:
    found = of_kind("corosync")
    assert found
    for block in found:
        assert corosync_faults(block.text) == [], block.page
        assert corosync_faults(block.text.replace("ring0_addr", "ring0_address", 1))
        assert corosync_faults(block.text.rstrip("}\n"))


@pytest.mark.parametrize("block", of_kind("shell"), ids=lambda block: f"{block.page}: {block.text[:30]}")
def test_commands_can_be_typed(block: Block) -> None:
    for line in typed(block.text):
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False).returncode == 0, line
        for words in commands(line):
            assert CHECKS[words[0]](words), " ".join(words)


@pytest.mark.parametrize(
    "line",
    [
        "coloebpf protekt web", "make al", "apt-get install no-such-package-of-debian", "deploy/xen/rebuild.sh kernel D",
        ".venv/bin/python -m tests.xen guest 3 hvm", "promtool test rules deploy/none.yml", "cp deploy/none /etc",
        "jq '.['", "systemctl frob coloebpf", "crm configure group x", "bpftool prog list",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(line: str) -> None:
    [words] = commands(line)
    assert not CHECKS[words[0]](words)
