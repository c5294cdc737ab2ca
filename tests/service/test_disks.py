"""A replicated disk's files, its line for xl, and the commands about it; qemu-img is the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from coloebpf.errors import ConfigError, DiskError
from coloebpf.model import Role
from coloebpf.service import disk_notes, disks
from coloebpf.service.checks import disks as doctor
from coloebpf.service.checks.finding import FAIL, OK, WARN, Host
from coloebpf.service.commands import disks as commands
from coloebpf.service.config import Address, LibxlDisk, PairConfig, parse
from coloebpf.service.config_example import example
from coloebpf.service.config_reader import ConfigErrors
from coloebpf.service.disk_notes import Part
from coloebpf.service.disks import ColoDisk
from coloebpf.xen import xlcfg
from coloebpf.xen.guest import unfit

MIB = 1 << 20
LINE = (
    "vdev=hda,format=raw,access=rw,backendtype=qdisk,colo,colo-host=10.9.9.2,colo-port=7793,colo-export=disk,"
    "active-disk=/o/web-active.qcow2,hidden-disk=/o/web-hidden.qcow2,target=/i/web.img"
)
TABLE = """stream_listen = "10.9.9.1:7792"
[[pair.libxl_colo.disk]]
image = "/i/web.img"
directory = "/o"
listen = "10.9.9.1:7793"
peer_listen = "10.9.9.2:7793"
"""


def with_disk(*edits: tuple[str, str]) -> str:
    """The example, with a disk."""
    text = example().replace('#stream_listen = ""\n', TABLE, 1)
    text = text.replace("#commit_timeout_ms = 10000", "commit_timeout_ms = 200000").replace(
        '#bridge = ""', 'bridge = "br0"'
    )
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def config(home: Path, **changes: object) -> LibxlDisk:
    fields = {
        "image": home / "web.img", "directory": home / "o",
        "listen": Address("127.0.0.1", 7793), "peer_listen": Address("127.0.0.2", 7793),
    }  # fmt: skip
    return LibxlDisk(**fields | changes)  # type: ignore[arg-type]


@pytest.fixture
def disk(tmp_path: Path) -> ColoDisk:
    (tmp_path / "web.img").write_bytes(b"guest" * 1000 + bytes(MIB))
    return ColoDisk("web", config(tmp_path))


# ---- configuration -------------------------------------------------------------------------------------------------


def pair(text: str) -> PairConfig:
    return parse(text, Path("x")).pairs[0]


def test_the_line(tmp_path: Path) -> None:
    """The primary's file names the other host's QEMU, since the stream takes the same line there."""
    disk = ColoDisk.of(pair(with_disk()))
    assert disk is not None
    assert disk.line() == LINE
    assert disk.line(disk.config.listen) == LINE.replace("10.9.9.2", "10.9.9.1")
    assert ColoDisk.of(pair(example())) is None


@pytest.mark.parametrize(
    ("edits", "key", "word"),
    [
        ([('stream_listen = "10.9.9.1:7792"\n', "")], "stream_listen", "missing"),
        ([('image = "/i/web.img"', 'image = "/i/a,b.img"')], "disk[0].image", "a,b"),
        ([('directory = "/o"', 'directory = "o"')], "disk[0].directory", "commas"),
        ([('directory = "/o"', 'directory = "/o"\nexport = "0"')], "disk[0].export", "letter first"),
        ([('directory = "/o"', 'directory = "/o"\nvdev = "xvda"')], "disk[0].vdev", "hda"),
        ([("10.9.9.2:7793", "10.9.9.1:7793")], "disk[0].peer_listen", "the other host's"),
        ([('listen = "10.9.9.1:7793"', 'listen = "10.9.9.1:7792"')], "disk[0].listen", "port of its own"),
        ([("[[pair.libxl_colo.disk]]", TABLE.partition("\n")[2] + "[[pair.libxl_colo.disk]]")], "libxl_colo.disk", "dangling"),
    ],
)  # fmt: skip
def test_mistakes(edits: list[tuple[str, str]], key: str, word: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        parse(with_disk(*edits), Path("x"))
    assert any(key in m.key and word in str(m) for m in raised.value.mistakes), raised.value


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (LINE, 0),
        (LINE.replace(",colo,", ","), 1),
        (LINE.replace("10.9.9.2", "10.9.9.1"), 1),
        ("/i/web.img,raw,hda,rw", 1),
        (LINE.replace("vdev=hda,format=raw", "format=raw, vdev=hda"), 0),
    ],
)
def test_the_guests_file(row: str, wrong: int) -> None:
    needs = xlcfg.Needs(replicates=True, disk=LINE)
    found = {"type": "hvm", "xen_platform_pci": 0, "disk": [row]}
    assert len(said := xlcfg.changes(found, [], [], needs)) == wrong
    assert all(one.advice == f"disk = [ '{LINE}' ]" for one in said)


def test_what_else_a_guests_file_may_not_have() -> None:
    found = {"type": "hvm", "xen_platform_pci": 0, "disk": [LINE, "/cd.iso,,hdc,cdrom"], "hdtype": "ahci"}
    texts = [one.text for one in xlcfg.changes(found, [], [], xlcfg.Needs(replicates=True, disk=LINE))]
    assert len(texts) == 2
    assert "AHCI" in texts[1]
    [one] = xlcfg.changes(found, [], [], xlcfg.Needs(replicates=True))
    assert "pair none" in one.text


def libxl(disk: dict[str, object] | None) -> str:
    """As libxl describes a guest."""
    rows = [] if disk is None else [{"readwrite": 1, "discard_enable": "True"} | disk]
    hvm = {"type.hvm": {"xen_platform_pci": "False"}}
    return json.dumps({"c_info": {"type": "hvm"}, "b_info": hvm, "nics": [], "disks": rows})


def test_the_running_guest(disk: ColoDisk) -> None:
    good = disk.in_libxl()
    assert unfit(libxl(good), [], disk=good) == []
    for key in good:
        [one] = unfit(libxl(good | {key: "other"}), [], disk=good)
        assert key in one.text
    assert "0 disks" in unfit(libxl(None), [], disk=good)[0].text
    assert "nobody replicates" in unfit(libxl(good), [])[0].text


# ---- files ---------------------------------------------------------------------------------------------------------


def info(path: Path) -> dict[str, object]:
    done = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_prepare(disk: ColoDisk) -> None:
    """Empty, of the image's size as QEMU sees it, and what they had before is gone."""
    for _ in range(2):
        assert commands.prepare(disk).fields["active"] == str(disk.active)
        for path in (disk.active, disk.hidden):
            found = info(path)
            assert found["format"] == "qcow2"
            assert found["virtual-size"] == disk.size() == info(disk.image)["virtual-size"]
            assert "backing-filename" not in found
            assert found["actual-size"] == info(disk.hidden)["actual-size"]
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 512k", disk.active], check=True, capture_output=True
        )
    assert sorted(path.name for path in disk.config.directory.iterdir()) == ["web-active.qcow2", "web-hidden.qcow2"]


@pytest.mark.parametrize("which", ["active", "hidden", "image"])
def test_prepare_while_a_qemu_writes(disk: ColoDisk, which: str) -> None:
    disk.prepare()
    path: Path = getattr(disk, which)
    before = {one: one.stat().st_ino for one in (disk.active, disk.hidden)}
    with qemu_writes(path, "raw" if which == "image" else "qcow2") as qemu:
        with pytest.raises(DiskError, match=f"{path.name} is in use"):
            commands.prepare(disk)
        assert qemu.poll() is None
    assert {one: one.stat().st_ino for one in (disk.active, disk.hidden)} == before
    disk.prepare()


def qemu_writes(path: Path, form: str) -> subprocess.Popen[str]:
    """A QEMU that has the file open, and says so."""
    qemu = subprocess.Popen(
        ["qemu-io", "-f", form, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert qemu.stdin is not None
    assert qemu.stdout is not None
    qemu.stdin.write("length\n")
    qemu.stdin.flush()
    qemu.stdout.readline()
    return qemu  # ends with its input, when it is left


def test_prepare_that_is_interrupted(disk: ColoDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at any time: what was there is there, whole, and nothing else is."""
    disk.prepare()
    before = {path.name: path.stat().st_ino for path in disk.config.directory.iterdir()}
    real, calls = disks._qemu_img, []

    def stop(*args: str) -> object:
        calls.append(args)
        if len([call for call in calls if call[0] == "create"]) == 2:
            Path(args[-2]).write_text("half")
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(disks, "_qemu_img", stop)
    with pytest.raises(KeyboardInterrupt):
        disk.prepare()
    assert {path.name: path.stat().st_ino for path in disk.config.directory.iterdir()} == before


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda disk: disk.image.unlink(), "No such file"),
        (lambda disk: disk.config.directory.write_text(""), "Not a directory"),
    ],
)
def test_prepare_that_can_not_be(disk: ColoDisk, spoil: Callable[[ColoDisk], object], word: str) -> None:
    spoil(disk)
    with pytest.raises(DiskError, match=word):
        disk.prepare()


def test_an_image_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "web.img").write_bytes(bytes(MIB))
    with pytest.raises(DiskError, match="qcow2"):
        ColoDisk("web", config(tmp_path, format="qcow2")).prepare()


def test_without_qemu_img(disk: ColoDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "QEMU_IMG", "qemu-img-that-is-not-there")
    with pytest.raises(DiskError, match="qemu-utils"):
        disk.prepare()


def test_sum(disk: ColoDisk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "CHUNK", 1 << 16)
    times = iter(range(0, 1000, 3))
    answer = commands.checksum(disk, lambda: float(next(times)))
    assert answer.fields["sha256"] == hashlib.sha256(disk.image.read_bytes()).hexdigest()
    assert answer.text == f"{answer.fields['sha256']}  {disk.image}"
    said = capsys.readouterr()
    assert said.out == ""
    assert "64.0 KiB of 1.0 MiB" in said.err


def test_compare(disk: ColoDisk) -> None:
    own = commands.checksum(disk).fields["sha256"]
    assert commands.compare(disk, own.upper()).code == 0
    assert commands.compare(disk, "0" * 64).code == 1
    asked = commands.compare(disk, None)
    assert asked.code == 0
    assert asked.fields["equal"] is None
    assert "--with" in asked.text
    with pytest.raises(DiskError, match="no SHA-256"):
        commands.compare(disk, "yes")


# ---- which image is the good one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "state", "good", "word"),
    [
        (None, "", None, "no part"),
        (Part.PRIMARY, "passthrough", True, "has the word"),
        (Part.PRIMARY, "lockstep", True, "has the word"),
        (Part.PRIMARY, "halted", None, "unless the other host has taken over"),
        (Part.PRIMARY, "", None, "no service answers"),
        (Part.SECONDARY, "lockstep", False, "followed"),
        (Part.TAKING_OVER, "", None, "qemu-img commit"),
        (Part.TAKEN_OVER, "promoted", True, "qemu-img commit"),
        (Part.COMMITTED, "promoted", True, "together"),
    ],
)
def test_which(
    disk: ColoDisk, monkeypatch: pytest.MonkeyPatch, part: Part | None, state: str, good: bool | None, word: str
) -> None:
    if part is not None:
        disk_notes.write(disk, part)
    monkeypatch.setattr(commands, "_state", lambda pair, socket: state)
    answer = commands.which(disk, Path("/nowhere"))
    assert answer.fields["this_host"] is good
    assert word in answer.text
    assert answer.code == (2 if good is None else 0)


def test_which_without_a_service(disk: ColoDisk, tmp_path: Path) -> None:
    disk_notes.write(disk, Part.PRIMARY)
    assert commands.which(disk, tmp_path / "none.sock").code == 2


@pytest.mark.parametrize("part", [Part.TAKING_OVER, Part.TAKEN_OVER])
def test_overlays_with_what_is_nowhere_else_are_kept(disk: ColoDisk, part: Part) -> None:
    disk.prepare()
    disk_notes.write(disk, part)
    with pytest.raises(DiskError, match="coloebpf disks which web"):
        commands.prepare(disk)


def test_a_note_that_can_not_be_read(disk: ColoDisk) -> None:
    disk_notes.write(disk, Part.PRIMARY)
    disk_notes.path_of(disk).write_text('{"part": "queen", "since": 0}')
    with pytest.raises(DiskError, match=r"web\.json"):
        commands.which(disk, Path("/nowhere"))


def test_pairs_without_a_disk() -> None:
    found = parse(with_disk(), Path("x"))
    name = found.pairs[0].name
    assert commands.disk_of(found, name).line() == LINE
    with pytest.raises(ConfigError, match="no pair other"):
        commands.disk_of(found, "other")
    bare = dataclasses.replace(found, pairs=(pair(example()),))
    with pytest.raises(ConfigError, match=r"\[\[pair.libxl_colo.disk\]\]"):
        commands.disk_of(bare, name)


# ---- doctor --------------------------------------------------------------------------------------------------------


def levels(root: Path, role: Role = Role.SECONDARY, path: str = os.environ["PATH"]) -> dict[str, str]:
    """What doctor says of a host below `root`, by level; of one that is well the text of "ok" does not matter."""
    found = parse(with_disk(), Path("x"))
    pairs = tuple(dataclasses.replace(one, role=role) for one in found.pairs[:1])
    host = Host(now=0, root=root, path=path, config=dataclasses.replace(found, pairs=pairs))
    return {one.level: f"{one.text}: {one.advice}" for one in doctor.replicated(host)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "i").mkdir()
    (tmp_path / "i/web.img").write_bytes(bytes(MIB))
    return tmp_path


def test_doctor_is_content(root: Path) -> None:
    assert set(levels(root)) == {OK}
    bare = dataclasses.replace(parse(example(), Path("x")))
    [one] = doctor.replicated(Host(now=0, root=root, config=bare))
    assert one.level == OK


def test_doctor_about_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = parse(with_disk(), Path("x")).pairs[0].name
    assert "qemu-utils" in levels(root, path="/nowhere")[FAIL]
    monkeypatch.setattr(doctor, "room", lambda directory: 0)
    assert "0 bytes left" in levels(root)[WARN]
    monkeypatch.undo()
    image = root / "i/web.img"
    with qemu_writes(image, "raw"):
        assert "in use" in levels(root)[FAIL]
        assert FAIL not in levels(root, Role.PRIMARY), "its own guest"
    disk = ColoDisk(name, config(root, image=image))
    disk_notes.write(disk, Part.TAKEN_OVER)
    assert "disks which" in levels(root)[FAIL]
    image.unlink()
    assert "No such file" in levels(root)[FAIL]
