"""libxenlight by ctypes: the calls that a live copy of a running guest needs, and no others.

Structs and signatures are those of the versions in VERSIONS (libxl.h, _libxl_types.h); the library's soname has its
version, so another one is refused instead of being called wrongly. A libxl that crashes takes its process with it, and
one that waits may wait for ever: only the worker (worker.py) calls this.
"""

from __future__ import annotations

import ctypes as ct
import uuid
from ctypes.util import find_library
from dataclasses import dataclass

from coloebpf.errors import XenError

VERSIONS = ("4.17",)  # Debian 12's
SUSPEND_LIVE = 2  # LIBXL_SUSPEND_LIVE
STREAM_V2 = 2
NO_DOMID = 0xFFFFFFFF  # INVALID_DOMID
CONFIG_BYTES = 1 << 16  # more than a libxl_domain_config, which is some 3 KiB and not described here
ERRORS = {-3: "it failed", -6: "it is no valid request", -8: "the guest did not answer", -21: "there is no such domain"}
NOT_FOUND = -21  # ERROR_DOMAIN_NOTFOUND
REBOOT, SUSPENDED = 1, 2  # LIBXL_SHUTDOWN_REASON_...
LOG_ERRORS = 8  # XTL_ERROR


class _Uuid(ct.Structure):
    _fields_ = [("bytes", ct.c_uint8 * 16)]


class _DomInfo(ct.Structure):  # libxl_dominfo
    _fields_ = [
        ("uuid", _Uuid), ("domid", ct.c_uint32), ("ssidref", ct.c_uint32), ("ssid_label", ct.c_char_p),
        ("running", ct.c_bool), ("blocked", ct.c_bool), ("paused", ct.c_bool), ("shutdown", ct.c_bool),
        ("dying", ct.c_bool), ("never_stop", ct.c_bool), ("shutdown_reason", ct.c_int),
        ("outstanding_memkb", ct.c_uint64), ("current_memkb", ct.c_uint64), ("shared_memkb", ct.c_uint64),
        ("paged_memkb", ct.c_uint64), ("max_memkb", ct.c_uint64), ("cpu_time", ct.c_uint64),
        ("vcpu_max_id", ct.c_uint32), ("vcpu_online", ct.c_uint32), ("cpupool", ct.c_uint32),
        ("gpaddr_bits", ct.c_uint8), ("domain_type", ct.c_int),
    ]  # fmt: skip


class _RestoreParams(ct.Structure):  # libxl_domain_restore_params
    _fields_ = [
        ("checkpointed_stream", ct.c_int), ("stream_version", ct.c_uint32), ("colo_proxy_script", ct.c_char_p),
        ("userspace_colo_proxy", ct.c_int),
    ]  # fmt: skip


_P, _I, _U32, _S = ct.c_void_p, ct.c_int, ct.c_uint32, ct.c_char_p
# Result, then arguments. An ao_how of NULL makes a call return when it is done.
_CALLS: dict[str, tuple[object, ...]] = {
    "libxl_ctx_alloc": (_I, ct.POINTER(_P), _I, ct.c_uint, _P),
    "libxl_domid_to_name": (_P, _P, _U32),  # malloc()ed
    "libxl_list_domain": (ct.POINTER(_DomInfo), _P, ct.POINTER(_I)),
    "libxl_dominfo_list_free": (None, ct.POINTER(_DomInfo), _I),
    "libxl_dominfo_init": (None, ct.POINTER(_DomInfo)),
    "libxl_dominfo_dispose": (None, ct.POINTER(_DomInfo)),
    "libxl_domain_info": (_I, _P, ct.POINTER(_DomInfo), _U32),
    "libxl_domain_suspend": (_I, _P, _U32, _I, _I, _P),
    "libxl_domain_resume": (_I, _P, _U32, _I, _P),
    "libxl_domain_pause": (_I, _P, _U32, _P),
    "libxl_domain_unpause": (_I, _P, _U32, _P),
    "libxl_domain_destroy": (_I, _P, _U32, _P),
    "libxl_domain_rename": (_I, _P, _U32, _S, _S),
    "libxl_domain_config_init": (None, _P),
    "libxl_domain_config_dispose": (None, _P),
    "libxl_retrieve_domain_configuration": (_I, _P, _U32, _P, _P),
    "libxl_domain_config_to_json": (_P, _P, _P),  # malloc()ed
    "libxl_domain_config_from_json": (_I, _P, _P, _S),
    "libxl_domain_restore_params_init": (None, ct.POINTER(_RestoreParams)),
    "libxl_domain_create_restore": (
        _I, _P, _P, ct.POINTER(_U32), _I, _I, ct.POINTER(_RestoreParams), _P, _P
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """One domain. `suspended`: stands still for a copy; `ended`: crashed, shut down or being destroyed.

    `reboots`: it has ended to be started anew, which is for xl to do: as another domain with the same UUID.
    """

    domid: int
    name: str
    uuid: str
    paused: bool
    suspended: bool
    ended: bool
    reboots: bool


def find() -> str:
    """The library's soname. Raises XenError that says what is there instead."""
    for version in VERSIONS:
        soname = f"libxenlight.so.{version}"
        try:
            ct.CDLL(soname)
        except OSError as e:
            if "cannot open shared object" not in str(e):  # it is there, and lacks something
                raise XenError(f"{soname} can't be loaded: {e}") from e
        else:
            return soname
    known = " or ".join(VERSIONS)
    other = find_library("xenlight")
    if other is not None:
        raise XenError(f"{other} is here, and the engine libxl-live knows libxl {known} only")
    raise XenError(f"there is no libxl {known} on this host: apt-get install xen-utils-{VERSIONS[0]}")


class LibXl:
    """One libxl context; its complaints go to stderr. Raises XenError if it can't be had."""

    def __init__(self) -> None:
        self._lib = ct.CDLL(find(), use_errno=True)
        for name, (result, *arguments) in _CALLS.items():
            try:
                function = getattr(self._lib, name)
            except AttributeError as e:
                raise XenError(f"this libxenlight has no {name}") from e
            function.restype, function.argtypes = result, arguments
        self._libc = ct.CDLL(None)
        self._libc.free.argtypes = [_P]
        toollog = ct.CDLL("libxentoollog.so.1")
        toollog.xtl_createlogger_stdiostream.restype = _P
        toollog.xtl_createlogger_stdiostream.argtypes = [_P, _I, ct.c_uint]
        logger = toollog.xtl_createlogger_stdiostream(_P.in_dll(self._libc, "stderr"), LOG_ERRORS, 0)
        self._ctx = _P()
        if self._lib.libxl_ctx_alloc(ct.byref(self._ctx), 0, 0, logger):
            raise XenError("libxl has no access to Xen: is this host's dom0 booted under Xen, and xenstored up?")

    # ---- looking ---------------------------------------------------------------------------------------------------

    def domains(self) -> list[Domain]:
        """All of this host."""
        number = _I()
        found = self._lib.libxl_list_domain(self._ctx, ct.byref(number))
        if not found:
            raise XenError("libxl can't list the domains")
        try:
            return [self._domain(found[i]) for i in range(number.value)]
        finally:
            self._lib.libxl_dominfo_list_free(found, number)

    def domain(self, domid: int) -> Domain | None:
        """None: it is gone."""
        info = _DomInfo()
        self._lib.libxl_dominfo_init(ct.byref(info))
        try:
            code = self._lib.libxl_domain_info(self._ctx, ct.byref(info), domid)
            if code == NOT_FOUND:
                return None
            self._check("libxl_domain_info", code)
            return self._domain(info)
        finally:
            self._lib.libxl_dominfo_dispose(ct.byref(info))

    def _domain(self, info: _DomInfo) -> Domain:
        suspended = bool(info.shutdown and info.shutdown_reason == SUSPENDED)
        return Domain(
            domid=info.domid,
            name=self._text(self._lib.libxl_domid_to_name(self._ctx, info.domid)),
            uuid=str(uuid.UUID(bytes=bytes(info.uuid.bytes))),
            paused=info.paused,
            suspended=suspended,
            ended=bool(info.dying or (info.shutdown and not suspended)),
            reboots=bool((info.dying or info.shutdown) and info.shutdown_reason == REBOOT),
        )

    def configuration(self, domid: int) -> str:
        """Its libxl_domain_config, in JSON."""
        buffer = self._config()
        try:
            self._call("libxl_retrieve_domain_configuration", domid, buffer, None)
            return self._text(self._lib.libxl_domain_config_to_json(self._ctx, buffer))
        finally:
            self._lib.libxl_domain_config_dispose(buffer)

    # ---- acting ----------------------------------------------------------------------------------------------------

    def suspend(self, domid: int, fd: int) -> None:
        """Writes a running guest's state to `fd`, round by round, and stops it for the last one: resume() it."""
        self._call("libxl_domain_suspend", domid, fd, SUSPEND_LIVE, None)

    def resume(self, domid: int) -> None:
        """Lets a suspended guest go on as if nothing had been."""
        self._call("libxl_domain_resume", domid, 1, None)

    def pause(self, domid: int) -> None:
        """Its vCPUs stand still."""
        self._call("libxl_domain_pause", domid, None)

    def unpause(self, domid: int) -> None:
        """They go on, also for the first time."""
        self._call("libxl_domain_unpause", domid, None)

    def destroy(self, domid: int) -> None:
        """It is gone, with its devices."""
        self._call("libxl_domain_destroy", domid, None)

    def rename(self, domid: int, old: str, new: str) -> None:
        """Nobody else may have the new name."""
        self._call("libxl_domain_rename", domid, old.encode(), new.encode())

    def restore(self, config: str, fd: int) -> int:
        """A new paused domain out of what suspend() has written; its number. What has failed is destroyed."""
        buffer, domid, params = self._config(), _U32(NO_DOMID), _RestoreParams()
        self._lib.libxl_domain_restore_params_init(ct.byref(params))
        params.stream_version = STREAM_V2
        try:
            self._check(
                "libxl_domain_config_from_json",
                self._lib.libxl_domain_config_from_json(self._ctx, buffer, config.encode()),
            )
            code = self._lib.libxl_domain_create_restore(
                self._ctx, buffer, ct.byref(domid), fd, -1, ct.byref(params), None, None
            )
            if code and domid.value != NO_DOMID:
                self._lib.libxl_domain_destroy(self._ctx, domid, None)
            self._check("libxl_domain_create_restore", code)
            return int(domid.value)
        finally:
            self._lib.libxl_domain_config_dispose(buffer)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _config(self) -> ct.Array[ct.c_char]:
        buffer = ct.create_string_buffer(CONFIG_BYTES)
        self._lib.libxl_domain_config_init(buffer)
        return buffer

    def _text(self, text: int | None) -> str:
        """Of a malloc()ed string, which is freed; "" of NULL."""
        if not text:
            return ""
        try:
            return ct.string_at(text).decode(errors="replace")
        finally:
            self._libc.free(text)

    def _call(self, name: str, domid: int, *arguments: object) -> None:
        self._check(f"{name} of domain {domid}", getattr(self._lib, name)(self._ctx, domid, *arguments))

    @staticmethod
    def _check(what: str, code: int) -> None:
        if code:
            raise XenError(f"{what}: {ERRORS.get(code, 'it failed')} ({code})")
