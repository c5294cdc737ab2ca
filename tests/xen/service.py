"""coloebpf's service on the lab's hosts: its configuration, start and end."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coloebpf.errors import LabError
from coloebpf.service.peer import pki
from tests.xen import limits
from tests.xen.guests import BRIDGE, Guest
from tests.xen.lab import Lab
from tests.xen.plan import DIRECT, FORWARD, HOSTS

CONFIG = "/etc/coloebpf/coloebpf.toml"
LOG = "/var/log/coloebpf.log"
LIMITED = "/usr/local/sbin/limited"  # runs what is behind it with the unit's limits
PORT, COLO_PORT = 7788, 9000
START_TIMEOUT = 1800.0  # seconds; the compiler took 640 of them on a busy machine, on an emulated CPU
POLL = 5.0


def hand_out_certificates(lab: Lab) -> None:
    """Of one authority, to the hosts that are on."""
    names = [f"host{host}" for host in HOSTS]
    with tempfile.TemporaryDirectory() as directory:
        pki.init_pki(Path(directory) / "pki", names)
        for host in lab.running():
            for file, name in (("ca.pem", "ca.pem"), (f"host{host}.pem", "host.pem"), (f"host{host}.key", "host.key")):
                path = f"/etc/coloebpf/pki/{name}"
                lab.write(host, path, (Path(directory) / "pki" / file).read_text())
                lab.run(host, f"chmod 600 {path}")


def configure(lab: Lab, host: int, vifs: Mapping[Guest, str], engine: str = "model") -> None:
    """A host's configuration: a pair per guest, all on one forward link; host 1 is the primary of each.

    `vifs`: the guests' devices on this host.
    """
    other = 3 - host
    text = f"""
[host]
name = "host{host}"
[peer]
name = "host{other}"
listen = "{lab.plan.address(DIRECT, host)}:{PORT}"
connect = "{lab.plan.address(DIRECT, other)}:{PORT}"
heartbeat_interval_ms = 500
heartbeat_timeout_ms = 20000
"""
    for number, (guest, vif) in enumerate(vifs.items()):
        text += f"""
[[pair]]
name = "{guest.name}"
number = {number}
role = "{"primary" if host == 1 else "secondary"}"
engine = "{engine}"
commit_timeout_ms = 120000
compare_timeout_ms = 3000
[[pair.nic]]
number = {number}
vif = "{vif}"
fwd = "{FORWARD}0"
vlan = {number + 1}
mac = "{guest.mac}"
bridge = "{BRIDGE}"
"""
        if engine == "libxl-colo":
            text += f'[pair.libxl_colo]\nlisten = "127.0.0.1:{COLO_PORT + number}"\ndomain = "{guest.name}"\n'
    lab.write(host, CONFIG, text)


def start(lab: Lab, host: int) -> None:
    """Returns when the programs of all pairs are compiled and attached."""
    lab.write(host, LIMITED, limits.script())
    lab.run(
        host,
        f"chmod 755 {LIMITED} && {{ setsid {LIMITED} coloebpf run </dev/null >{LOG} 2>&1 & echo $! >/run/coloebpf.pid; }}",
    )
    pairs = int(lab.run(host, f"grep -c '^\\[\\[pair\\]\\]' {CONFIG}"))
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        # Its log, for a `coloebpf status` would take the CPU from the compiler.
        # One that finds its programs attached says only that it has loaded what was there before.
        attached = lab.run(host, f"grep -c -e ' attached ' -e as_before=True {LOG}", check=False)
        if int(attached or 0) >= pairs and lab.run(host, "coloebpf status --json", check=False).strip():
            return
        if not lab.run(host, "kill -0 $(cat /run/coloebpf.pid) && echo yes", check=False).strip():
            break
        time.sleep(POLL)
    raise LabError(f"host {host}: the service does not get ready\n{lab.run(host, f'tail -n 20 {LOG}')}")


def stop(lab: Lab, host: int) -> None:
    """Ends it, and takes the programs off; those of a promoted pair stay, for nobody may take them off."""
    lab.run(
        host,
        "kill $(cat /run/coloebpf.pid) 2>/dev/null; "
        "while kill -0 $(cat /run/coloebpf.pid) 2>/dev/null; do sleep 0.2; done; coloebpf detach",
        check=False,
    )


def status(lab: Lab, host: int) -> dict[str, Any]:
    """What `coloebpf status --json` says."""
    said: dict[str, Any] = json.loads(lab.run(host, "coloebpf status --json"))
    return said
