"""Two Xen hosts with a link between them and a client beside them: up, down, and commands on each."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from coloebpf.errors import LabError
from tests.xen import cache, dom0, machine, wires
from tests.xen.cache import Cache, tell
from tests.xen.guests import Guest
from tests.xen.plan import CACHE, CLIENT, HOSTS, LAN, MANAGEMENT, XenPlan

SSH_OPTIONS = {
    "User": "root",
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": "/dev/null",
    "LogLevel": "ERROR",
    "Ciphers": "aes128-gcm@openssh.com",
    "ConnectTimeout": "60",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "30",
    # A handshake takes seconds on an emulated CPU: one for all commands of ten minutes.
    "ControlMaster": "auto",
    "ControlPersist": "10m",
}
PUSHED = ("coloebpf", "bpf", "deploy", "pyproject.toml", "README.md")
COMMAND_TIMEOUT = 300.0  # seconds; only bounds a hang
PING_TIMEOUT = 1500.0


class Lab:
    """A lab that is up, or is to be."""

    def __init__(self, plan: XenPlan) -> None:
        self.plan = plan
        self._packages: Sequence[Path] = ()

    # ---- up and down -----------------------------------------------------------------------------------------------

    def up(self, packages: Sequence[Path] = ()) -> None:
        """Makes what is missing and boots both hosts with coloebpf as it is in this tree. What was left of a lab goes first."""
        begun = time.monotonic()
        self._packages = packages
        boot = dom0.made(Cache(CACHE), packages)
        self.down()
        try:
            wires.lay(self.plan)
            for host in HOSTS:
                machine.start(self.plan, host, boot)
            self._await_hosts(HOSTS)
        except BaseException:
            self.down(keep_logs=True)
            raise
        tell(f"up after {time.monotonic() - begun:.0f} s")

    def boot(self, host: int, packages: Sequence[Path] = ()) -> None:
        """Switches a host on again, with a fresh disk."""
        machine.kill(self.plan, host)
        machine.start(self.plan, host, dom0.made(Cache(CACHE), packages))
        self._await_hosts([host])

    def anew(self) -> None:
        """Both hosts are switched on again, with fresh disks: nothing of an earlier guest is left."""
        boot = dom0.made(Cache(CACHE), self._packages)
        for host in HOSTS:
            machine.kill(self.plan, host)
            machine.start(self.plan, host, boot)
        self._await_hosts(HOSTS)

    def _await_hosts(self, hosts: Sequence[int]) -> None:
        for host in hosts:
            tell(f"host {host}: dom0 is up after {machine.wait(self.plan, host):.0f} s")
        for host in hosts:
            self._write_ssh_config(host)
            self.push(host)

    def down(self, keep_logs: bool = False) -> None:
        """Takes everything down, what only half came up too."""
        for host in HOSTS:
            if (self.plan.home(host) / "ssh.sock").exists():
                subprocess.run(self.ssh(host, "-O", "exit"), capture_output=True, check=False)
            machine.kill(self.plan, host)
        wires.take_up(self.plan)
        if keep_logs:
            tell(f"what the hosts said is in {self.plan.directory}")
        else:
            cache.remove(self.plan.directory)

    def kill(self, host: int) -> None:
        """A host loses its power."""
        machine.kill(self.plan, host)

    def running(self) -> list[int]:
        """The hosts that are on."""
        return [host for host in HOSTS if machine.running(self.plan, host) is not None]

    # ---- commands --------------------------------------------------------------------------------------------------

    def ssh(self, host: int, *words: str) -> list[str]:
        """A command of this machine that runs `words` (options first) on a host, in its shell."""
        config = self.plan.home(host) / "ssh_config"
        return [*self.client(), "ssh", "-F", str(config), *_options_first(words, f"host{host}")]

    def client(self, *words: str) -> list[str]:
        """The same for the client."""
        return ["nsenter", f"--net=/run/netns/{self.plan.name}", *words]

    def where(self, place: str, words: Sequence[str]) -> list[str]:
        """The same for '1', '2' or 'client'."""
        return self.client(*words) if place == CLIENT else self.ssh(int(place), "--", shlex.join(words))

    def run(self, host: int, command: str, timeout: float = COMMAND_TIMEOUT, check: bool = True) -> str:
        """What a shell command on a host prints. Raises LabError if it fails."""
        return _output(self.ssh(host, "--", command), f"host{host}: {command}", timeout, check)

    def on_client(self, command: str, timeout: float = COMMAND_TIMEOUT, check: bool = True) -> str:
        """The same on the client."""
        return _output(self.client("sh", "-c", command), f"client: {command}", timeout, check)

    def write(self, host: int, path: str, text: str) -> None:
        """A file on a host."""
        words = self.ssh(host, "--", f"mkdir -p $(dirname {path}) && cat >{path}")
        subprocess.run(words, input=text, text=True, check=True, timeout=COMMAND_TIMEOUT)

    def push(self, host: int) -> None:
        """This tree's coloebpf becomes the host's."""
        listing = ["git", "-C", str(dom0.REPO), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run([*listing, *PUSHED], check=True, capture_output=True).stdout
        names = b"\0".join(name for name in listed.split(b"\0") if name and (dom0.REPO / name.decode()).is_file())
        packed = subprocess.run(
            ["tar", "-C", str(dom0.REPO), "--null", "--files-from=-", "-cf", "-"],
            input=names,
            check=True,
            capture_output=True,
        ).stdout
        place = dom0.IN_DOM0
        command = f"cd {place} && rm -rf coloebpf bpf deploy && tar -xmf -"
        subprocess.run(self.ssh(host, "--", command), input=packed, check=True, timeout=COMMAND_TIMEOUT)

    def _write_ssh_config(self, host: int) -> None:
        home = self.plan.home(host)
        options = {
            **SSH_OPTIONS,
            "HostName": self.plan.address(MANAGEMENT, host),
            "IdentityFile": str(dom0.ssh_key()),
            "ControlPath": str(home / "ssh.sock"),
        }
        (home / "ssh_config").write_text(f"Host host{host}\n" + "".join(f"{k} {v}\n" for k, v in options.items()))

    # ---- guests ----------------------------------------------------------------------------------------------------

    def create(self, host: int, guest: Guest) -> int:
        """Makes a guest, which is up when this returns; its domain id."""
        path = f"/etc/xen/{guest.name}.cfg"
        self.write(host, path, guest.config())
        self.run(host, f"xl create -q {path}")
        self.await_answer(guest)
        return self.domid(host, guest.name)

    def domid(self, host: int, name: str) -> int:
        return int(self.run(host, f"xl domid {name}"))

    def await_answer(self, guest: Guest, timeout: float = PING_TIMEOUT) -> None:
        """Until the client's ping comes back."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ping = ["busybox", "ping", "-c", "1", "-W", "5", guest.address]
            if subprocess.run(self.client(*ping), capture_output=True, check=False).returncode == 0:
                return
            time.sleep(machine.POLL)
        raise LabError(f"guest {guest.name} does not answer at {guest.address} on {LAN} after {timeout:g} s")


def _options_first(words: Sequence[str], target: str) -> list[str]:
    if "--" not in words:
        return [*words, target]
    split = list(words).index("--")
    return [*words[:split], target, *words[split:]]


def _output(argv: list[str], what: str, timeout: float, check: bool) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode:
        raise LabError(f"{what} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout
