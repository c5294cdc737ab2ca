"""A host of the cluster: a Debian root in the network namespace of a lab's host, with process numbers and a name of its own.

Its BMC is a stand-in for ipmitool, which asks the lab's power switch: the fence agent before it is Debian's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from coloebpf.lab import services
from coloebpf.lab.plan import LabPlan
from tests.lab.service_lab import until
from tests.pacemaker import document

TREE = Path(__file__).resolve().parents[2]
ROOT = TREE / ".cache" / "pacemaker-root"
MADE_WITH = "pacemaker-root.packages"  # beside it
# Beside what the document has installed: what its commands get by apt's recommendations, and what the tests look with.
MORE = ("pacemaker-cli-utils", "iproute2", "libxml2-utils", "procps", "python3", "hostname")
PATIENCE_S = 120.0
AGENT = "usr/lib/ocf/resource.d/coloebpf/coloebpf"
ENABLED = "etc/cluster-enabled"

IPMITOOL = """\
#!/usr/bin/python3
# ipmitool -I lanplus -H ADDRESS ... -U USER -P PASSWORD ... chassis power on|off|status
import socket, sys
words = sys.argv[1:]
given = {one: two for one, two in zip(words, words[1:]) if one in ("-I", "-H", "-U", "-P")}
action = words[words.index("power") + 1]
with socket.socket(socket.AF_UNIX) as s:
    s.connect("@SWITCH@")
    s.sendall(f"{action} {given['-H']} {given['-U']} {given['-P']} {given['-I']}\\n".encode())
    answer = s.makefile().readline().strip()
print(answer)
sys.exit(0 if answer.startswith("Chassis") else 1)
"""

INIT = """\
#!/bin/sh
mkdir -p /run/lock /run/resource-agents /var/log/corosync /var/log/pacemaker /var/lib/corosync
ip link set lo up
until [ -e /@ENABLED@ ]; do sleep 0.2; done
corosync -f >>/var/log/corosync/out 2>&1 &
until corosync-cmapctl -g runtime.votequorum.this_node_id >/dev/null 2>&1; do sleep 0.2; done
pacemakerd -f >>/var/log/pacemaker/out 2>&1 &
while :; do wait; sleep 1; done
"""

ENTER = """\
set -e
hostname {name}
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
ln -s {service}/control.sock {root}/run/coloebpf/control.sock
exec chroot {root} /bin/sh /cluster-init
"""


def made_root() -> Path:
    """Debian 12 with the document's packages; made once for each list of them."""
    packages = ",".join(sorted({*document.packages(), *MORE}))
    note = ROOT.parent / MADE_WITH
    if ROOT.exists() and note.exists() and note.read_text() == packages:
        return ROOT
    ROOT.parent.mkdir(exist_ok=True)
    shutil.rmtree(ROOT, ignore_errors=True)
    made = ROOT.with_suffix(".new")
    shutil.rmtree(made, ignore_errors=True)
    done = subprocess.run(
        ["unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=apt", '--aptopt=Acquire::Retries "3"', f"--include={packages}", "bookworm", str(made)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made.rename(ROOT)
    note.write_text(packages)
    return ROOT


class Host:
    """`host` of the lab, called `name` in the cluster; its files are in `home`."""

    def __init__(self, plan: LabPlan, host: str, name: str, home: Path, switch: Path) -> None:
        self.host, self.name = host, name
        self._plan, self._home = plan, home
        self._service = services.directory(plan, host)
        self._outer: subprocess.Popen[bytes] | None = None
        for part in ("upper", "work", "root"):
            (home / part).mkdir(parents=True)
        self.write("cluster-init", INIT.replace("@ENABLED@", ENABLED))
        self.write("usr/bin/ipmitool", IPMITOOL.replace("@SWITCH@", str(switch)))
        self.write(
            "usr/bin/coloebpf",
            f'#!/bin/sh\nPYTHONPATH={TREE}:{TREE}/.venv/lib/python3.11/site-packages exec python3 -m coloebpf "$@"\n',
        )
        self.write(AGENT, (TREE / "deploy/pacemaker/ocf/coloebpf").read_text())
        (home / "upper/etc/coloebpf").mkdir(parents=True)
        (home / "upper/etc/coloebpf/coloebpf.toml").symlink_to(self._service / "coloebpf.toml")

    def write(self, name: str, text: str | bytes) -> None:
        """A file of its root, before it boots."""
        path = self._home / "upper" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o755)

    def boot(self) -> None:
        """Its first process; Corosync and Pacemaker too if they are enabled."""
        enter = ENTER.format(
            name=self.name, base=made_root(), upper=self._home / "upper", work=self._home / "work",
            root=self._home / "root", run_dir=self._plan.run_dir, tree=TREE, service=self._service,
        )  # fmt: skip
        with open(self._home / "log", "ab") as log:
            self._outer = subprocess.Popen(
                ["ip", "netns", "exec", self._plan.namespace(self.host), "unshare", "--mount", "--uts", "--ipc",
                 "--pid", "--fork", "--kill-child", "sh", "-c", enter],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until(self._mounted, f"{self.name} boots", PATIENCE_S)

    def _mounted(self) -> bool:
        return self.run("test", "-d", "/run/resource-agents").returncode == 0

    def enable(self) -> None:
        """`systemctl enable --now corosync pacemaker`."""
        self.must("touch", f"/{ENABLED}")

    def end(self) -> None:
        """As power loss, of the cluster's part alone."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait()
            self._outer = None

    def enter(self) -> list[str]:
        """What goes before a command that is to run there."""
        assert self._outer is not None
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        until(lambda: children.read_text().split(), "the host's first process", PATIENCE_S)
        first = children.read_text().split()[0]
        space = ["ip", "netns", "exec", self._plan.namespace(self.host)]
        return [*space, "nsenter", "-t", first, "-m", "-u", "-i", "-p", "-r", "-w"]

    def run(self, *command: str, timeout: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """A command of an operator there."""
        return subprocess.run(
            [*self.enter(), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=timeout,
            env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    def must(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout
