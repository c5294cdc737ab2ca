"""The worker's process: libxl that is not there, and what crosses the wire."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import threading
from pathlib import Path

import pytest

from coloebpf.errors import XenError
from coloebpf.service.engines.xen_domains import index_of
from coloebpf.xen import client, libxl, stream
from coloebpf.xen.guest import placed
from tests.service.xen_rig import guest


def test_no_xen_here(tmp_path: Path) -> None:
    """A sentence, not a crash of the service."""

    async def test() -> None:
        with pytest.raises(XenError, match=r"there is no libxl 4\.17|libxl has no access to Xen"):
            await client.Worker.start(tmp_path / "worker.log", 60)

    asyncio.run(test())


def test_no_process_can_be_started(tmp_path: Path) -> None:
    async def test() -> None:
        for log, argv in ((tmp_path / "worker.log", ("/none",)), (Path("/proc/none/worker.log"), client.ARGV)):
            with pytest.raises(XenError, match="no process for libxl can be started"):
                await client.Worker.start(log, 60, argv)

    asyncio.run(test())


def test_no_such_port() -> None:
    with pytest.raises(XenError, match="there is no port none0"):
        index_of("none0")


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and not called."""
    monkeypatch.setattr(libxl, "VERSIONS", ("9.99",))
    monkeypatch.setattr(libxl, "find_library", lambda name: "libxenlight.so.4.14")
    with pytest.raises(XenError, match=r"libxenlight\.so\.4\.14 is here, and .* knows libxl 9\.99 only"):
        libxl.find()


def test_the_real_library_has_what_is_called() -> None:
    """All functions, where Xen's library is installed; whether their arguments are right only a Xen host tells."""
    try:
        libxl.find()
    except XenError as e:
        pytest.skip(str(e))
    with pytest.raises(XenError, match="no access to Xen"):  # and not: has no such function
        libxl.LibXl()


def test_structs() -> None:
    """Sizes and places as the compiler has them in 4.17's headers."""
    info, params = libxl._DomInfo, libxl._RestoreParams
    assert (ctypes.sizeof(info), ctypes.sizeof(params)) == (120, 24)
    assert (info.shutdown.offset, info.dying.offset, info.shutdown_reason.offset) == (35, 36, 40)
    assert libxl.CONFIG_BYTES > 1288  # sizeof(libxl_domain_config)


def test_a_head_and_what_follows() -> None:
    """The configuration comes back, and not a byte of libxl's stream is read."""
    config = json.dumps(guest())
    out, into = os.pipe()

    def write() -> None:
        stream.write_head(into, config)
        os.write(into, b"LibxlFmt")

    writer = threading.Thread(target=write)
    writer.start()
    assert stream.read_head(out) == config
    assert os.read(out, 100) == b"LibxlFmt"
    writer.join()
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 48, b"Xen saved domain, xl format\n \0 \r"])
def test_no_head(data: bytes) -> None:
    """Anything else is refused."""
    out, into = os.pipe()
    os.write(into, data)
    os.close(into)
    with pytest.raises(XenError):
        stream.read_head(out)
    os.close(out)


def test_a_config_that_is_none() -> None:
    """What came from the other host is not trusted to be what it should be."""
    for config in ("", "[]", "{}", json.dumps({"c_info": {}, "nics": [{}, {}]})):
        with pytest.raises(XenError, match="no guest of this pair"):
            placed(config, "web--0", "1", ["x"])
