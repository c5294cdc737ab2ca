"""The way to a member of etcd: plain or TLS, with or without a user.

etcd's JSON gateway knows users by tokens, got for a name and a password. A token that is not used for 5 minutes is
forgotten, and in lock-step nothing is asked of etcd for longer: so what fails for want of a good token is asked again
with a new one. That costs a takeover some 0.1 s, for etcd is slow to check passwords on purpose (bcrypt).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from requests.auth import AuthBase

from coloebpf.service.config import EtcdConfig

API = "/v3/"
# What etcd says to a token that it does not know, or that is older than the last change of its users.
UNKNOWN, OLD = 401, "revision of auth store is old"


def client(url: str, config: EtcdConfig) -> Etcd3Client:
    """For one member. Files are read when they are needed first; what is wrong with them is an OSError then."""
    parts, timeout_s = urlsplit(url), config.request_timeout_ms / 1000
    session = requests.Session()
    session.trust_env = False  # no proxy, no other authorities than the configuration's
    if config.ca is not None:
        session.verify = str(config.ca)
    if config.certificate is not None and config.key is not None:
        session.cert = (str(config.certificate), str(config.key))
    if config.user and config.password_file is not None:
        session.auth = TokenAuth(url, config.user, config.password_file, session, timeout_s)
    return Etcd3Client(
        host=parts.hostname or "", port=parts.port or 2379, protocol=parts.scheme, timeout=timeout_s, api_path=API,
        session=session,
    )  # fmt: skip


class TokenAuth(AuthBase):
    """A user's token in each request; several threads may use it."""

    def __init__(self, url: str, user: str, password: Path, session: requests.Session, timeout_s: float) -> None:
        self._url, self._user, self._password = f"{url}{API}auth/authenticate", user, password
        self._session, self._timeout_s = session, timeout_s
        self._token = ""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Raises Etcd3Exception or requests.RequestException without a token, OSError without a password."""
        request.headers["Authorization"] = self._token or self._new()
        request.register_hook("response", self._answered)
        return request

    def _answered(self, response: requests.Response, **how: Any) -> requests.Response:
        """The same once more, if it was for want of a good token."""
        if response.status_code != UNKNOWN and not (not response.ok and OLD in response.text):
            return response
        response.close()
        again = response.request.copy()
        again.headers["Authorization"] = self._new()
        answer: requests.Response = response.connection.send(again, **how)
        answer.history.append(response)
        answer.request = again
        return answer

    def _new(self) -> str:
        password = self._password.read_text(encoding="utf-8").partition("\n")[0]
        who = {"name": self._user, "password": password}
        # `auth` of nobody: the session's would ask for a token to get one.
        answer = self._session.post(self._url, json=who, timeout=self._timeout_s, auth=_Nobody())
        if not answer.ok:
            raise Etcd3Exception(answer.text, answer.reason)
        self._token = str(answer.json()["token"])
        return self._token


class _Nobody(AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request
