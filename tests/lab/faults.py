"""What can go wrong with two hosts, and when: the rows and columns of test_faults_matrix.py."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random

from coloebpf.errors import ColoError
from coloebpf.lab import services
from coloebpf.lab.plan import ARBITER, GUESTS, HOSTS
from tests.lab.service_lab import FWD, MANAGEMENT_LINK, ServiceLab, until

BRIEF_S = 0.8  # the longest that something is away for a moment
LEASES_S = 2.5  # what is frozen for so long finds all its leases ended

ARBITERS = ("command", "etcd")  # those that promote
BOTH, REPLICA, PRIMARY = "both in lock-step", "the replica", "the primary alone"  # who serves in the end

Act = Callable[[ServiceLab, Random], None]


# ---- when --------------------------------------------------------------------------------------------------------------


def in_lockstep(lab: ServiceLab, dice: Random) -> Callable[[], None]:
    time.sleep(dice.uniform(0, 0.3))
    return lambda: None


def asked_for(lab: ServiceLab, dice: Random) -> Callable[[], None]:
    """The engine was asked for a checkpoint, and the PVM still runs."""
    return _held_at(lab, "request", dice)


def standing_still(lab: ServiceLab, dice: Random) -> Callable[[], None]:
    """The PVM was suspended, and the secondary has not the whole state."""
    release = _held_at(lab, "suspended", dice)
    until(lambda: lab.state("primary") == "checkpointing", "the PVM is suspended")
    assert lab.counter
    told = lab.counter.count
    time.sleep(dice.uniform(0, 0.2))
    assert lab.counter.count <= told + 1  # one may have been on its way
    return release


def one_after_the_other(lab: ServiceLab, dice: Random) -> Callable[[], None]:
    """Any step of a checkpoint may be under way."""
    ended = threading.Event()

    def order() -> None:
        while not ended.is_set():
            with suppress(ColoError, OSError):
                lab.checkpoint()

    threading.Thread(target=order, daemon=True).start()
    time.sleep(dice.uniform(0, 0.3))
    return ended.set


def release(lab: ServiceLab) -> None:
    """The engine goes on with what it was held at."""
    with suppress(ColoError, OSError):  # its service may be gone, or another one
        services.tell_engine(lab.plan, do="go")


def _held_at(lab: ServiceLab, step: str, dice: Random) -> Callable[[], None]:
    def order() -> None:
        with suppress(ColoError, OSError):
            lab.checkpoint()

    services.tell_engine(lab.plan, do="hang", at=step)
    before = services.tell_engine(lab.plan, do="show")["requests"]
    threading.Thread(target=order, daemon=True).start()
    until(lambda: services.tell_engine(lab.plan, do="show")["requests"] > before, "the engine is asked")
    time.sleep(dice.uniform(0, 0.1))
    return partial(release, lab)


# Each begins a moment, and returns what ends it.
MOMENTS: dict[str, Callable[[ServiceLab, Random], Callable[[], None]]] = {
    "lock-step": in_lockstep,
    "a checkpoint asked for": asked_for,
    "a PVM standing still": standing_still,
    "one checkpoint after the other": one_after_the_other,
}


# ---- what --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """`ends`: who serves in the end; `mend`, after that, must not change it. `kind`: what it has in common with others.

    `brief`: `strike` itself takes the fault away, before anybody's timeout, and nothing comes of it.
    `undecided`: until `mend` nobody may go on alone, and `ends` come after it.
    `deaf`: the replica misses what the client says. The engine for tests copies nothing, so it must not commit before
    the client has said it again.
    """

    kind: str
    ends: tuple[str, ...]
    strike: Act
    mend: Act = lambda lab, dice: None
    arbiter: str = "command"
    brief: bool = False
    undecided: bool = False
    deaf: bool = False

    def fits(self, moment: str) -> bool:
        """Whether guests that nothing copies can go through it then."""
        return not (self.deaf and moment == "one checkpoint after the other")


def for_a_moment(begin: Callable[[ServiceLab], object], end: Callable[[ServiceLab], object]) -> Act:
    """What begins, and ends soon."""

    def strike(lab: ServiceLab, dice: Random) -> None:
        begin(lab)
        time.sleep(dice.uniform(0, BRIEF_S))
        end(lab)

    return strike


def killed_for_a_moment(host: str) -> Fault:
    strike = for_a_moment(lambda lab: lab.kill(host), lambda lab: lab.start(host))
    return Fault("a service is killed and comes back", (BOTH,), strike, brief=True)


def frozen_for_a_moment(host: str) -> Fault:
    strike = for_a_moment(lambda lab: lab.kill(host, signal.SIGSTOP), lambda lab: lab.kill(host, signal.SIGCONT))
    return Fault("a service is frozen for a moment", (BOTH,), strike, brief=True)


def guest_frozen_for_a_moment(guest: str) -> Fault:
    """What it has to say comes late. Frozen, the replica's kernel refuses ACKs of what it has not said itself."""
    strike = for_a_moment(
        lambda lab: lab.signal_guest(guest, signal.SIGSTOP), lambda lab: lab.signal_guest(guest, signal.SIGCONT)
    )
    return Fault("a guest is frozen for a moment", (BOTH,), strike, brief=True, deaf=guest == "svm")


def cut_for_a_moment(*ends: tuple[str, str]) -> Fault:
    """(host, device): what the host sends there is lost."""

    def cut(lab: ServiceLab) -> None:
        for host, device in ends:
            lab.mute(host, device)

    strike = for_a_moment(cut, lambda lab: lab.mend())
    return Fault("a link is cut for a moment", (BOTH,), strike, brief=True, deaf=("primary", FWD) in ends)


def survivor(lost: str) -> tuple[str]:
    return (PRIMARY,) if lost == "secondary" else (REPLICA,)


def killed(host: str) -> Fault:
    return Fault("a service is killed and stays away", survivor(host), lambda lab, dice: lab.kill(host))


def _stop(host: str, lab: ServiceLab, dice: Random) -> None:
    lab.kill(host, signal.SIGSTOP)


def frozen(host: str, arbiter: str) -> Fault:
    def thaw(lab: ServiceLab, dice: Random) -> None:
        time.sleep(dice.choice([0, LEASES_S]))
        lab.kill(host, signal.SIGCONT)

    strike = partial(_stop, host)
    return Fault("a service is frozen", survivor(host), strike, thaw, arbiter)


def off(host: str) -> Act:
    return lambda lab, dice: services.switch_off(lab.plan, host)


def switched_off(host: str, arbiter: str) -> Fault:
    return Fault("a host is switched off", survivor(host), off(host), arbiter=arbiter)


def parted(lab: ServiceLab, dice: Random) -> None:
    """The hosts don't hear each other on any path; whom both reach is the arbiter."""
    _in_any_order(dice, [lab.part, *(partial(lab.mute, host, FWD) for host in HOSTS)])


def muted(host: str) -> Act:
    """What a host says is lost on both paths."""
    return lambda lab, dice: _in_any_order(dice, [partial(lab.mute, host, path) for path in (FWD, MANAGEMENT_LINK)])


def _in_any_order(dice: Random, acts: list[Callable[[], None]]) -> None:
    dice.shuffle(acts)
    for act in acts:
        act()
        time.sleep(dice.choice([0, 0, 0.1]))


def separated(kind: str, ends: tuple[str, ...], strike: Act, arbiter: str) -> Fault:
    return Fault(kind, ends, strike, lambda lab, dice: lab.mend(), arbiter, deaf=True)


def arbiter_lost(lab: ServiceLab, dice: Random) -> None:
    """Its process, or the ways to it."""
    if dice.random() < 0.5:
        lab.end_etcd()
    else:
        lab.links(ARBITER, "down", *HOSTS)


def arbiter_back(lab: ServiceLab, dice: Random) -> None:
    lab.links(ARBITER, "up", *HOSTS)
    if lab.etcd is None:
        lab.start_etcd()


def without_arbiter(ends: tuple[str, ...], also: Act, deaf: bool = False) -> Fault:
    """Both, and only the arbiter comes back."""

    def strike(lab: ServiceLab, dice: Random) -> None:
        lab.end_etcd()
        time.sleep(dice.uniform(0, 0.3))
        also(lab, dice)

    return Fault("the arbiter is gone, too", ends, strike, arbiter_back, "etcd", undecided=True, deaf=deaf)


def arbiter_away() -> Fault:
    def strike(lab: ServiceLab, dice: Random) -> None:
        arbiter_lost(lab, dice)
        time.sleep(dice.uniform(0, BRIEF_S))
        arbiter_back(lab, dice)

    return Fault("the arbiter is gone for a moment", (BOTH,), strike, arbiter="etcd", brief=True)


FAULTS: dict[str, Fault] = {
    **{f"the service of the {host} is killed and comes back": killed_for_a_moment(host) for host in HOSTS},
    **{f"the service of the {host} is frozen for a moment": frozen_for_a_moment(host) for host in HOSTS},
    **{f"the {guest} is frozen for a moment": guest_frozen_for_a_moment(guest) for guest in GUESTS},
    **{f"fwd is cut from the {host} for a moment": cut_for_a_moment((host, FWD)) for host in HOSTS},
    "fwd is cut for a moment": cut_for_a_moment(*((host, FWD) for host in HOSTS)),
    **{f"management is cut from the {host} for a moment": cut_for_a_moment((host, MANAGEMENT_LINK)) for host in HOSTS},
    "management is cut for a moment": cut_for_a_moment(*((host, MANAGEMENT_LINK) for host in HOSTS)),
    "all is cut for a moment": cut_for_a_moment(*((host, path) for host in HOSTS for path in (FWD, MANAGEMENT_LINK))),
    "the arbiter is gone for a moment": arbiter_away(),
    **{f"the service of the {host} is killed and stays away": killed(host) for host in HOSTS},
    **{f"the {host} is switched off with {a}": switched_off(host, a) for host in HOSTS for a in ARBITERS},
    **{f"the service of the {host} is frozen with {a}": frozen(host, a) for host in HOSTS for a in ARBITERS},
    **{f"the hosts are parted with {a}": separated("parted", (PRIMARY, REPLICA), parted, a) for a in ARBITERS},
    **{f"the primary is heard no more with {a}": separated("muted", (REPLICA,), muted("primary"), a) for a in ARBITERS},
    **{f"the secondary is heard no more with {a}": separated("muted", (PRIMARY,), muted("secondary"), a) for a in ARBITERS},
    "the arbiter is gone and the primary switched off": without_arbiter((REPLICA,), off("primary")),
    "the arbiter is gone and the secondary switched off": without_arbiter((PRIMARY,), off("secondary")),
    "the arbiter is gone and the hosts are parted": without_arbiter((PRIMARY, REPLICA), parted, deaf=True),
}  # fmt: skip
