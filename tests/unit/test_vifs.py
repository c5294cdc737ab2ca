"""The SVM's vif is exchanged with the pair's epoch, and comes back with it."""

from __future__ import annotations

import ctypes as ct
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from coloebpf import bpfsys, tuning
from coloebpf.errors import DeviceError
from coloebpf.model import Role, State
from coloebpf.vifs import Vifs
from tests.unit.conftest import SPECS
from tests.unit.rig import DROP, REDIRECT, Rig, next_port, udp
from tests.unit.test_translate import CLIENT_ISN, PVM_ISN, SVM_ISN, Connection

pytestmark = pytest.mark.kernel

SPEC = replace(SPECS[1], standby_vif="standby1")
PAIR, NIC = 1, 1


@pytest.fixture
def vifs(rig: Rig) -> Iterator[Vifs]:
    """The secondary's NIC with a second vif."""
    subprocess.run(["ip", "link", "add", "standby1", "type", "veth", "peer", "name", "standby1p"], check=True)
    subprocess.run(["ip", "link", "set", "standby1", "up"], check=True)
    rig.ifindex["standby1"] = socket.if_nametoindex("standby1")
    rig.plane.attach(SPEC, rps=False)
    vifs = Vifs(rig.control, PAIR, (NIC,))
    yield vifs
    vifs.withdraw()
    subprocess.run(["ip", "link", "del", "standby1"], check=True)
    rig.plane.attach(SPECS[1], rps=False)


def speaks(rig: Rig, device: str) -> bool:
    """Whether a VM's output behind `device` goes to the primary."""
    verdict = rig.run("s2_output", udp(next_port(), b"said"), device).retval
    assert verdict in (REDIRECT, DROP)
    return verdict == REDIRECT


def offer(rig: Rig, vifs: Vifs) -> None:
    vifs.offer({NIC: rig.ifindex["standby1"]})


def test_one_write_exchanges_the_svm(rig: Rig, vifs: Vifs) -> None:
    offer(rig, vifs)
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (True, False)
    rig.control.clear_translations(PAIR)
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (False, True)
    vifs.settle()
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (False, True)
    assert vifs.here(NIC) == rig.ifindex["standby1"]
    rig.control.clear_translations(PAIR)
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (False, True)


def test_a_switch_taken_back_leaves_the_translations_as_they_were(rig: Rig, vifs: Vifs) -> None:
    """Frames for the standby keep their numbers, and nothing is learnt of them."""
    c = Connection(rig)
    c.open(stamped=False)
    offer(rig, vifs)
    rig.control.clear_translations(PAIR)
    into = c.client(1, b"request", ack=PVM_ISN + 6)
    assert into is not None
    assert into.ack == PVM_ISN + 6
    vifs.withdraw()
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (True, False)
    into = c.client(1, b"request", ack=PVM_ISN + 6)
    assert into is not None
    assert into.ack == (SVM_ISN + 6) & 0xFFFFFFFF
    assert c.svm(1, b"answer", "PA", ack=CLIENT_ISN + 8).seq == PVM_ISN + 1


def test_a_settled_switch_ends_the_translations(rig: Rig, vifs: Vifs) -> None:
    c = Connection(rig)
    c.open(stamped=False)
    offer(rig, vifs)
    rig.control.clear_translations(PAIR)
    vifs.settle()
    into = c.client(1, b"request", ack=PVM_ISN + 6)
    assert into is not None
    assert into.ack == PVM_ISN + 6
    vifs.withdraw()
    into = c.client(1, b"request", ack=PVM_ISN + 6)
    assert into is not None
    assert into.ack == PVM_ISN + 6


def test_the_epoch_of_a_translation_goes_along_with_the_frame(rig: Rig, vifs: Vifs) -> None:
    """So that the delivery, another program, gives it to the SVM whose numbers it has."""
    epoch = rig.control.state(PAIR).epoch
    assert rig.arrive(udp(next_port(), b"asked", output=False), "fwd1").start == epoch
    rig.control.clear_translations(PAIR)
    assert rig.arrive(udp(next_port(), b"asked", output=False), "fwd1").start == epoch + 1


def test_a_promoted_guest_is_heard_behind_its_own_vif_only(rig: Rig, vifs: Vifs) -> None:
    offer(rig, vifs)
    rig.control.clear_translations(PAIR)
    vifs.settle()
    rig.control.set_state(PAIR, State.PROMOTED)
    frame = udp(next_port(), b"asked", output=False)
    assert rig.run("s3_isolate", frame, "vif1").retval == DROP
    assert rig.run("s3_isolate", frame, "standby1").retval != DROP
    assert rig.run("s2_output", udp(next_port(), b"said"), "vif1").retval == DROP


@pytest.fixture
def both(rig: Rig, vifs: Vifs) -> Iterator[Vifs]:
    """The pair with a second NIC, whose two vifs are any other devices."""
    other = replace(SPEC, nic=5, vif="vif5", standby_vif="standby5", fwd="fwd1", vlan=5)
    for device in ("vif5", "standby5"):
        subprocess.run(["ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}p"], check=True)
        subprocess.run(["ip", "link", "set", device, "up"], check=True)
        rig.ifindex[device] = socket.if_nametoindex(device)
    rig.plane.attach(other, rps=False)
    yield Vifs(rig.control, PAIR, (NIC, other.nic))
    rig.plane.detach(other.nic)
    for device in ("vif5", "standby5"):
        subprocess.run(["ip", "link", "del", device], check=True)


def test_a_service_that_dies_while_it_settles_leaves_no_pair_in_two_halves(rig: Rig, vifs: Vifs, both: Vifs) -> None:
    both.offer({NIC: rig.ifindex["standby1"], 5: rig.ifindex["standby5"]})
    rig.control.clear_translations(PAIR)
    epoch = rig.control.state(PAIR).epoch
    vifs.settle()  # the first NIC alone
    both.withdraw()  # the next service begins with that
    assert [both.here(NIC), both.here(5)] == [rig.ifindex["standby1"], rig.ifindex["standby5"]]
    assert rig.control.state(PAIR).epoch == epoch


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """In the middle of attach(), which a service that has just started runs in a thread."""
    before = tuning.offloads_off

    def offloads_off(name: str) -> None:
        act()
        before(name)

    monkeypatch.setattr(tuning, "offloads_off", offloads_off)


def test_an_svm_that_is_exchanged_while_its_nic_is_attached_again_stays_exchanged(
    rig: Rig, vifs: Vifs, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(rig, vifs)
    rig.control.clear_translations(PAIR)
    meanwhile(monkeypatch, vifs.settle)
    rig.plane.attach(SPEC, rps=False)
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (False, True)
    assert vifs.here(NIC) == rig.ifindex["standby1"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_offer_outlives_an_attach(rig: Rig, vifs: Vifs, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Also one that comes when the NIC was registered already, and fails then: it puts back what was there before."""

    def spread_receive(name: str) -> None:
        offer(rig, vifs)
        raise DeviceError("no RPS")

    if fails:
        monkeypatch.setattr(tuning, "spread_receive", spread_receive)
        with pytest.raises(DeviceError, match="no RPS"):
            rig.plane.attach(SPEC)
    else:
        meanwhile(monkeypatch, lambda: offer(rig, vifs))
        rig.plane.attach(SPEC, rps=False)
    rig.control.clear_translations(PAIR)
    assert (speaks(rig, "vif1"), speaks(rig, "standby1")) == (False, True)


def test_attaching_again_keeps_the_guest_where_it_is(rig: Rig, vifs: Vifs) -> None:
    """A restart of the service; and as a primary, after the roles were exchanged."""
    offer(rig, vifs)
    rig.control.clear_translations(PAIR)
    vifs.settle()
    rig.plane.attach(SPEC, rps=False)
    assert rig.plane.is_attached(SPEC)
    assert vifs.here(NIC) == rig.ifindex["standby1"]
    as_primary = replace(SPEC, role=Role.PRIMARY)
    rig.plane.attach(as_primary, rps=False)
    known = {key.value for key in bpfsys.keys(rig.control.fd("nics"), ct.c_uint32)}
    assert (rig.ifindex["standby1"] in known, rig.ifindex["vif1"] in known) == (True, False)
    assert rig.plane.is_attached(as_primary)


def test_an_exemption_is_known_behind_each_vif_whose_own_flags_stay(rig: Rig, vifs: Vifs) -> None:
    def entries() -> dict[str, tuple[int, int]]:
        found = {}
        for device in ("vif1", "standby1"):
            value = rig.control.shapes.leaf("nics")()
            assert bpfsys.lookup(rig.control.fd("nics"), ct.c_uint32(rig.ifindex[device]), value)
            found[device] = (int(value.exempts), int(value.flags))
        return found

    offer(rig, vifs)
    rig.control.clear_translations(PAIR)
    vifs.settle()
    flags = {device: flags for device, (_, flags) in entries().items()}
    assert flags["vif1"] != flags["standby1"], "else this shows nothing"
    rig.control.exempt_add(17, 123, "0.0.0.0/0", nic=NIC)
    assert entries() == {device: (1, flags[device]) for device in flags}
    rig.control.exempt_del(17, 123, "0.0.0.0/0", nic=NIC)
    assert entries() == {device: (0, flags[device]) for device in flags}
