"""A host is replaced as docs/operations.md says, by the commands that stand there, while the guest's clients go on."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coloebpf.lab import services
from coloebpf.lab.history import History
from coloebpf.netns import inside
from tests.lab.virtual_lab import VirtualLab, until, virtual_lab
from tests.service.test_docs import TREE, blocks

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.slow, pytest.mark.real_time, pytest.mark.timeout(600)]
CLIENTS, PAUSE_S = 3, 0.02
TITLE = "## 7. Replace a host"


def documented(tmp_path: Path) -> list[list[list[str]]]:
    """The section's blocks, each as the words of its lines."""
    text = (TREE / "docs/operations.md").read_text()
    section = text[text.index(TITLE) :].split("\n## ", 2)[0:2]
    page = tmp_path / "section.md"
    page.write_text(section[0] if TITLE in section[0] else section[1])
    return [[shlex.split(line, comments=True) for line in block.split("\n")] for block in blocks(page)]


def test_a_lost_host_is_replaced(tmp_path: Path) -> None:
    with virtual_lab() as lab:
        history = History(lab.plan, CLIENTS, PAUSE_S)
        history.start()
        lab.checkpoint()
        try:
            lab.lose_the_primary(history)
            replace(lab, tmp_path)
            lab.checkpoint()
            lab.lose_the_primary(history)  # the new machine takes over
        finally:
            history.finish()


def replace(lab: VirtualLab, tmp_path: Path) -> None:
    """The commands, with the lab's names and places; nothing that the lost host had is there any more."""
    survivor, lost, plan = lab.secondary, lab.primary, lab.plan
    services.power_on(plan, lost)
    shutil.rmtree(services.directory(plan, lost))
    pki = plan.run_dir / "pki"
    (pki / "lost").mkdir()
    [certificates, check, protect] = documented(tmp_path)
    assert [words[0] for words in certificates] == ["mv", "coloebpf"]
    before = (pki / f"{lost}.pem").read_bytes()
    for words in certificates:
        named = [
            {"b": lost, "pki": str(pki), "pki/b.pem": f"{pki}/{lost}.pem", "pki/b.key": f"{pki}/{lost}.key"}.get(w, w)
            for w in words
        ]
        run(lab, survivor, [word.replace("lost/", f"{pki}/lost/") if word == "lost/" else word for word in named])
    assert (pki / f"{lost}.pem").read_bytes() != before

    services.configure(plan, lost, primary=survivor)
    assert [" ".join(words) for words in check] == [
        "coloebpf config check", "coloebpf doctor", "systemctl start coloebpf"
    ]  # fmt: skip
    file = str(services.directory(plan, lost) / "coloebpf.toml")
    run(lab, lost, [*check[0], file])
    with inside(plan.namespace(lost)):
        doctor = command([*check[1], "--config", file])
        said = subprocess.run(doctor, capture_output=True, text=True, check=False).stdout
    assert re.search(r"certificates \S+.* is good", said), said
    lab.running[lost] = services.start(plan, lost)

    # What "On a, if b was the primary" says: its file, and a restart.
    services.configure(plan, survivor, primary=survivor)
    lab.running[survivor].terminate()
    lab.running[survivor].wait()
    lab.running[survivor] = services.start(plan, survivor)
    services.ready(plan, lab.running)
    socket = services.directory(plan, survivor) / "control.sock"
    run(
        lab,
        survivor,
        [*(services.PAIR_NAME if word == "web" else word for word in protect[0]), "--socket", str(socket)],
    )
    lab.primary = survivor
    until(lambda: lab.pair(survivor)["state"] == "lockstep", "lock-step")


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", *words] if words[0] == "coloebpf" else words


def run(lab: VirtualLab, host: str, words: list[str]) -> None:
    with inside(lab.plan.namespace(host)):
        done = subprocess.run(command(words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
