"""The dataplane of the lab's two hosts: the same loader, programs and controls as on real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coloebpf import tuning
from coloebpf.control import Control, State
from coloebpf.dataplane import Dataplane, NicSpec, Role, Sizes
from coloebpf.lab import loaders
from coloebpf.lab.plan import HOSTS, PAIR, LabPlan
from coloebpf.netns import inside

BringUp = Callable[[LabPlan], None]

ROLES = {"primary": Role.PRIMARY, "secondary": Role.SECONDARY}


def bring_up(plan: LabPlan, sizes: Sizes | None = None) -> None:
    """Load and attach on both hosts, then put the pair in lock-step.

    `sizes`: others than the defaults for the lab's MTU.
    """
    # Here, where the machine's own namespace is at hand: the number is the machine's, and a lab's namespace doesn't
    # show it.
    tuning.raise_backlog(2 * (sizes or Sizes.of_mtu(plan.mtu)).slots, first="/proc/thread-self/ns/net")
    loaders.run(attach, [(f"the {host} host", (plan, host, sizes)) for host in HOSTS])
    # The secondary first: from the primary's change on, every packet waits for the SVM's.
    for host in reversed(HOSTS):
        with inside(plan.namespace(host)), Control.open(plan.pin_dir(host)) as control:
            control.set_state(PAIR, State.LOCKSTEP)


def attach(plan: LabPlan, host: str, sizes: Sizes | None = None) -> None:
    """Load the programs for one host and hook them up in its namespace."""
    with inside(plan.namespace(host)):
        dataplane = Dataplane.load(plan.pin_dir(host), sizes or Sizes.of_mtu(plan.mtu))
        for nic in plan.nic_list():
            dataplane.attach(
                NicSpec(nic=nic.nic, pair=PAIR, role=ROLES[host], vif=nic.vif, fwd=nic.fwd, vlan=nic.vlan, mac=nic.mac)
            )


def checkpoint(plan: LabPlan) -> dict[str, int]:
    """A checkpoint by an engine that commits at once; returns the new epoch and how many packets were flushed."""
    # An engine without a `suspended` of its own needs the careful order (docs/design.md, section 3).
    with inside(plan.namespace("secondary")), Control.open(plan.pin_dir("secondary")) as control:
        control.clear_translations(PAIR)
        control.settle_translations(PAIR)
    with inside(plan.namespace("primary")), Control.open(plan.pin_dir("primary")) as control:
        epoch = control.suspend(PAIR)
        return {"epoch": epoch, "flushed": control.commit(PAIR)}


def snapshot(plan: LabPlan, host: str) -> dict[str, Any]:
    """Counters and states of one host."""
    with inside(plan.namespace(host)), Control.open(plan.pin_dir(host)) as control:
        return control.snapshot()
