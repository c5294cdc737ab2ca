"""The lab as the benchmark uses it: with coloebpf in both hosts, or as plain bridges."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Self

from coloebpf import bpfsys
from coloebpf.control import Control
from coloebpf.dataplane import Sizes
from coloebpf.lab import commands, hosts
from coloebpf.lab.commands import BringUp
from coloebpf.lab.plan import NODES, LabPlan
from coloebpf.netns import inside
from tests.bench.errors import BenchError
from tests.bench.feeder import Ports

FLOWS = 1 << 18  # the dataplane's table: one run of 100,000 flows, below the mark at which it asks for a checkpoint
PROGRAMS = {
    "primary": {"P1": "p1_mirror", "P2": "p2_output", "P3": "link_arrive", "P4": "link_deliver"},
    "secondary": {"S1": "link_arrive", "S1 delivery": "link_deliver", "S2": "s2_output", "S3": "s3_isolate"},
}  # as the report calls them: as the dataplane pins them

bring_up: BringUp = partial(hosts.bring_up, sizes=Sizes(flows=FLOWS))


class BenchLab:
    """A lab with bare guests, whose switches know where the client is."""

    def __init__(self, name: str, bring_up: BringUp | None) -> None:
        """Without `bring_up` the hosts are plain bridges, and the secondary's vif is in none.

        What the svm sends then ends at its host: a run with both guests costs what feeding and bridging cost, and the
        difference to the same run with coloebpf is what coloebpf adds.
        """
        self.plan = LabPlan(name=name, guests="none")
        self._bring_up = bring_up
        self._programs: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        """Makes it; a rest of an aborted benchmark goes first."""
        commands.down(self.plan)
        commands.up(self.plan, self._bring_up)
        try:
            self._introduce_client()
            if self._bring_up is None:
                self._link("secondary", "set", self._vif, "nomaster")
        except BaseException:
            commands.down(self.plan)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes it down."""
        for fd in self._programs.values():
            os.close(fd)
        self._programs.clear()
        commands.down(self.plan)

    def ports(self) -> Ports:
        """Where the feeder connects."""
        nic, client, namespace = self.plan.nic_list()[0], self.plan.client(), self.plan.namespace
        return Ports(
            primary=f"{namespace('pvm')}:{nic.guest_device}",
            secondary=f"{namespace('svm')}:{nic.guest_device}",
            client=f"{namespace('client')}:{client.device}",
            guest_mac=nic.mac,
            client_mac=client.mac,
        )

    def programs(self, host: str) -> Mapping[str, int]:
        """The hooks of a host, as descriptors of the pinned programs."""
        for name, pin in PROGRAMS[host].items():
            if (host, name) not in self._programs:
                self._programs[host, name] = bpfsys.obj_get(self.plan.pin_dir(host) / pin)
        return {name: self._programs[host, name] for name in PROGRAMS[host]}

    def ifindexes(self, host: str) -> Mapping[str, int]:
        """Of the host's vif and of its forward device."""
        nic = self.plan.nic_list()[0]
        with inside(self.plan.namespace(host)):
            return {"vif": socket.if_nametoindex(nic.vif), "fwd": socket.if_nametoindex(nic.fwd)}

    def check(self) -> None:
        """Raises if a host had no place for a flow: what was measured since is no measurement."""
        for host in PROGRAMS:
            with Control.open(self.plan.pin_dir(host)) as control:
                refused = sum(nic["dropped"]["no_flow"] for nic in control.snapshot()["nics"])
            if refused:
                raise BenchError(f"{refused} packets found the flow table of the {host} full")

    def dropped(self) -> Mapping[str, int]:
        """Frames that the kernel dropped since the lab is there, by device and direction: what no program has seen or sent. Zeros left out."""
        found = {}
        for node in NODES:
            with inside(self.plan.namespace(node)):
                links = json.loads(_command("ip", "-json", "-statistics", "link"))
            for link in links:
                for way, count in ((way, link["stats64"][way]["dropped"]) for way in ("rx", "tx")):
                    if count:
                        found[f"{node} {link['ifname']} {way}"] = count
        return found

    @property
    def steering(self) -> str:
        """The CPUs to which the primary's vif steers what it receives (a mask in hex)."""
        return self._in_primary("cat", self._steering_file)

    @steering.setter
    def steering(self, cpus: str) -> None:
        self._in_primary("sh", "-c", f"echo {cpus} > {self._steering_file}")

    @property
    def _vif(self) -> str:
        return self.plan.nic_list()[0].vif

    @property
    def _steering_file(self) -> str:
        return f"/sys/class/net/{self._vif}/queues/rx-0/rps_cpus"

    def _introduce_client(self) -> None:
        """The client never speaks; without these entries its frames would be flooded to both hosts."""
        mac = self.plan.client().mac
        for node, port in (("lan", "client"), ("primary", "eth0"), ("secondary", "eth0")):
            with inside(self.plan.namespace(node)):
                _command("bridge", "fdb", "replace", mac, "dev", port, "master", "static")

    def _link(self, node: str, *arguments: str) -> None:
        with inside(self.plan.namespace(node)):
            _command("ip", "link", *arguments)

    def _in_primary(self, *command: str) -> str:
        # `ip netns exec` mounts the namespace's own /sys, which setns alone doesn't.
        return _command("ip", "netns", "exec", self.plan.namespace("primary"), *command)


def _command(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
