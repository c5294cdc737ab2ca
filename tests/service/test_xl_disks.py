"""Engine libxl-colo with a replicated disk, both sides: xl, libxl and the guests' QEMUs are stand-ins, qemu-img is not.

What QEMU does with the commands that the stand-in only notes is in test_replication.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coloebpf.model import State
from coloebpf.service import disk_notes
from coloebpf.service.config import Address, LibxlDisk
from coloebpf.service.disk_notes import Part
from coloebpf.service.disks import ColoDisk
from coloebpf.service.engine import Committed, EngineEvent, Failed
from tests.service.xl_rig import Rig

HOSTS = {"a": Address("127.0.0.1", 7793), "b": Address("127.0.0.2", 7793)}
SIZE = 1 << 20
DOMID = 1  # of the only domain on each host
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


class FakeQemu:
    """A monitor. `did`: what it was asked; `answers`: to that, {} otherwise."""

    def __init__(self, home: Path, note: Callable[[str], object]) -> None:
        self.path = home / f"qmp-libxenstat-{DOMID}"
        self._note = note
        self.did: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {
            "query-xen-replication-status": {"error": False},
            "query-named-block-nodes": [{"node-name": "#block1", "file": "/i"}],
        }
        self._server: asyncio.Server | None = None

    async def up(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def down(self) -> None:
        if self._server is not None:
            self._server.close()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said, text = json.dumps(GREETING), ""
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(f"{said}\r\n".encode())
                await writer.drain()
                asked: dict[str, Any] = {}
                while not asked:  # nothing but its braces says where a command ends
                    if not (more := await reader.read(1 << 16)):
                        writer.close()
                        return
                    text += more.decode()
                    with contextlib.suppress(json.JSONDecodeError):
                        asked, end = json.JSONDecoder().raw_decode(text)
                        text = text[end:].lstrip()
                command = asked["execute"]
                if command != "qmp_capabilities":
                    self.did.append((command, asked.get("arguments", {})))
                    self._note(command)
                said = json.dumps({"return": self.answers.get(command, {})} | {k: asked[k] for k in asked if k == "id"})


@dataclasses.dataclass(frozen=True)
class HostDisk(ColoDisk):
    """Files of one path on two hosts, which are below a directory of their own here."""

    root: Path

    def line(self, secondary: Address | None = None) -> str:
        return super().line(secondary).replace(str(self.root), "")

    def in_libxl(self) -> dict[str, object]:
        return {k: v.replace(str(self.root), "") if isinstance(v, str) else v for k, v in super().in_libxl().items()}


@dataclasses.dataclass
class World:
    """A rig whose guest has a disk."""

    rig: Rig
    disks: dict[str, ColoDisk]
    qemus: dict[str, FakeQemu]

    def events(self, host: str, kind: type) -> list[EngineEvent]:
        return [event for at, event in self.rig.events if at == host and isinstance(event, kind)]

    async def fails(self, word: str) -> None:
        """The protection that was asked for does not come about."""
        await self.rig.until(lambda: self.rig.primary.pvm.domid is not None, "the guest to be seen")
        await self.rig.primary.request_checkpoint()
        await self.rig.until(lambda: bool(self.events("a", Failed)), "the protection to fail")
        event = self.events("a", Failed)[0]
        assert isinstance(event, Failed)
        assert word in event.reason
        assert not self.events("a", Committed)
        assert self.rig.named("b", "web--incoming") is None

    def part(self, host: str) -> Part | None:
        note = disk_notes.read(self.disks[host])
        return note.part if note is not None else None


Test = Callable[[World], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a test with both engines. `b`: what is different in host b's configuration; `spoil`: is called before."""

    def run(test: Test, b: dict[str, object] | None = None, spoil: Callable[[World], object] | None = None) -> None:
        disks: dict[str, ColoDisk] = {}
        for host, other in ("ab", "ba"):
            root = tmp_path / host
            root.mkdir()
            files = {"image": "web.img", "directory": "o"} | ((b or {}) if host == "b" else {})
            paths = {key: root / str(value) if key in ("image", "directory") else value for key, value in files.items()}
            config = LibxlDisk(listen=HOSTS[host], peer_listen=HOSTS[other], **paths)  # type: ignore[arg-type]
            disks[host] = HostDisk("web", config, root)
            (root / "web.img").write_bytes(bytes(SIZE))

        async def all_of_it() -> None:
            rig = Rig(tmp_path, disks=disks)
            world = World(rig, disks, {host: FakeQemu(tmp_path / host, rig._note) for host in "ab"})
            for qemu in world.qemus.values():
                await qemu.up()
            if spoil is not None:
                spoil(world)
            try:
                await rig.up()
                await test(world)
            finally:
                await rig.down()
                for qemu in world.qemus.values():
                    await qemu.down()

        asyncio.run(all_of_it())

    return run


def test_protection(play: Play) -> None:
    """A guest that was started paused runs, on both hosts; fresh overlays are there before libxl's QEMU."""

    async def test(world: World) -> None:
        disk = world.disks["b"]
        await world.rig.checkpoint("one")
        assert disk.active.exists()
        assert disk.hidden.exists()
        assert (world.part("a"), world.part("b")) == (Part.PRIMARY, Part.SECONDARY)
        assert not world.qemus["b"].did, "libxl speaks to it"
        await world.rig.checkpoint("two")
        assert ("query-xen-replication-status", {}) in world.qemus["a"].did
        usage = world.rig.secondary.disk_usage()
        assert usage is not None
        assert usage.size == SIZE
        assert usage.active > 0
        assert usage.free > 0
        assert not usage.uncommitted

    play(test)


def test_overlays_are_made_anew(play: Play) -> None:
    async def test(world: World) -> None:
        rig, active = world.rig, world.disks["b"].active
        await rig.checkpoint("one")
        with active.open("ab") as file:
            file.write(b"of the first one")
        rig.set_state(State.UNPROTECTED)
        await rig.until(lambda: rig.named("b", "web--incoming") is None, "the SVM's end")
        await rig.until(lambda: rig.named("a", "web") is not None and rig.runs("a"), "the PVM to go on")
        rig.xen["a"].write(rig.domid, paused=True)
        seen = len(rig.steps)
        rig.set_state(State.SYNCING)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: "a Committed" in rig.steps[seen:], "another protection")
        assert not active.read_bytes().endswith(b"of the first one")

    play(test)


def test_a_running_guest(play: Play) -> None:
    async def test(world: World) -> None:
        await world.fails("xl create -p")

    play(test, spoil=lambda world: world.rig.xen["a"].write(world.rig.domid, paused=False))


def test_another_disk_in_the_guest(play: Play) -> None:
    def spoil(world: World) -> None:
        config = world.rig.xen["a"].read(world.rig.domid)["config"]
        config["disks"][0]["colo_port"] = 7
        world.rig.xen["a"].write(world.rig.domid, config=config)

    async def test(world: World) -> None:
        await world.fails("colo_port")

    play(test, spoil=spoil)


@pytest.mark.parametrize(
    ("b", "word"),
    [
        ({"directory": "elsewhere"}, "another disk"),
        ({"format": "qcow2"}, "not in qcow2 format"),
        ({"compare_image": False}, "compare_image"),
        ({"image": "none.img"}, "No such file"),
    ],
    ids=["directory", "format", "uncompared", "missing"],
)
def test_another_configuration_on_the_other_host(play: Play, b: dict[str, object], word: str) -> None:
    """Each is refused with a sentence, before libxl begins."""

    async def test(world: World) -> None:
        await world.fails(word)
        assert world.rig.xen["a"].read(world.rig.domid)["paused"], "the guest has not run"

    play(test, b)


def test_images_that_differ(play: Play) -> None:
    async def test(world: World) -> None:
        await world.fails("differ")
        assert world.part("a") is None

    play(test, spoil=lambda world: world.disks["b"].image.write_bytes(b"x" + bytes(SIZE - 1)))


def test_an_image_that_is_in_use_on_the_secondary(play: Play) -> None:
    """By a guest that was started there too, say."""
    held: list[int] = []

    async def test(world: World) -> None:
        await world.fails("is in use")

    def spoil(world: World) -> None:
        fd = os.open(world.disks["b"].image, os.O_RDWR)
        held.append(fd)
        fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 101, 1, 0))  # F_OFD_SETLK, as QEMU does

    play(test, spoil=spoil)
    os.close(held[0])


def test_without_a_comparison(play: Play) -> None:
    """Both hosts say so: nothing is read, and nothing found."""

    def spoil(world: World) -> None:
        for disk in world.disks.values():
            object.__setattr__(disk.config, "compare_image", False)
        world.disks["b"].image.write_bytes(b"x" + bytes(SIZE - 1))

    async def test(world: World) -> None:
        await world.rig.checkpoint("one")

    play(test, spoil=spoil)


def test_a_write_that_did_not_arrive(play: Play) -> None:
    """The checkpoint is not committed, nothing is proven by it, and the guest goes on alone."""

    async def test(world: World) -> None:
        rig = world.rig
        await rig.checkpoint("one")
        commits = len(world.events("a", Committed))
        world.qemus["a"].answers["query-xen-replication-status"] = {"error": True, "desc": "I/O error occurred"}
        await rig.primary.request_checkpoint()
        await rig.until(lambda: bool(world.events("a", Failed)), "the failure")
        assert world.events("a", Failed) == [
            Failed("what the guest has written has not reached the other host's disk: I/O error occurred", fatal=True)
        ]
        await rig.until(lambda: rig.runs("a"), "the PVM to go on")
        assert len(world.events("a", Committed)) == commits
        usage = rig.primary.disk_usage()
        assert usage is not None
        assert usage.errors == 1

    play(test)


def test_failover(play: Play) -> None:
    """QEMU is told before libxl's stream ends; nobody writes any more, then; and the image counts when QEMU says so."""

    async def test(world: World) -> None:
        rig, qemu = world.rig, world.qemus["b"]
        await rig.checkpoint("one")
        active = str(world.disks["b"].active)
        qemu.answers["query-named-block-nodes"] = [{"node-name": "#block2", "file": active}]
        rig.deaf = {"a", "b"}
        rig.kill("a", "")
        rig.state["b"] = State.LOCKSTEP
        seen: list[bool] = []
        rig.on_step = lambda step: seen.append(rig.named("b", "web") is None) if step == "xen-set-replication" else None
        await rig.secondary.failover()
        assert seen == [True], "libxl has taken over first"
        assert rig.named("b", "web") is not None
        commands = [one for one in qemu.did if not one[0].startswith("query")]
        assert commands == [
            ("nbd-server-stop", {}),
            ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
        ]
        assert world.part("b") is Part.TAKEN_OVER
        qemu.answers["query-named-block-nodes"] = []
        await rig.until(lambda: world.part("b") is Part.COMMITTED, "the commit to be noted")

    play(test)


def test_a_service_that_comes_back_behind_a_failover(play: Play) -> None:
    """It goes on looking whether QEMU has ended its work."""

    async def test(world: World) -> None:
        rig = world.rig
        rig.state["b"] = State.PROMOTED
        rig.xen["b"].create(rig.xen["a"].read(rig.domid)["config"], "0")
        disk_notes.write(world.disks["b"], Part.TAKEN_OVER)
        await rig.secondary.stop()
        rig.secondary = rig.make_secondary()
        await rig.secondary.start()
        await rig.until(lambda: world.part("b") is Part.COMMITTED, "the commit to be noted")

    play(test)


def test_a_failover_whose_qemu_does_not_answer(play: Play) -> None:
    """The guest is worth more than one file."""

    async def test(world: World) -> None:
        rig = world.rig
        await rig.checkpoint("one")
        await world.qemus["b"].down()
        rig.deaf = {"a", "b"}
        rig.kill("a", "")
        rig.state["b"] = State.LOCKSTEP
        await rig.secondary.failover()
        assert rig.named("b", "web") is not None
        assert world.part("b") is Part.TAKEN_OVER

    play(test)


def test_a_guest_that_began_anew_without_its_overlays(play: Play) -> None:
    """On the host that had taken over, while the overlays have what is not in the image."""

    async def test(world: World) -> None:
        await world.fails("coloebpf disks which web")

    play(test, spoil=lambda world: disk_notes.write(world.disks["a"], Part.TAKEN_OVER))


def test_another_protection_before_qemu_has_ended_its_work(play: Play) -> None:
    """What the guest wrote is nowhere else: neither its domain nor the overlays are touched."""

    async def test(world: World) -> None:
        await world.fails("coloebpf disks which web")
        assert world.rig.named("b", "web") is not None

    def spoil(world: World) -> None:
        world.disks["b"].prepare()
        disk_notes.write(world.disks["b"], Part.TAKEN_OVER)
        world.rig.xen["b"].create(world.rig.xen["a"].read(world.rig.domid)["config"], "0")

    play(test, spoil=spoil)


def test_a_primary_whose_qemu_does_not_answer(play: Play) -> None:
    async def test(world: World) -> None:
        await world.fails("no QEMU answers")

    play(test, spoil=lambda world: world.qemus["a"].path.unlink())
