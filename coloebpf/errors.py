"""What can go wrong, as sentences: one root, narrow children. A message tells an operator what, where, what to do."""


class ColoError(Exception):
    """Root of all errors that coloebpf raises on purpose."""


class PreflightError(ColoError):
    """The machine lacks something that coloebpf needs."""


class DeviceError(ColoError):
    """A network device is missing, or can't be set up as the dataplane needs it."""


class HookBusyError(ColoError):
    """A hook on a device is held by a program that is not ours."""


class BpfError(ColoError):
    """The kernel refused a bpf(2) call, or a program does not load."""


class LabError(ColoError):
    """The lab can't do what was asked."""


class ConfigError(ColoError):
    """A value that was given is wrong."""


class MachineError(ColoError):
    """A trigger that can't happen in a pair's state."""


class EngineError(ColoError):
    """An engine can't do what was asked of it."""


class XenError(EngineError):
    """libxl can't be had here, or can't do what was asked of it."""


class DiskError(EngineError):
    """A guest's disk is not as it has to be, so the guest can't be protected."""


class ServiceError(ColoError):
    """The service can't do what was asked, or does not answer."""


class NoServiceError(ServiceError):
    """No service answers on this host."""


class WireError(ColoError):
    """The other end of a connection says what its protocol does not have."""


class NotifyError(ColoError):
    """systemd can't be told something, or has handed over something that is of no use."""


class PkiError(ColoError):
    """A certificate or key can't be made, or can't be used."""


class LinkError(ColoError):
    """The link to the other host's service can't be set up."""


class MessageError(ColoError):
    """What came over the link is no message that may come there. `kind`: which of REFUSALS (status.py) it is."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class ArbiterError(ColoError):
    """An arbiter gave no answer, or none that could be understood: neither yes nor no."""


class AnnounceError(ColoError):
    """A guest's addresses can't be announced."""


class PairError(ColoError):
    """What was asked of a pair can't be done now."""
