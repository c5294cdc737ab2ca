"""One process for each host that loads its dataplane: compiling takes seconds, and a real host has a loader of its own.

Spawned, not forked, so that nothing of this process (sockets, signal handlers) is shared.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from coloebpf.errors import ColoError, LabError

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(work: Callable[..., None], jobs: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
    """Calls `work(*arguments)` for each job (a name for messages, arguments) in its own process, all at once.

    Raises the first job's error that there is, in the order of `jobs`. When this ends, however it ends, so have they.
    """
    context = get_context("spawn")
    resource_tracker.ensure_running()  # multiprocessing's own helper: starting it would undo what is held back below
    running = []
    try:
        for name, arguments in jobs:
            answer, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(theirs, work, arguments), daemon=True)
            with held_back(INTERRUPTIONS):  # inherited: what a terminal sends reaches the parent alone, which ends them
                process.start()
            theirs.close()
            running.append((name, process, answer))
        for name, process, answer in running:
            try:
                error = answer.recv()
            except EOFError:
                process.join()
                raise LabError(
                    f"the loader of {name} {_end(process.exitcode)} before it was done; "
                    "dmesg shows whether the kernel killed it for want of memory"
                ) from None
            if error is not None:
                raise error
    finally:
        for _, process, answer in running:
            process.kill()
            process.join()
            answer.close()


def _report(parent: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
    except ColoError as error:
        parent.send(error)
    else:
        parent.send(None)


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


@contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals that come meanwhile are delivered at the end of the block; handlers must stay what they are in it.

    They are blocked for this thread, and so for what it starts. The kernel then gives them to any other thread there
    is, for which Python calls the handler in the main thread at once: so the handlers are put aside as well.
    """
    came: list[int] = []
    with ExitStack() as stack:  # undone from the last to the first, each of them even if a signal ends another
        stack.callback(_deliver, came)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, signals))
        if threading.current_thread() is threading.main_thread():  # the only one whose handlers interrupt it
            handlers = {number: signal.getsignal(number) for number in signals}
            for number, handler in handlers.items():
                stack.callback(signal.signal, number, handler)
            for number in handlers:
                signal.signal(number, lambda number, _: came.append(number))
        yield


def _deliver(signals: list[int]) -> None:
    for number in signals:
        signal.raise_signal(number)
