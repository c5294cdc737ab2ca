"""What the documentation names is there: commands with their arguments, make's targets, files, maps. Blocks: test_docs_blocks.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from coloebpf import pins
from coloebpf.cli import parser

TREE = Path(__file__).resolve().parents[2]
PAGES = [TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))]
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
PARTS = re.compile(r"&&|;|\|(?!\|)")  # of a shell's line
FILE = re.compile(r"(?<![\w/.])(?:bpf|coloebpf|tests|deploy|docs|\.ci)/[\w./-]+\.\w+")


def blocks(page: Path) -> Iterator[str]:
    """Indented blocks, each as one text."""
    for paragraph in re.split(r"\n\s*\n", page.read_text()):
        lines = paragraph.split("\n")
        if all(line.startswith("    ") for line in lines if line.strip()) and paragraph.strip():
            yield "\n".join(line[4:] for line in lines)


def shell_lines(page: Path) -> Iterator[str]:
    """Commands: lines of blocks, and what stands between backquotes."""
    for block in blocks(page):
        yield from (line.removeprefix("# ") for line in block.split("\n"))
    yield from (" ".join(span.split()) for span in SPAN.findall(page.read_text()))


def commands(page: Path, name: str) -> Iterator[list[str]]:
    """The words of each call of `name`, without redirections and comments."""
    for line in shell_lines(page):
        for part in PARTS.split(line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a bracket of some other language
                continue
            while words and "=" in words[0] and not words[0].startswith("-"):
                words.pop(0)  # a variable for the command
            if words and words[0] == name:
                yield words[1 : words.index(">")] if ">" in words else words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_coloebpf_can_be_typed(page: Path) -> None:
    wrong = []
    for words in commands(page, "coloebpf"):
        if "..." in words or not words:
            words = [word for word in words if word != "..."] or ["--version"]
        mine = words[: words.index("--")] if "--" in words else words
        try:
            parser().parse_args(mine)
        except SystemExit as e:
            if e.code and not only_named(mine):
                wrong.append(" ".join(words))
    assert wrong == []


def test_they_are_found() -> None:
    found = [words for page in PAGES for words in commands(page, "coloebpf")]
    assert ["lab", "exec", "client", "--", "redis-cli", "-h", "10.77.0.10", "get", "greeting"] in found, "of a block"
    assert ["unprotect", "PAIR"] in found, "of a sentence"


def only_named(words: list[str]) -> bool:
    """A sentence may name a command or an option without all that it needs: then its help must be there."""
    names = [word for word in words if not word.startswith("-")]
    try:
        parser().parse_args([*names, "--help"])
    except SystemExit as e:
        return not e.code and len(names) == len(words)
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_of_make_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (TREE / "Makefile").read_text(), re.M))
    named = {word for words in commands(page, "make") for word in words if not word.startswith("-")}
    assert named - targets == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_is_there(page: Path) -> None:
    named = {name.rstrip(".") for name in FILE.findall(page.read_text())}
    assert {name for name in named if not (TREE / name).exists() and not list(TREE.glob(name))} == set()


def test_every_map_and_program_that_bpftool_is_shown_is_pinned() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"pinned (?:\$P|/sys/fs/bpf/coloebpf/lab/lab/primary)/(\w+)", text))
    assert named
    assert named - {*pins.MAPS, *pins.UPKEEP} == set()


def test_every_program_in_a_picture_is_pinned_and_every_picture_is_there() -> None:
    drawn = [source.read_text() for source in (TREE / "docs/pictures").glob("*.dot")]
    named = set(re.findall(r"\b[ps]\d_\w+", "\n".join(drawn)))
    assert named
    assert named - {*pins.TC_PROGRAMS, *pins.XDP_PROGRAMS} == set()
    shown = {page.parent / name for page in PAGES for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())}
    assert shown
    assert [str(path) for path in shown if not path.exists()] == []
