"""Asking the service on this host, through its control socket."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coloebpf.errors import NoServiceError, ServiceError

SOCKET = Path("/run/coloebpf/control.sock")
ANSWER_S = 10.0  # for a status; the service reads its maps for it
ORDER_S = 70.0  # for a command: longer than the service itself gives it
WAITING_S = 5.0  # a command that takes longer is one to be told about; and between two looks
MAX_ANSWER = 16 << 20  # bytes; a status of 64 NICs has some 200 KiB


class Client:
    """One connection. Raises NoServiceError if nobody answers, ServiceError with the service's own words otherwise."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self._connection, self._path = connection, path
        self._input = connection.makefile("rb")

    def ask(self, command: str, timeout_s: float = ANSWER_S, **arguments: str) -> Any:
        """The result of one request."""
        return self._ask(lambda: None, command, timeout_s, arguments)

    def order(self, command: str, pair: str, waiting: Callable[[], object]) -> Any:
        """Likewise, as long as it takes: the service knows how long it may. `waiting`: called again and again."""

        def wait() -> None:
            while not select.select([self._connection], [], [], WAITING_S)[0]:
                waiting()

        return self._ask(wait, command, ORDER_S, {"pair": pair})

    def _ask(self, wait: Callable[[], None], command: str, timeout_s: float, arguments: dict[str, str]) -> Any:
        try:
            self._connection.settimeout(timeout_s)
            self._connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            wait()
            line = self._input.readline(MAX_ANSWER)
        except TimeoutError as error:
            raise NoServiceError(
                f"the service at {self._path} did not answer {command!r} in {timeout_s:g} s: systemctl status coloebpf"
            ) from error
        except OSError as error:
            raise NoServiceError(f"the service at {self._path} hung up ({error.strerror})") from error
        if not line.endswith(b"\n"):
            raise NoServiceError(f"the service at {self._path} hung up: systemctl status coloebpf")
        answer = json.loads(line)
        if not answer["ok"]:
            raise ServiceError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Ends the connection."""
        self._input.close()


def check_peer(status: dict[str, Any], wanted: str) -> None:
    """Raises ServiceError if the other host of a service has another name."""
    peer = status["service"]["peer"]
    if peer is None or peer["name"] != wanted:
        raise ServiceError(f"the other host is {peer['name'] if peer else 'none'}, not {wanted}: see [peer] name")


@contextmanager
def connected(path: Path) -> Iterator[Client]:
    """A connection to the service that listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(str(path))
        except PermissionError as error:
            raise ServiceError(f"{path} is for root and its group alone: run it as root") from error
        except OSError as error:
            raise NoServiceError(
                f"no service answers at {path} ({error.strerror}): systemctl start coloebpf, "
                "or say --socket if [host] control_socket is another path"
            ) from error
        client = Client(connection, path)
        try:
            yield client
        finally:
            client.close()
