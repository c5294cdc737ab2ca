"""The systemd unit: sound, as tight as it says, and not too tight for what the service does to the kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coloebpf.dataplane import detach
from coloebpf.model import MAX_PAIRS
from coloebpf.netns import inside

REPO = Path(__file__).parents[2]
PIN_ROOT = Path("/sys/fs/bpf/coloebpf")
UNIT = REPO / "deploy" / "systemd" / "coloebpf.service"
EXPOSURE = 3.7  # of systemd 252's scale from 0.0 to 10.0; the unit's own comment says it too


def settings(key: str) -> list[str]:
    """All values of a key, in order."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.M)


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed (deploy/install-deps.sh test)")
    return found


def test_systemd_finds_no_fault_in_it(analyze: str, tmp_path: Path) -> None:
    """`verify` wants the programs that it names to exist: here they are those of any machine."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, ours) == (0, [])


def test_its_exposure_is_what_it_says(analyze: str) -> None:
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = re.search(r"exposure level for coloebpf\.service: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found.group(1)) == EXPOSURE
    assert f"an exposure of {EXPOSURE} " in UNIT.read_text()


def test_each_pairs_connection_has_room_in_the_store() -> None:
    assert int(settings("FileDescriptorStoreMax")[0]) >= 2 * MAX_PAIRS


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with vif0 and fwd0."""
    if os.geteuid() != 0:
        pytest.skip("loading programs needs root")
    name = f"coloebpf-unit-file-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    for device, mtu in (("vif0", 1500), ("fwd0", 1600)):
        for command in (f"add {device} mtu {mtu} type veth peer name {device}p mtu {mtu}", f"set {device} up"):
            subprocess.run(["ip", "-n", name, "link", *command.split()], check=True)
    yield name
    with inside(name):
        detach(PIN_ROOT / name)  # a process that may too little can't clean up either
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.kernel
@pytest.mark.parametrize("enough", [True, False], ids=["its own", "one less"])
def test_its_capabilities_suffice_for_the_dataplane(namespace: str, enough: bool) -> None:
    """No new privileges, no memory that is both writable and executable, and these capabilities alone; one less is too few."""
    capabilities = [name.removeprefix("CAP_").lower() for name in settings("CapabilityBoundingSet")[0].split()]
    if not enough:
        capabilities.remove("sys_admin")
    done = subprocess.run(
        [
            "nsenter", f"--net=/run/netns/{namespace}", "setpriv", "--no-new-privs",
            "--bounding-set", ",".join(["-all", *(f"+{name}" for name in capabilities)]),
            sys.executable, "-m", "tests.service.unit_limits", str(PIN_ROOT / namespace),
        ],
        cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is enough, done.stdout + done.stderr
    assert ("all done" in done.stdout) is enough
