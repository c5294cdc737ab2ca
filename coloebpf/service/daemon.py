"""`coloebpf run`: the process around a host's service. Signals, systemd, the log, and a changed configuration."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from coloebpf import __version__
from coloebpf.errors import ColoError
from coloebpf.service import config as configuration
from coloebpf.service.assemble import Service
from coloebpf.service.config import Config
from coloebpf.service.fdstore import Notifier, taken_back, watchdog_period_s
from coloebpf.service.log import say
from coloebpf.service.reload import apply

log = logging.getLogger("coloebpf.daemon")

# A thread (status, /metrics, attaching) gives way to the event loop after so many seconds; Python's own 5 ms are more
# than libxl's COLO_CHECKPOINT may wait.
SWITCH_S = 0.0002
SYSTEMCTL_S = 0.5  # for its answer; without one this end counts as a restart


def run(path: Path) -> int:
    """Serves until SIGTERM or SIGINT. Raises ConfigErrors for a file that can't be used, a ColoError for what fails."""
    config = configuration.load(path)
    sys.setswitchinterval(SWITCH_S)
    begin_log(config.host.log_level, os.environ)
    asyncio.run(serve(config, Notifier.from_environment()))
    return 0


def begin_log(level: str, environ: Mapping[str, str]) -> None:
    """To standard error; the journal has the time already."""
    when = "" if "JOURNAL_STREAM" in environ else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, format=f"{when}%(levelname)s %(name)s: %(message)s", force=True)
    set_level(level)


def set_level(level: str) -> None:
    logging.getLogger().setLevel(level.upper())


async def serve(config: Config, notifier: Notifier) -> None:
    """From the start to the signal that ends it."""
    loop = asyncio.get_running_loop()
    say(log, logging.INFO, "starts", version=__version__, host=config.host.name, config=config.path)
    daemon = Daemon(Service(config, notifier, taken_back()), notifier)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.end, number)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    await daemon.run()


async def host_ends(environ: Mapping[str, str]) -> bool:
    """systemd is about to end all of it, not just this service: there will be no next one soon."""
    if "NOTIFY_SOCKET" not in environ:
        return False
    command = ["systemctl", "is-system-running"]
    try:
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=SYSTEMCTL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == "stopping"


class Daemon:
    """A service and what comes to it from outside."""

    def __init__(self, service: Service, notifier: Notifier) -> None:
        self._service, self._notifier = service, notifier
        self._signal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reloading: asyncio.Task[None] | None = None
        self._again = False

    async def run(self) -> None:
        """Raises what the service could not be started by, or has failed with."""
        watchdog = asyncio.create_task(self._watchdog())
        reason = "its start has failed"
        try:
            starting = asyncio.create_task(self._service.start())
            await asyncio.wait((starting, self._signal), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                self._notifier.ready(f"{len(self._service.pairs)} pairs")
                say(log, logging.INFO, "ready", pairs=len(self._service.pairs))
                reason = "a part of it has failed"
                await asyncio.wait((self._service.ended, self._signal), return_when=asyncio.FIRST_COMPLETED)
                if self._service.ended.done():
                    await self._service.ended
            starting.cancel()
            reason = self._signal.result()
        finally:
            say(log, logging.INFO, "ends", reason=reason)
            self._notifier.stopping(reason)
            for task in (self._reloading, watchdog):
                if task is not None:
                    task.cancel()
            await self._service.stop(reason, again=not await host_ends(os.environ))
            self._notifier.close()

    def end(self, number: signal.Signals) -> None:
        """A signal asks for the end; a second one changes nothing."""
        if not self._signal.done():
            self._signal.set_result(signal.Signals(number).name)

    def reload(self) -> None:
        """SIGHUP. One that comes while another is worked off is worked off behind it."""
        if self._reloading is not None and not self._reloading.done():
            self._again = True
            return
        self._again = False
        self._reloading = asyncio.get_running_loop().create_task(self._reload())

    async def _reload(self) -> None:
        self._notifier.reloading()
        self._service.troubles.pop("reload", None)
        before = self._service.config
        path = before.path
        try:
            await apply(self._service, configuration.load(path))
            set_level(self._service.config.host.log_level)
        except ColoError as e:
            self._trouble(before, e)
            for line in str(e).splitlines():
                say(log, logging.ERROR, "the changed configuration is refused", error=line)
        except Exception as e:
            self._trouble(before, e)
            log.exception("the changed configuration could not be applied")
        finally:
            self._notifier.ready()
        if self._again:
            asyncio.get_running_loop().call_soon(self.reload)

    def _trouble(self, before: Config, error: Exception) -> None:
        now = self._service.config
        how = "was refused, what was before stays:"
        if now is not before:
            served = ", ".join(pair.name for pair in now.pairs) or "none"
            how = f"was not applied as a whole; served are: {served};"
        self._service.troubles["reload"] = f"the changed {before.path} {how} {error}"

    async def _watchdog(self) -> None:
        """On the event loop, so that systemd hears nothing when that stands still."""
        period = watchdog_period_s()
        while period:
            self._notifier.watchdog()
            await asyncio.sleep(period)
