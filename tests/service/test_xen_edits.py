"""The edits to Debian's sources (deploy/xen/edits): each says what it is for and which file it changes, and names no other."""

import re
import subprocess
from pathlib import Path

import pytest

from coloebpf.source import BPF_DIR

XEN = BPF_DIR.parent / "deploy/xen"
EDITS = sorted(XEN.glob("edits/*/*.patch"))


def test_there_are_edits_for_both_packages() -> None:
    assert {path.parent.name for path in EDITS} == {"tools", "qemu"}


@pytest.mark.parametrize("edit", EDITS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_edit_says_why_and_where(edit: Path) -> None:
    head, _, body = edit.read_text().partition("--- a/")
    assert head.startswith("Description: "), "the build tells what it changes"
    assert len(head.splitlines()) >= 3, "a reason"
    where = re.search(r"^File: (.*)", head, re.MULTILINE)
    assert where
    changed = re.findall(r"^\+\+\+ b/(.*)", body, re.MULTILINE)
    assert changed
    for path in changed:
        assert Path(path).name in where[1], f"{path} is changed, and not named"


def test_an_edit_that_does_not_match_is_refused(tmp_path: Path) -> None:
    # The options of rebuild.sh: a neighbouring line that has changed is enough.
    edit = XEN / "edits/qemu/20-yank.patch"
    lines = [line[1:] for line in edit.read_text().partition("@@")[2].splitlines()[1:] if line.startswith(" ")]
    source = tmp_path / "migration/savevm.c"
    source.parent.mkdir()
    for text, fits in (("\n".join(lines) + "\n", True), ("\n".join([*lines[:-1], "another"]) + "\n", False)):
        source.write_text(text)
        options = ["--quiet", "--strip=1", "--fuzz=0", f"--directory={tmp_path}"]
        with edit.open() as stdin:
            done = subprocess.run(["patch", *options], stdin=stdin, capture_output=True, check=False)
        assert (done.returncode == 0) == fits, done.stdout
    assert "--strip=1 --fuzz=0" in (XEN / "rebuild.sh").read_text()


def test_rebuild_knows_what_it_can_do() -> None:
    done = subprocess.run([str(XEN / "rebuild.sh"), "grub"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "usage: rebuild.sh tools|qemu" in done.stderr
