"""A real Pacemaker and Corosync on the lab's two hosts, made by the commands of docs/pacemaker.md.

The service, its guest and the client are the lab's. Its power switch is behind the cluster's fence devices, and the pair's
fencing command asks the cluster's fencer.
"""

from __future__ import annotations

import shlex
import socketserver
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from coloebpf.lab import services
from coloebpf.lab.plan import HOSTS, MANAGEMENT, LabPlan
from tests.lab.service_lab import Counter, ServiceLab, until
from tests.pacemaker import document
from tests.pacemaker.host import PATIENCE_S, Host

SECOND_LINK = "ring1"
NAMES = dict(zip(HOSTS, ("a", "b"), strict=True))  # the document's
LOST_MS = 2000  # a service may stand still for a second on a busy machine


class Switch(socketserver.ThreadingUnixStreamServer):
    """The BMCs' side of the lab's power switch."""

    daemon_threads = True

    def __init__(self, path: Path, cluster: Cluster) -> None:
        super().__init__(str(path), _Asked)
        self.cluster = cluster
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Asked(socketserver.StreamRequestHandler):
    server: Switch

    def handle(self) -> None:
        with suppress(BrokenPipeError):  # who was switched off by it does not wait for the answer
            self.wfile.write(f"{self.server.cluster.bmc(*self.rfile.readline().decode().split())}\n".encode())


class Cluster:
    """On the hosts of `lab`. To be closed."""

    def __init__(self, lab: ServiceLab, home: Path) -> None:
        self.lab = lab
        self.fenced: list[str] = []  # the lab's names, in order
        path = lab.plan.run_dir / "switch.sock"
        self.hosts = {host: Host(lab.plan, host, NAMES[host], home / host, path) for host in HOSTS}
        self._server = Switch(path, self)
        self._wire()

    @property
    def plan(self) -> LabPlan:
        return self.lab.plan

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for host in self.hosts.values():
            host.end()

    def _wire(self) -> None:
        """The second link. The first is the management network, which has the document's addresses."""
        spaces = [self.plan.namespace(host) for host in HOSTS]
        self._ip(
            "link", "add", SECOND_LINK, "netns", spaces[0], "type", "veth", "peer", SECOND_LINK, "netns", spaces[1]
        )
        for host, space in zip(HOSTS, spaces, strict=True):
            first, second = document.ring_addresses()[NAMES[host]]
            assert first == MANAGEMENT[host]
            self._ip("-n", space, "addr", "add", f"{second}/29", "dev", SECOND_LINK)
            self._ip("-n", space, "link", "set", SECOND_LINK, "up")

    # ---- the document's steps --------------------------------------------------------------------------------------

    def make(self) -> None:
        """All of "The cluster from nothing" before the pair: members, and fence devices."""
        for host in self.hosts.values():
            host.write("etc/corosync/corosync.conf", document.corosync_conf())
            addresses = document.ring_addresses().items()
            host.write("etc/hosts", "".join(f"{first} {name}\n" for name, (first, _) in addresses))
            host.boot()
        a, b = (self.hosts[host] for host in HOSTS)
        on_both = self.plan.run_dir / "authkey"  # a directory that both have
        a.must(*document.in_text("corosync-keygen").split())
        a.must("cp", "/etc/corosync/authkey", str(on_both))
        b.must("cp", str(on_both), "/etc/corosync/authkey")
        systemd, look = document.commands("systemctl enable --now corosync pacemaker")
        assert (systemd, look) == ("systemctl enable --now corosync pacemaker", "crm_mon -1")
        for host in self.hosts.values():
            host.enable()
        self.whole()
        for command in document.commands("crm configure property "):
            a.must(*shlex.split(command))

    def protect(self) -> Counter:
        """The rest of it, in lock-step and under Pacemaker in the end; returns a client that counts from now on."""
        for host in HOSTS:
            self.configure(host)
            self.hosts[host].must("coloebpf", "config", "check")
            self.lab.terminate(host)  # systemctl restart coloebpf
            self.lab.start(host)
        services.ready(self.plan, self.lab.running)
        a = self.hosts["primary"]
        for command in document.commands("crm configure primitive web "):
            a.must(*shlex.split(document.here(command)))
        until(partial(self._shows, "primary", "Promoted: [ a ]", "Unpromoted: [ b ]"), "the roles", PATIENCE_S)
        until(partial(self._scores, 1000, 10), "the scores", PATIENCE_S)
        return self.lab.counted()

    def configure(self, host: str, primary: str = HOSTS[0]) -> None:
        """The service's configuration, with the document's arbiter."""
        self.lab.plan = replace(self.plan, arbiter="command")
        path = services.configure(self.plan, host, primary=primary)
        other = services.other(host)
        words, timeout_s = document.arbiter(NAMES[other])
        program = self.plan.run_dir / f"stonith-from-{host}"  # the service is not in its host's root
        program.write_text(f'#!/bin/sh\nexec {shlex.join(self.hosts[host].enter())} {words[0]} "$@"\n')
        program.chmod(0o700)
        fence = ", ".join(f'"{word}"' for word in (str(program), *words[1:]))
        text, lab_s = path.read_text(), f'fence = ["{services.switch_of(self.plan, other)}"]'
        assert lab_s in text
        path.write_text(text.replace(lab_s, f"fence = [{fence}]\ntimeout_s = {timeout_s}"))

    def whole(self) -> None:
        """Returns when both hosts see what the document shows."""
        for host in HOSTS:
            until(partial(self._shows, host, document.shown("crm_mon -1")), f"{host} sees both members", PATIENCE_S)

    def _shows(self, host: str, *words: str) -> bool:
        shown = self.hosts[host].run("crm_mon", "-1A").stdout
        return all(word in shown for word in words)

    def _scores(self, *wanted: int) -> bool:
        shown = self.hosts["primary"].run("crm_mon", "-1A").stdout.splitlines()
        found = [line.split(":")[1].split()[0] for line in shown if "master-web" in line]
        return found == [str(score) for score in wanted]

    # ---- power -----------------------------------------------------------------------------------------------------

    def bmc(self, action: str, address: str, user: str, password: str, interface: str) -> str:
        """What the BMC at that address answers, as ipmitool prints it."""
        (name,) = [name for name, given in document.fence_parameters().items() if given["ip"] == address]
        given = document.fence_parameters()[name]
        if (user, password, interface) != (given["username"], given["password"], "lanplus"):
            return "Unable to establish IPMI session"
        host = next(host for host in HOSTS if NAMES[host] == name)
        if action == "off":
            self.fenced.append(host)
            self.power_cut(host)
        return f"Chassis Power is {'on' if self.lab.powered(host) else 'off'}"

    def power_cut(self, host: str) -> None:
        """Nobody has asked for it."""
        subprocess.run([services.switch_of(self.plan, host)], check=True)

    def power_on(self, host: str, primary: str = HOSTS[0]) -> None:
        """It boots, with Corosync and Pacemaker; the service is not started yet."""
        self.hosts[host].end()
        self.lab.running.pop(host).wait(PATIENCE_S)
        services.power_on(self.plan, host)
        self.hosts[host].boot()
        self.configure(host, primary)  # the fence command goes into the new root

    def mend(self) -> None:
        """All links."""
        self.lab.mend()
        self.lab.links("primary", "up", SECOND_LINK)

    # ---- the cluster -----------------------------------------------------------------------------------------------

    def promoted(self, host: str) -> list[str]:
        """Where Pacemaker, as `host` sees it, has the pair promoted: the lab's names."""
        shown = self.hosts[host].run("crm_resource", "--resource", "web-clone", "--locate").stdout.splitlines()
        words = [line.split(": ")[1].split() for line in shown if line.strip().endswith(("Promoted", "Master"))]
        return [host for host in HOSTS for one in words if one[0] == NAMES[host]]

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)
