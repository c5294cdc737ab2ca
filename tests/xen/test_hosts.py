"""Two hosts that run Xen, wired to each other, with coloebpf installed."""

import json

import pytest

from tests.xen import service
from tests.xen.guests import Guest
from tests.xen.lab import Lab
from tests.xen.plan import DIRECT, HOSTS

pytestmark = [pytest.mark.xen, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_a_dom0_of_xen(lab: Lab, host: int) -> None:
    assert "control_d" in lab.run(host, "cat /proc/xen/capabilities")
    info = dict(line.split(":", 1) for line in lab.run(host, "xl info").splitlines() if ":" in line)
    version = {key.strip(): value.strip() for key, value in info.items()}
    assert version["xen_version"].startswith("4.17."), version
    assert "hvm" in version["xen_caps"], "an HVM guest needs SVM, which QEMU has to emulate"


def test_the_direct_link_carries_frames_of_9000_bytes(lab: Lab) -> None:
    lab.run(1, f"ping -c 1 -W 60 -M do -s 8972 {lab.plan.address(DIRECT, 2)}")


def test_a_host_reaches_the_other_by_ssh_as_xl_does(lab: Lab) -> None:
    assert lab.run(1, "ssh host2 hostname").strip() == "host2"


def test_doctor_finds_what_debian_has_and_what_it_lacks(lab: Lab) -> None:
    guest = Guest("web", "hvm", 13)
    service.hand_out_certificates(lab)
    service.configure(lab, 1, {guest: "vif1.0-emu"}, engine="libxl-colo")
    lab.write(1, f"/etc/xen/{guest.name}.cfg", guest.config())
    rows = json.loads(lab.run(1, "coloebpf doctor --json", check=False))["findings"]
    said = [(row["check"], row["level"], row["text"]) for row in rows]
    for check in ("config", "root", "kernel", "btf", "bpffs", "bcc", "headers", "memory"):
        assert [level for name, level, _ in said if name == check] == ["ok"], said
    assert ("clock", "ok", "clock source tsc") in said or ("clock", "ok", "clock source xen") in said, said
    assert ("devices", "ok", "fwd0 is up") in said, said
    assert any(row[0] == "forward" and row[1] == "ok" for row in said), said
    xen = {row[2].partition(" (")[0]: row[1] for row in said if row[0] == "xen"}
    assert xen == {"libxenlight was built without COLO": "fail", "Xen's QEMU was built without COLO": "fail"}, said
