"""A real Pacemaker and Corosync on the lab's two hosts: each a Debian root in the host's network namespace, with process numbers of its own.

The service, its guest and the client are the lab's. Its power switch is the cluster's fence device, and the pair's fencing
command asks the cluster's fencer.
"""

from __future__ import annotations

import os
import shutil
import socketserver
import subprocess
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from coloebpf.lab import services
from coloebpf.lab.plan import HOSTS, LabPlan
from tests.lab.service_lab import ServiceLab, until

TREE = Path(__file__).resolve().parents[2]
PACKAGES = (
    "pacemaker,pacemaker-cli-utils,corosync,crmsh,resource-agents,fence-agents,iproute2,libxml2-utils,procps,python3"
)
RING_LINK = "ring0"
RING = {"primary": "192.0.2.129", "secondary": "192.0.2.130"}  # a link of the cluster's own
PATIENCE_S = 120.0
CONTROL = "/run/coloebpf-control.sock"  # the same on both hosts, which the lab's are not
AGENT = "usr/lib/ocf/resource.d/coloebpf/coloebpf"

COROSYNC = """\
totem {
    version: 2
    cluster_name: coloebpf
    transport: knet
    token: 3000
}
nodelist {
    node {
        name: primary
        nodeid: 1
        ring0_addr: 192.0.2.129
    }
    node {
        name: secondary
        nodeid: 2
        ring0_addr: 192.0.2.130
    }
}
quorum {
    provider: corosync_votequorum
    two_node: 1
}
logging {
    to_logfile: yes
    logfile: /var/log/corosync/corosync.log
}
"""

# The cluster's configuration of docs/pacemaker.md, with the lab's names and its fence device.
CRM = """\
property stonith-enabled=true stonith-action=off no-quorum-policy=stop
rsc_defaults resource-stickiness=1
primitive fence-primary stonith:fence_lab params pcmk_host_list=primary pcmk_delay_base={delay}s
primitive fence-secondary stonith:fence_lab params pcmk_host_list=secondary
location fence-primary-elsewhere fence-primary -inf: primary
location fence-secondary-elsewhere fence-secondary -inf: secondary
primitive guest ocf:coloebpf:coloebpf params pair=guest socket={socket} \\
    op start timeout=60s interval=0 op stop timeout=30s interval=0 op promote timeout=180s interval=0 op demote timeout=120s interval=0 \\
    op monitor interval=3s timeout=30s role=Promoted op monitor interval=4s timeout=30s role=Unpromoted
clone guest-clone guest meta promotable=true promoted-max=1 clone-max=2 notify=true interleave=true
"""

FENCE = """\
#!/usr/bin/python3
import os, socket, sys
META = '''<?xml version="1.0"?>
<resource-agent name="fence_lab" shortdesc="the lab's power switch"><longdesc>x</longdesc><vendor-url>x</vendor-url>
<parameters><parameter name="port" unique="0" required="0"><content type="string"/></parameter>
<parameter name="action" unique="0" required="0"><content type="string" default="off"/></parameter></parameters>
<actions><action name="on"/><action name="off"/><action name="status"/><action name="monitor"/><action name="metadata"/></actions>
</resource-agent>'''
if sys.argv[1:]:
    options = {"action": "metadata"}
else:
    options = dict(line.strip().split("=", 1) for line in sys.stdin if "=" in line)
action = options.get("action", "off")
if action == "metadata":
    print(META)
    sys.exit(0)
if action == "monitor":
    sys.exit(0)
with socket.socket(socket.AF_UNIX) as s:
    s.connect("@SWITCH@")
    s.sendall(f"{action} {options.get('port') or options['nodename']}\\n".encode())
    sys.exit(int(s.makefile().readline()))
"""

INIT = """\
#!/bin/sh
mkdir -p /run/lock /run/resource-agents /var/log/corosync /var/log/pacemaker /var/lib/corosync
ip link set lo up
corosync -f >/var/log/corosync/out 2>&1 &
until corosync-cmapctl -g runtime.votequorum.this_node_id >/dev/null 2>&1; do sleep 0.2; done
pacemakerd -f >/var/log/pacemaker/out 2>&1 &
while :; do wait; sleep 1; done
"""

ENTER = """\
set -e
hostname {host}
mount -t overlay overlay -o lowerdir={base},upperdir={upper},workdir={work} {root}
mount -t proc proc {root}/proc
mount -t tmpfs tmpfs {root}/dev
for name in null zero random urandom tty; do touch {root}/dev/$name; mount --bind /dev/$name {root}/dev/$name; done
mkdir {root}/dev/shm
mount -t tmpfs tmpfs {root}/dev/shm
mount -t tmpfs tmpfs {root}/run
mkdir -p {root}{run_dir} {root}{tree}
mount --bind {run_dir} {root}{run_dir}
mount --bind {tree} {root}{tree}
exec chroot {root} /bin/sh /cluster-init
"""


def make_root(path: Path) -> None:
    """Debian 12 with the cluster's packages."""
    done = subprocess.run(
        ["unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=apt", '--aptopt=Acquire::Retries "3"', f"--include={PACKAGES}", "bookworm", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


class Switch(socketserver.ThreadingUnixStreamServer):
    """The lab's power switch at a socket: `off HOST`, `status HOST`."""

    daemon_threads = True

    def __init__(self, path: Path, cluster: Cluster) -> None:
        super().__init__(str(path), _Asked)
        self.cluster = cluster
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Asked(socketserver.StreamRequestHandler):
    server: Switch

    def handle(self) -> None:
        action, host = self.rfile.readline().decode().split()
        with suppress(BrokenPipeError):  # who was switched off by it does not wait for the answer
            self.wfile.write(f"{self.server.cluster.switch(action, host)}\n".encode())


class Cluster:
    """On the hosts of `lab`. To be closed."""

    def __init__(self, lab: ServiceLab, base: Path, home: Path) -> None:
        self.lab, self._base, self._home = lab, base, home
        self.fenced: list[str] = []  # hosts, in order
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._real = {host: lab.plan.run_dir / f"really-off-{host}" for host in HOSTS}
        for host in HOSTS:
            services.switch_of(lab.plan, host).rename(self._real[host])
        self._server = Switch(lab.plan.run_dir / "switch.sock", self)
        spaces = [lab.plan.namespace(host) for host in HOSTS]
        self._ip(
            "link", "add", RING_LINK, "netns", spaces[0], "type", "veth", "peer", "name", RING_LINK, "netns", spaces[1]
        )
        for host, space in zip(HOSTS, spaces, strict=True):
            self._ip("-n", space, "addr", "add", f"{RING[host]}/29", "dev", RING_LINK)
            self._ip("-n", space, "link", "set", RING_LINK, "up")

    @property
    def plan(self) -> LabPlan:
        return self.lab.plan

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for host in HOSTS:
            self.stop(host)
            self._real[host].rename(services.switch_of(self.plan, host))

    # ---- hosts -----------------------------------------------------------------------------------------------------

    def start(self, host: str) -> None:
        """Corosync and Pacemaker, as after a boot."""
        home = self._home / host
        if not home.exists():
            for name in ("upper", "work", "root"):
                (home / name).mkdir(parents=True)
            self._furnish(home / "upper")
        enter = ENTER.format(
            host=host, base=self._base, upper=home / "upper", work=home / "work", root=home / "root",
            run_dir=self.plan.run_dir, tree=TREE,
        )  # fmt: skip
        with open(home / "log", "ab") as log:
            self._inits[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.plan.namespace(host), "unshare", "--mount", "--uts", "--ipc", "--pid",
                 "--fork", "--kill-child", "sh", "-c", enter],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        other = services.other(host)
        path = services.switch_of(self.plan, other)
        path.write_text(
            f"#!/bin/sh\nexec {' '.join(self._enter(host))} /usr/sbin/stonith_admin --fence {other} --timeout 60\n"
        )
        path.chmod(0o700)

    def _furnish(self, upper: Path) -> None:
        files = {
            "etc/corosync/corosync.conf": COROSYNC,
            "cluster-init": INIT,
            "etc/hosts": "".join(f"{address} {host}\n" for host, address in RING.items()),
            "usr/sbin/fence_lab": FENCE.replace("@SWITCH@", str(self.plan.run_dir / "switch.sock")),
            "usr/bin/coloebpf": f'#!/bin/sh\nPYTHONPATH={TREE}:{TREE}/.venv/lib/python3.11/site-packages exec python3 -m coloebpf "$@"\n',
        }
        for name, text in files.items():
            (upper / name).parent.mkdir(parents=True, exist_ok=True)
            (upper / name).write_text(text)
            (upper / name).chmod(0o755)
        (upper / AGENT).parent.mkdir(parents=True)
        shutil.copy(TREE / "deploy/pacemaker/ocf/coloebpf", upper / AGENT)

    def _init(self, host: str) -> int:
        """Its number outside."""
        outer = self._inits[host].pid
        children = Path(f"/proc/{outer}/task/{outer}/children")
        until(lambda: children.read_text().split(), "the host's first process", PATIENCE_S)
        return int(children.read_text().split()[0])

    def _enter(self, host: str) -> list[str]:
        space = self.plan.namespace(host)
        return [
            "ip",
            "netns",
            "exec",
            space,
            "nsenter",
            "-t",
            str(self._init(host)),
            "-m",
            "-u",
            "-i",
            "-p",
            "-r",
            "-w",
        ]

    def run(
        self, host: str, *command: str, text: str = "", timeout: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """A command of an operator there."""
        return subprocess.run(
            [*self._enter(host), *command], input=text, capture_output=True, text=True, check=False, timeout=timeout,
            env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    def must(self, host: str, *command: str, text: str = "") -> str:
        done = self.run(host, *command, text=text)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def stop(self, host: str) -> None:
        """As power loss, of the cluster's part alone."""
        if (process := self._inits.pop(host, None)) is not None:
            process.kill()
            process.wait()

    def switch(self, action: str, host: str) -> int:
        """The fence device: 0 is done; of status 0 is on, 2 off."""
        if action == "off":
            self.fenced.append(host)
            return subprocess.run([self._real[host]], check=False).returncode
        return (0 if self.lab.powered(host) else 2) if action == "status" else 1

    def power_cut(self, host: str) -> None:
        """Nobody has asked for it."""
        subprocess.run([self._real[host]], check=True)

    # ---- the cluster -----------------------------------------------------------------------------------------------

    def configure(self, delay_s: int = 5) -> None:
        """The pair and its fence devices, when both hosts are members."""
        for host in HOSTS:
            until(partial(self._whole, host), f"{host} sees both members", PATIENCE_S)
            self.must(host, "ln", "-sf", str(services.directory(self.plan, host) / "control.sock"), CONTROL)
        text = CRM.format(delay=delay_s, socket=CONTROL)
        self.must("primary", "crm", "configure", "load", "update", "-", text=text)

    def _whole(self, host: str) -> bool:
        return "Online: [ primary secondary ]" in self.run(host, "crm_mon", "-1").stdout

    def promoted(self, host: str) -> list[str]:
        """Where Pacemaker, as `host` sees it, has the pair promoted."""
        shown = self.run(host, "crm_resource", "--resource", "guest-clone", "--locate").stdout
        return [
            line.split(": ")[1].split()[0]
            for line in shown.splitlines()
            if line.strip().endswith(("Promoted", "Master"))
        ]

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)
